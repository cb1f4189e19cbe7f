"""Perturbation AUC against its definition, and against models whose right answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.perturb import STEPS, make_fill
from faithmap.registry import get

SIDE = 12
AREAS = ("pos_auc", "neg_auc", "auc_d")


def score(model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    """Every score as `Scored`."""
    plugin = get("metric", "perturbation")
    found = plugin.make(plugin.check(params))(model, batch, maps)
    return {name: value if isinstance(value, Scored) else Scored(value) for name, value in found.items()}


def plateaus(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIDE, SIDE, generator=generator).mul(2).round()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["black", "mean", "blur"]), st.booleans())
def test_every_curve_is_its_definition(seed: int, fill: str, tied: bool) -> None:
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = slow.random_images(2, SIDE, seed)
    batch = slow.batch_of(
        model, images, labels=torch.tensor([1, 3]), grid=(3, 3), targets=torch.tensor([0, 2])
    )
    maps = plateaus(2, seed) if tied else torch.randn(2, SIDE, SIDE)
    found = score(model, batch, maps, fill=fill)
    colours, ties = make_fill(fill, images), batch.ties()
    assert colours is not None
    for i in range(2):
        colour = colours[i].expand(3, SIDE, SIDE)
        curves = [
            slow.perturbation_curves(model, images[i], (0, 2)[i], (1, 3)[i], signed, ties[i], colour, STEPS)
            for signed in (maps[i], -maps[i])
        ]
        for reading in ("", "@label", "@probability"):
            areas = [100 * slow.trapezoid(curve[reading], STEPS) for curve in curves]
            assert found[f"pos_auc{reading}"].values[i].item() == pytest.approx(areas[0], abs=1e-3)
            assert found[f"neg_auc{reading}"].values[i].item() == pytest.approx(areas[1], abs=1e-3)
            assert found[f"auc_d{reading}"].values[i].item() == pytest.approx(areas[1] - areas[0], abs=1e-3)
            stored = found[f"pos_auc{reading}"].curves
            assert stored is not None
            assert stored[i].tolist() == pytest.approx(curves[0][reading], abs=1e-5)


@pytest.mark.parametrize("fill", ["black", "noisy-linear"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_map_and_its_negative_exchange_their_curves_exactly(cnn: Model, fill: str, tied: bool) -> None:
    images = slow.random_images(3, 32)
    batch = slow.batch_of(cnn, images, labels=torch.tensor([0, 1, 2]), grid=(8, 8))
    maps = torch.randn(3, 32, 32)
    if tied:
        maps = maps.round().clamp(-1, 1)
        maps[2] = 0
    there, back = score(cnn, batch, maps, fill=fill), score(cnn, batch, -maps, fill=fill)
    for reading in ("", "@label", "@probability"):
        # The masked images are the same bit for bit, but stand at other places of a batch, which moves
        # the probabilities of some CPUs' kernels by a rounding. Hits do not move.
        slack = 1e-5 if reading == "@probability" else 0.0
        for one, other, sign in (
            ("pos_auc", "neg_auc", 1),
            ("neg_auc", "pos_auc", 1),
            ("auc_d", "auc_d", -1),
        ):
            expected = sign * back[other + reading].values
            torch.testing.assert_close(there[one + reading].values, expected, rtol=0, atol=slack)
    assert torch.equal(there["ties"].values, back["ties"].values)


def test_only_the_order_of_a_map_counts(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    maps = torch.randn(2, 32, 32).round()
    first, second = score(cnn, batch, maps), score(cnn, batch, maps.exp() * 3 - 7)
    assert all(torch.equal(first[name].values, second[name].values) for name in first)


def test_a_classifier_that_always_says_the_same_scores_the_level_of_chance() -> None:
    """One image of each of 1000 classes, one of them right at every share: 0.1% over a width of 0.9."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 1000))
    torch.nn.init.zeros_(module[1].weight)
    model = slow.model_of(module, 4)
    batch = slow.batch_of(model, slow.random_images(1000, 4), labels=torch.arange(1000), grid=(2, 2))
    found = score(model, batch, torch.rand(1000, 4, 4))
    assert float(found["pos_auc@label"].values.mean()) == pytest.approx(0.09, abs=1e-6)
    assert float(found["neg_auc@label"].values.mean()) == pytest.approx(0.09, abs=1e-6)
    assert bool((found["auc_d"].values == 0).all())


@pytest.fixture
def weights() -> Tensor:
    """Patch scores (4, 4), all different, of either sign."""
    return torch.linspace(-0.6, 2.4, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(2))].view(
        4, 4
    )


def _spread(patches: Tensor) -> Tensor:
    """A map (1, 16, 16) with one value a patch."""
    return patches.repeat_interleave(4, 0).repeat_interleave(4, 1).unsqueeze(0)


def _planted(weights: Tensor) -> tuple[Model, Batch]:
    model = Model(slow.PatchSum(weights, bar=7.0), mean=0.0, std=1.0, input_size=16, family="cnn")
    return model, slow.batch_of(model, torch.ones(1, 3, 16, 16), labels=torch.tensor([0]))


def test_planted_scores_give_the_curve_in_closed_form(weights: Tensor) -> None:
    model, batch = _planted(weights)
    found = score(model, batch, _spread(weights), span=1.0, steps=16)
    falling = weights.flatten().double().sort(descending=True).values
    total = falling.sum()
    removed = torch.cat([torch.zeros(1, dtype=torch.float64), falling.cumsum(0)])
    expected = torch.sigmoid(total - removed - 7.0)
    curve = found["pos_auc@probability"].curves
    assert curve is not None
    assert torch.allclose(curve[0].double(), expected, atol=1e-5)
    assert found["pos_auc@probability"].values.item() == pytest.approx(
        100 * slow.trapezoid(expected.tolist(), [i / 16 for i in range(17)]), abs=1e-3
    )


def test_the_planted_order_is_best_and_its_reverse_worst(weights: Tensor) -> None:
    model, batch = _planted(weights)
    oracle, worst = score(model, batch, _spread(weights)), score(model, batch, _spread(-weights))
    for draw in range(12):
        order = torch.rand(4, 4, generator=torch.Generator().manual_seed(draw))
        other = score(model, batch, _spread(order))
        for reading in ("", "@label", "@probability"):
            d = f"auc_d{reading}"
            assert worst[d].values.item() <= other[d].values.item() <= oracle[d].values.item()
    assert oracle["auc_d@probability"].values.item() > 0 > worst["auc_d@probability"].values.item()


def test_exchanging_any_two_neighbours_of_the_planted_order_costs(weights: Tensor) -> None:
    model, batch = _planted(weights)
    falling = weights.flatten().argsort(descending=True)

    def auc_d(order: Tensor) -> float:
        shown = torch.empty(16)
        shown[order] = torch.arange(16.0, 0.0, -1.0)
        # At sixteen steps one patch goes at a time, so that each exchange shows.
        found = score(model, batch, _spread(shown.view(4, 4)), span=1.0, steps=16)
        return found["auc_d@probability"].values.item()

    best = auc_d(falling)
    for i in range(15):
        exchanged = falling.clone()
        exchanged[[i, i + 1]] = falling[[i + 1, i]]
        assert auc_d(exchanged) < best


def test_bounds_and_units(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(4, 32), labels=torch.tensor([0, 1, 2, 3]), grid=(8, 8))
    found = score(cnn, batch, torch.randn(4, 32, 32))
    for name, scored in found.items():
        low, high = (-90, 90) if name.startswith("auc_d") else (0, 100 if name == "ties" else 90)
        assert ((low <= scored.values) & (scored.values <= high)).all(), name
    assert found["pos_auc"].values.dtype == torch.float64
    assert (found["pos_auc"].curves[:, 0] == 1).all()  # type: ignore[index]


def test_images_without_a_label_have_no_label_curve(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), labels=torch.tensor([0, -1, 2]), grid=(8, 8))
    found = score(cnn, batch, torch.randn(3, 32, 32))
    assert found["auc_d@label"].values.isnan().tolist() == [False, True, False]
    assert list(found["pos_auc@label"].reasons) == ["", "the image has no label", ""]
    assert not found["auc_d"].values.isnan().any()
    unlabelled = score(cnn, replace(batch, labels=None, cache={}), torch.randn(3, 32, 32))
    assert not any(name.endswith("@label") for name in unlabelled)


def test_the_clean_image_is_classified_once_for_all_maps(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    with cnn.counting() as meter:
        score(cnn, batch, torch.randn(2, 32, 32))
        score(cnn, batch, torch.randn(2, 32, 32))
    assert meter.forwards == 2 * 2 * 2 * 9


@pytest.mark.parametrize("fill", ["black", "mean", "blur", "noisy-linear"])
def test_an_image_scores_alike_in_any_company(model: Model, fill: str) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), labels=torch.tensor([0, 1, 2]), grid=(8, 8))
    maps = torch.randn(3, 32, 32).round()
    together, alone = (
        score(model, batch, maps, fill=fill),
        score(model, batch.select([1]), maps[1:2], fill=fill),
    )
    for name, scored in alone.items():
        assert scored.values[0].item() == pytest.approx(together[name].values[1].item(), abs=1e-3), name


def test_the_noise_of_the_fill_is_the_image_s_own(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    maps = torch.randn(2, 32, 32)
    first, again = (score(cnn, replace(batch, cache={}), maps, fill="noisy-linear") for _ in range(2))
    assert torch.equal(first["auc_d@probability"].values, again["auc_d@probability"].values)
    other = score(cnn, replace(batch, cache={}, seed=5), maps, fill="noisy-linear")
    assert not torch.equal(first["auc_d@probability"].values, other["auc_d@probability"].values)


def test_reduced_precision_gives_curves_in_float32(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    maps = torch.randn(2, 32, 32)
    full = score(cnn, batch, maps)["pos_auc@probability"]
    cnn.precision = "bf16"
    reduced = score(cnn, batch, maps)["pos_auc@probability"]
    assert reduced.curves is not None
    assert reduced.curves.dtype == torch.float32
    assert torch.allclose(reduced.values, full.values, atol=2.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fill": "grey"}, "unknown fill 'grey'"),
        ({"span": 0.0}, "'span': got 0.0, expected a share above 0"),
        ({"span": 1.5}, "'span': got 1.5"),
        ({"steps": 0}, "'steps': got 0, expected at least 1"),
    ],
)
def test_wrong_parameters_are_refused(cnn: Model, params: dict[str, object], message: str) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32), grid=(8, 8))
    with pytest.raises(RequestError, match=message):
        score(cnn, batch, torch.randn(1, 32, 32), **params)


@pytest.mark.parametrize("make", [lambda s: s, lambda s: s[:, :, :20]], ids=["square", "oblong"])
def test_images_of_another_size_than_the_models(cnn: Model, make: Callable[[Tensor], Tensor]) -> None:
    images = make(slow.random_images(1, 48))
    batch = slow.batch_of(cnn, images)
    found = score(cnn, batch, torch.randn(1, *images.shape[2:]), fill="noisy-linear")
    assert all(scored.values.isfinite().all() for scored in found.values())
