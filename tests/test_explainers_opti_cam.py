"""Opti-CAM against a slow rewrite from its paper and on networks whose evidence is planted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import make_batch
from planted_cells import Sensor, batch_of, explain, sensor
from torch import nn

import slow_bottleneck
from faithmap import registry
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.resize import upsample


def spots(weight: float = 10.0) -> tuple[Model, Batch]:
    """Red lights up in the upper left, green in the lower right; class 1 is seen in red alone."""
    head = nn.Linear(3 * 16, 2)
    weights = torch.zeros(2, 3, 4, 4)
    weights[1, 0] = weight
    weights[1, 1] = -weight
    head.weight.data = weights.flatten(1)
    head.bias.data.zero_()
    model = sensor(head)
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0, :8, :8] = 1.0
    images[:, 1, 8:, 8:] = 1.0
    return model, batch_of(model, images)


class TestOptiCAM:
    def test_starts_from_the_mean_of_the_channels(self, model: Model, batch: Batch) -> None:
        maps = explain("opti-cam", model, batch, iterations=0)
        mean = upsample(batch.activations().mean(1), batch.size)
        low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        assert torch.allclose(upsample(maps, batch.size), (mean - low) / (high - low), atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 4])
    def test_equals_the_paper_step_by_step(self, steps: int) -> None:
        torch.manual_seed(1)
        head = nn.Sequential(nn.Linear(3 * 16, 6), nn.Tanh(), nn.Linear(6, 3))
        nn.init.normal_(head[0].weight, std=0.8)
        model = sensor(head)
        batch = batch_of(model, torch.rand(2, 3, 16, 16))
        maps = explain("opti-cam", model, batch, iterations=steps, tolerance=0.0)
        twin = Sensor(nn.Sequential(nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3))).double()
        twin.load_state_dict(model.module.state_dict())
        for i in range(2):
            features = batch.activations()[i].double().numpy()
            u = slow_bottleneck.opti_cam(
                lambda x: twin(torch.tensor(x)[None])[0].detach().numpy(),
                1, batch.images[i].double().numpy(), features, steps, 0.1,
            )  # fmt: skip
            plane = slow_bottleneck.combined(u, features)
            mask = slow_bottleneck.enlarge(plane, batch.size)
            expected = (plane - mask.min()) / (mask.max() - mask.min())
            assert maps[i].numpy() == pytest.approx(expected, abs=1e-4)
            assert upsample(maps, batch.size)[i].amin() == pytest.approx(0, abs=1e-6)
            assert upsample(maps, batch.size)[i].amax() == pytest.approx(1, abs=1e-6)

    def test_one_step_of_adam_by_hand(self) -> None:
        # The first step of Adam is the rate in the direction of the slope, whatever its size.
        model, batch = spots()
        maps = explain("opti-cam", model, batch, iterations=1, learning_rate=0.3)
        ratio = float(maps[0, 3, 3] / maps[0, 0, 0])
        assert ratio == pytest.approx(math.exp(-0.6), rel=1e-4)

    def test_weight_goes_to_the_channel_that_covers_the_evidence(self) -> None:
        model, batch = spots()
        start = explain("opti-cam", model, batch, iterations=0)
        final = explain("opti-cam", model, batch)
        assert float(start[0, 3, 3]) == pytest.approx(1, abs=1e-5)
        assert float(final[0, 0, 0]) == pytest.approx(1, abs=1e-5) and float(final[0, 3, 3]) < 0.05

    @pytest.mark.parametrize(("score", "space"), [("logit", "pixel"), ("probability", "normalised")])
    def test_the_objective_rises(self, model: Model, batch: Batch, score: str, space: str) -> None:
        params = {"score": score, "space": space}
        colour = model.mean if space == "normalised" else torch.zeros_like(model.mean)

        def objective(maps: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits = model((batch.images - colour) * upsample(maps, batch.size).unsqueeze(1) + colour)
            values = logits if score == "logit" else logits.softmax(1)
            return values.gather(1, batch.targets.view(-1, 1)).squeeze(1)

        start = objective(explain("opti-cam", model, batch, iterations=0, **params))
        final = objective(explain("opti-cam", model, batch, iterations=10, **params))
        # Adam may overshoot on a single image, and the draws of the weights differ between processors.
        assert float((final - start).mean()) > 1e-5 and float((final >= start).float().mean()) > 0.5

    @pytest.mark.parametrize("together", [1, 2])
    def test_an_image_stops_by_itself(self, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # On a white image all cells are equal: S is constant, so is the score, and two passes tell.
        monkeypatch.setitem(
            registry.get("explainer", "opti-cam").target.__globals__, "_together", lambda _model: together
        )
        model, batch = spots()
        alone = explain("opti-cam", model, batch, iterations=9)
        both = batch_of(model, torch.cat([torch.ones(1, 3, 16, 16), batch.images]))
        with model.counting() as meter:
            maps = explain("opti-cam", model, both, iterations=9)
        assert (meter.forwards, meter.backwards) == (2 + 2 + 9, 2 + 9)
        assert not maps[0].any()
        assert torch.allclose(maps[1:], alone, atol=1e-6)

    def test_images_that_are_done_stay_as_they_are(self, cnn: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch(cnn, 3)
        alone = explain("opti-cam", cnn, batch, iterations=25, tolerance=1e-4)
        monkeypatch.setitem(
            registry.get("explainer", "opti-cam").target.__globals__, "_together", lambda _model: 3
        )
        with cnn.counting() as meter:
            together = explain("opti-cam", cnn, batch, iterations=25, tolerance=1e-4)
        assert meter.forwards < 3 * 26  # some stopped early
        assert float((alone - together).abs().max()) < 1e-3

    def test_a_map_is_the_same_in_any_batch_to_the_bit(self, model: Model, batch: Batch) -> None:
        together = explain("opti-cam", model, batch, iterations=12)
        for i in range(len(batch)):
            assert torch.equal(together[i], explain("opti-cam", model, batch.select([i]), iterations=12)[0])

    def test_a_loose_tolerance_stops_at_the_second_pass(self, model: Model, batch: Batch) -> None:
        with model.counting() as meter:
            maps = explain("opti-cam", model, batch, iterations=9, tolerance=1e9)
        assert meter.forwards == 3 * len(batch)
        assert torch.equal(maps, explain("opti-cam", model, batch, iterations=1))

    def test_reduced_precision_does_not_stop(self, cnn: Model) -> None:
        batch = make_batch(cnn, 2)
        cnn.precision = "bf16"
        with cnn.counting() as meter:
            explain("opti-cam", cnn, batch, iterations=6)
        assert meter.forwards == 2 * 7

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"score": "logits"}, "did you mean 'logit'"),
            ({"space": "pixels"}, "did you mean 'pixel'"),
            ({"iterations": -1}, "expected a count"),
            ({"learning_rate": 0.0}, "expected a count"),
            ({"tolerance": -1.0}, "expected a count"),
        ],
    )
    def test_senseless_settings_are_refused(self, cnn: Model, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            explain("opti-cam", cnn, make_batch(cnn, 1), **params)
