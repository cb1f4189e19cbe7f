"""ROAD against its definition with an exact solve, against pytorch-grad-cam, and in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import slow_metrics as slow
import slow_metrics_removal as removal
from faithmap import perturb
from faithmap.batch import Batch, Scored, seed_of
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.registry import default_metrics, get
from faithmap.removal import NOISE

SIDE = 16
READINGS = ("", "@label", "@probability")


def score(model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", "road")
    found: dict[str, Scored] = plugin.make(plugin.check(params))(model, batch, maps)
    return found


def smooth(count: int, side: int, seed: int = 0) -> Tensor:
    """Images without sharp edges, on which the approximate solution is closest to the exact one."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False).clamp(0.05, 0.95)


def filled_exactly(images: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
    """`perturb.noisy_linear` by a direct solve, image by image."""
    made = []
    for image, stays, added in zip(images, keep[:, 0], noise.expand(images.shape), strict=True):
        filled = slow.noisy_linear_exact(image, stays).float()
        made.append(torch.where(stays, filled, (filled + added).clamp(0, 1)))
    return torch.stack(made)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(20, 40, 60, 80), (10, 90), (35,)]), st.booleans())
def test_every_score_is_its_definition(seed: int, percentiles: tuple[int, ...], tied: bool) -> None:
    """With the fill solved exactly; how far off the metric's own is, test_perturb.py says."""
    with mock.patch.object(perturb, "noisy_linear", filled_exactly):
        is_defined(seed, percentiles, tied, dict.fromkeys(READINGS, 1e-3))


@pytest.mark.parametrize("seed", range(3))
def test_the_approximate_fill_moves_scores_by_little(seed: int) -> None:
    """Where two classes are level, a small error of the fill may turn the decision of a step."""
    is_defined(seed, (20, 40, 60, 80), False, {"": 25.001, "@label": 25.001, "@probability": 1.5})


def is_defined(seed: int, percentiles: tuple[int, ...], tied: bool, slack: Mapping[str, float]) -> None:
    """Every reading of both orders is that of the slow rewrite, up to its slack."""
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = smooth(2, SIDE, seed)
    targets, labels = torch.tensor([0, 2]), torch.tensor([1, 3])
    batch = replace(slow.batch_of(model, images, labels=labels, grid=(4, 4), targets=targets), seed=seed)
    maps = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    maps = maps.round() if tied else maps
    found = score(model, batch, maps, percentiles=percentiles)
    for i in range(2):
        generator = torch.Generator().manual_seed(seed_of(seed, "fill", batch.ids[i]))
        noise = NOISE * torch.randn(3, SIDE, SIDE, generator=generator)
        curves = [
            removal.road_curves(
                model, images[i], int(targets[i]), int(labels[i]),
                slow.removal_order(signed, batch.ties()[i]), percentiles, noise,
            )
            for signed in (maps[i], -maps[i])
        ]  # fmt: skip
        for reading in READINGS:
            morf, lerf = (100 * float(np.mean(curve[reading])) for curve in curves)
            for name, expected in (("road_morf", morf), ("road_lerf", lerf)):
                assert found[name + reading].values[i].item() == pytest.approx(expected, abs=slack[reading])
                stored = found[name + reading].curves
                assert stored is not None and stored.shape == (2, len(percentiles))
                assert 100 * stored[i].double().mean() == pytest.approx(found[name + reading].values[i])
            gap = found[f"road_lerf{reading}"].values[i] - found[f"road_morf{reading}"].values[i]
            assert torch.equal(found[f"road{reading}"].values[i], gap)


def test_decisions_are_mostly_those_of_the_exact_solution() -> None:
    """Decision for decision: what the slack of the test above could hide."""
    model, apart = slow.model_of(slow.Glance(seed=3), SIDE), 0
    images, maps = smooth(6, SIDE, 5), torch.randn(6, SIDE, SIDE)
    batch = slow.batch_of(model, images, grid=(4, 4))
    found = score(model, batch, maps, noise=0.0)
    for i in range(6):
        for name, signed in (("road_morf", maps[i]), ("road_lerf", -maps[i])):
            order = slow.removal_order(signed, batch.ties()[i])
            exact = removal.road_curves(
                model, images[i], 0, 0, order, (20, 40, 60, 80), torch.zeros(3, SIDE, SIDE)
            )
            assert found[name].curves is not None
            apart += sum(a != b for a, b in zip(found[name].curves[i].tolist(), exact[""], strict=True))
    assert apart <= 1  # of 48


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # its torch tensors within numpy
def test_it_is_pytorch_grad_cam_s_times_two_hundred(cnn: Model) -> None:
    """Its parts with noise switched off, then its combined score with its own, unseeded, noise."""
    from pytorch_grad_cam.metrics.perturbation_confidence import (
        PerturbationConfidenceMetric,
        RemoveLeastRelevantFirst,
        RemoveMostRelevantFirst,
    )
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    for parameter in cnn.parameters():
        parameter.data.mul_(3)  # so that the curves move
    # 16 x 16 pixels: its percentiles then remove as many pixels as ours.
    images, maps = smooth(3, SIDE), torch.rand(3, SIDE, SIDE)
    batch = slow.batch_of(cnn, images, grid=(8, 8))
    targets = [ClassifierOutputSoftmaxTarget(int(target)) for target in batch.targets]
    found = score(cnn, batch, maps, noise=0.0)
    for name, remove in (("road_morf", RemoveMostRelevantFirst), ("road_lerf", RemoveLeastRelevantFirst)):
        theirs = [
            PerturbationConfidenceMetric(remove(percentile, NoisyLinearImputer(noise=0.0)))(
                images, maps.numpy(), targets, cnn, return_diff=False
            )
            for percentile in (80, 60, 40, 20)  # what it keeps
        ]
        curves = found[f"{name}@probability"].curves
        assert curves is not None
        assert np.ptp(theirs, axis=0).max() > 0.02  # the curves move by more than the two may differ
        assert np.abs(curves.numpy().T - np.array(theirs)).max() < 5e-3
    combined = ROADCombined(percentiles=[20, 40, 60, 80])(images, maps.numpy(), targets, cnn)
    ours = found["road@probability"].values.numpy()
    assert np.abs(200 * combined - ours).max() < 1.5


def test_a_map_and_its_negative_exchange_the_two_orders(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), labels=torch.tensor([0, 1, 2]), grid=(8, 8))
    maps = torch.randn(3, 32, 32).round()
    there, back = score(cnn, batch, maps), score(cnn, batch, -maps)
    for reading in READINGS:
        slack = 1e-3 if reading == "@probability" else 0.0
        for one, other, sign in (("road_morf", "road_lerf", 1), ("road", "road", -1)):
            expected = sign * back[other + reading].values
            torch.testing.assert_close(there[one + reading].values, expected, rtol=0, atol=slack)


def test_an_image_of_one_colour_cannot_be_told_from_its_fill(cnn: Model) -> None:
    images = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1).expand(-1, 3, 32, 32).clone()
    batch = slow.batch_of(cnn, images, grid=(8, 8))
    found = score(cnn, batch, torch.rand(3, 32, 32), noise=0.0)
    clean = 100 * batch.logits.softmax(1).amax(1).double()
    for name in ("road_morf", "road_lerf"):
        assert found[name].values.tolist() == [100] * 3
        torch.testing.assert_close(found[f"{name}@probability"].values, clean, rtol=0, atol=1e-2)
    assert found["road"].values.tolist() == [0] * 3


def test_the_planted_order_beats_others() -> None:
    weights = torch.linspace(-0.6, 2.4, 16)[torch.randperm(16)].view(4, 4)
    model = Model(slow.PatchSum(weights, bar=7.0), mean=0.0, std=1.0, input_size=32, family="cnn")
    # Bright where the weight is: what is filled in from around it says less.
    spread = weights.repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = (spread > 0.9).float().expand(1, 3, -1, -1).clone()
    batch = slow.batch_of(model, image, targets=torch.tensor([0]))
    best = score(model, batch, spread[None])["road@probability"].values
    for seed in range(4):
        other = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(seed))
        assert score(model, batch, other)["road@probability"].values < best
    assert score(model, batch, -spread[None])["road@probability"].values < -best / 2


def test_labels_are_asked_only_where_there_are_any(cnn: Model) -> None:
    images, maps = slow.random_images(2, 32), torch.rand(2, 32, 32)
    bare = score(cnn, slow.batch_of(cnn, images), maps)
    assert set(bare) == {
        "road", "road_morf", "road_lerf",
        "road@probability", "road_morf@probability", "road_lerf@probability",
    }  # fmt: skip
    found = score(cnn, slow.batch_of(cnn, images, labels=torch.tensor([0, -1])), maps)
    for name in ("road@label", "road_morf@label", "road_lerf@label"):
        assert found[name].values.isnan().tolist() == [False, True]
        assert list(found[name].reasons) == ["", "the image has no label"]


def test_passes_are_counted_and_noise_is_the_image_s_own(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    _ = batch.logits
    maps = torch.randn(3, 32, 32)
    with model.counting() as meter:
        together = score(model, batch, maps)
    assert (meter.forwards, meter.backwards) == (3 * 2 * 4, 0)
    alone = score(model, batch.select([1]), maps[1:2])
    other = score(model, replace(batch, seed=1, cache={}), maps)
    name = "road_morf@probability"
    assert alone[name].values[0].item() == pytest.approx(together[name].values[1].item(), abs=1e-3)
    assert not torch.equal(other[name].values, together[name].values)
    assert "road" not in {plugin.name for plugin in default_metrics()}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"percentiles": ()}, r"'percentiles': got \[\], expected percentages above 0"),
        ({"percentiles": (0, 50)}, r"'percentiles': got \[0, 50\]"),
        ({"percentiles": (50, 101)}, r"'percentiles': got \[50, 101\]"),
        ({"percentiles": ("many",)}, r"'percentiles': got \['many'\]"),
        ({"noise": -0.1}, "'noise': got -0.1, expected a number of at least 0"),
        ({"noise": float("nan")}, "'noise': got nan"),
    ],
)
def test_wrong_parameters_are_refused(cnn: Model, params: dict[str, object], message: str) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32))
    with pytest.raises(RequestError, match=message):
        score(cnn, batch, torch.rand(1, 32, 32), **params)
