"""Insertion and deletion against their definition, and against models whose right answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import inside
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_metrics as slow
import slow_metrics_removal as removal
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.perturb import make_fill
from faithmap.registry import default_metrics, get

SIDE = 14
NAMES = ("insertion", "deletion")


def score(model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", "insertion-deletion")
    found: dict[str, Scored] = plugin.make(plugin.check(params))(model, batch, maps)
    return found


def substrate(name: str, model: Model, image: Tensor) -> Tensor:
    if name == "normalised-zero":
        return model.mean[0].expand(3, *image.shape[1:]).clone()
    if name == "rise-blur":
        return removal.rise_blurred(image, model.mean.flatten(), model.std.flatten())
    fill = make_fill(name, image[None])
    assert fill is not None
    return fill[0].expand_as(image).clone()


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["normalised-zero", "rise-blur", "black", "mean", "blur"]),
    st.sampled_from(["normalised-zero", "rise-blur", "black", "mean", "blur"]),
    st.sampled_from([1, 7, 13]),
    st.booleans(),
)
def test_every_curve_is_its_definition(
    seed: int, deletion: str, insertion: str, steps: int, tied: bool
) -> None:
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = slow.random_images(2, SIDE, seed)
    batch = slow.batch_of(model, images, targets=torch.tensor([2, 1]), grid=(3, 3))
    maps = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    maps = maps.round() if tied else maps
    found = score(model, batch, maps, steps=steps, deletion=deletion, insertion=insertion)
    for i, target in enumerate((2, 1)):
        order = slow.removal_order(maps[i], batch.ties()[i])
        taken, put = (substrate(name, model, images[i]) for name in (deletion, insertion))
        curves = {
            "deletion": removal.causal_curve(model, images[i], taken, order, target, steps),
            "insertion": removal.causal_curve(model, put, images[i], order, target, steps),
        }
        for name, curve in curves.items():
            stored = found[name].curves
            assert stored is not None
            assert stored[i].tolist() == pytest.approx(curve, abs=1e-5)
            area = removal.causal_area(curve)
            assert found[name].values[i].item() == pytest.approx(area, abs=1e-3)


def test_steps_are_those_of_the_code_at_224_pixels() -> None:
    """8 x 224 pixels at a time: 28 steps, 29 points."""
    defaults = get("metric", "insertion-deletion").parameters
    assert 224 * 224 / defaults["steps"] == 8 * 224
    assert (defaults["deletion"], defaults["insertion"]) == ("normalised-zero", "rise-blur")


def test_the_blur_is_that_of_the_code() -> None:
    model = slow.model_of(slow.Glance(), SIDE)
    images = slow.random_images(2, 9)[..., :7]
    kernel = removal.rise_kernel()
    assert kernel.sum() == pytest.approx(1)
    assert kernel[0, 0] > math.exp(-1) * kernel[5, 5]  # folded: its corner is far from nothing
    found = inside("insertion-deletion", "metric").rise_blur(images, model.mean)
    for image, blurred in zip(images, found, strict=True):
        expected = removal.rise_blurred(image, model.mean.flatten(), model.std.flatten())
        torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-5)


def test_the_planted_order_is_best_in_closed_form() -> None:
    """A sum of patch scores: after k patches of the right order the logit is known."""
    weights = torch.linspace(-0.6, 2.4, 16)[torch.randperm(16)].view(4, 4)
    model = Model(slow.PatchSum(weights, bar=7.0), mean=0.0, std=1.0, input_size=16, family="cnn")
    batch = slow.batch_of(model, torch.ones(1, 3, 16, 16), targets=torch.tensor([0]))
    spread = weights.repeat_interleave(4, 0).repeat_interleave(4, 1).unsqueeze(0)
    found = score(model, batch, spread, steps=16, deletion="black", insertion="black")
    falling = weights.flatten().double().sort(descending=True).values
    put = torch.cat([torch.zeros(1), falling.cumsum(0)])
    for name, left in (("insertion", put), ("deletion", falling.sum() - put)):
        curve = torch.sigmoid(left - 7.0)
        assert found[name].curves is not None
        torch.testing.assert_close(found[name].curves[0].double(), curve, rtol=0, atol=1e-5)
    worst = score(model, batch, -spread, steps=16, deletion="black", insertion="black")
    for seed in range(5):
        other = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(seed))
        scored = score(model, batch, other, steps=16, deletion="black", insertion="black")
        assert worst["insertion"].values < scored["insertion"].values < found["insertion"].values
        assert worst["deletion"].values > scored["deletion"].values > found["deletion"].values


def test_with_one_substrate_insertion_from_the_top_is_deletion_from_the_bottom(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32)
    settings = {"steps": 16, "deletion": "black", "insertion": "black"}
    there, back = score(cnn, batch, maps, **settings), score(cnn, batch, -maps, **settings)
    assert there["insertion"].curves is not None and back["deletion"].curves is not None
    torch.testing.assert_close(there["insertion"].curves, back["deletion"].curves.flip(1), rtol=0, atol=1e-5)


def test_with_two_substrates_one_is_not_the_other_reversed() -> None:
    model = slow.model_of(slow.Glance(), 32)
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32)
    there, back = score(model, batch, maps), score(model, batch, -maps)
    assert there["insertion"].curves is not None and back["deletion"].curves is not None
    ends = (there["insertion"].curves[:, 0] - back["deletion"].curves[:, -1]).abs()
    assert float(ends.min()) > 1e-4
    assert not torch.allclose(there["insertion"].values, back["deletion"].values, atol=1e-2)


def test_passes_are_counted_and_the_substrates_are_shared_by_all_maps(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(2, 32), grid=(8, 8))
    _ = batch.logits
    counts = []
    for _ in range(2):
        with model.counting() as meter:
            found = score(model, batch, torch.randn(2, 32, 32), steps=5)
        counts.append((meter.forwards, meter.backwards))
    assert counts == [(2 * (4 + 4 + 2), 0), (2 * (4 + 4), 0)]
    assert not any(scored.values.requires_grad for scored in found.values())


def test_only_the_order_of_a_map_counts(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    maps = torch.randn(2, 32, 32).round()
    first, second = score(cnn, batch, maps, steps=6), score(cnn, batch, maps.exp() * 3 - 7, steps=6)
    assert all(torch.equal(first[name].values, second[name].values) for name in NAMES)


def test_an_image_scores_alike_in_any_company(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32).round()
    together, alone = score(model, batch, maps, steps=6), score(model, batch.select([1]), maps[1:2], steps=6)
    for name in NAMES:
        assert alone[name].values[0].item() == pytest.approx(together[name].values[1].item(), abs=1e-3)


def test_it_has_to_be_named() -> None:
    assert "insertion-deletion" not in {plugin.name for plugin in default_metrics()}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"deletion": "grey"}, "parameter 'deletion': got 'grey'; known are: "),
        ({"insertion": "black2"}, "parameter 'insertion': got 'black2'; did you mean 'black'"),
        ({"steps": 0}, "parameter 'steps': got 0, expected at least 1"),
    ],
)
def test_wrong_parameters_are_refused(cnn: Model, params: dict[str, object], message: str) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32))
    with pytest.raises(RequestError, match=message):
        score(cnn, batch, torch.rand(1, 32, 32), **params)
