"""IBA against a slow rewrite from its paper and on networks whose evidence is planted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_batch
from planted_cells import batch_of, bright, explain, planted, sensor
from torch import nn

import slow_bottleneck
from faithmap import bottleneck, registry
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.records import canonical_json


class TestIBA:
    @pytest.mark.parametrize("statistics", ["zero", "image", "file"])
    @pytest.mark.parametrize("sigma", [0.0, 1.0])
    def test_equals_the_paper_step_by_step(self, statistics: str, sigma: float, tmp_path: Path) -> None:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(3 * 16, 6), nn.Tanh(), nn.Linear(6, 3))
        for layer in (head[0], head[2]):
            nn.init.normal_(layer.weight, std=0.8)
        model = sensor(head)
        batch = batch_of(model, torch.rand(2, 3, 16, 16))
        if statistics == "file":
            file = tmp_path / "s.safetensors"
            bottleneck.fit_statistics(model, [torch.rand(20, 3, 16, 16)]).save(file)
            statistics = str(file)
        params = {
            "statistics": statistics, "beta": 3.0, "iterations": 3, "samples": 2, "start": 2.0,
            "learning_rate": 0.7, "sigma": sigma,
        }  # fmt: skip
        maps = explain("iba", model, batch, **params)
        full = registry.get("explainer", "iba").check(params)
        seeded = batch.with_seed_key(canonical_json(["iba", full]))
        features = batch.activations()
        means, stds = bottleneck.reference(statistics, features, model)
        twin = nn.Sequential(*[nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3)]).double()
        twin.load_state_dict(head.state_dict())
        for i in range(2):
            generator = seeded.generator(i)
            noises = [torch.randn(2, 3, 4, 4, generator=generator).double().numpy() for _ in range(3)]
            mean, std = (
                value.expand_as(features)[i].double().numpy() for value in (means, stds.clamp_min(0.01))
            )
            expected = slow_bottleneck.iba(
                lambda z: twin(torch.tensor(z).flatten()[None])[0].detach().numpy(),
                1, features[i].double().numpy(), mean, std, noises,
                beta=3.0, sigma=sigma, rate=0.7, start=2.0,
            )  # fmt: skip
            assert maps[i].numpy() == pytest.approx(expected, rel=2e-3)

    @pytest.mark.parametrize("sigma", [0.0, 1.0])
    def test_information_passes_where_the_class_is(self, sigma: float) -> None:
        model = planted()
        maps = explain("iba", model, batch_of(model, bright()), sigma=sigma, iterations=20)
        inside = maps[:, :2, :2]
        assert float(inside.sum() / maps.sum()) > (0.99 if sigma == 0 else 0.75)
        assert float(inside.amin()) > 0.3
        assert float(maps[:, 3, 3].max()) < (0.01 if sigma == 0 else 0.02)

    def test_a_target_without_evidence_gets_no_information(self) -> None:
        model = planted()
        maps = explain("iba", model, batch_of(model, bright(), target=0), iterations=20)
        assert float(maps.max()) < 0.05

    def test_the_weight_of_information(self) -> None:
        model = planted()
        batch = batch_of(model, bright())
        none = explain("iba", model, batch, beta=1e6, iterations=20)
        assert float(none.sum((1, 2)).max()) < 1e-3
        features = batch.activations()
        start = torch.full_like(features, 5.0)
        mean, std = bottleneck.reference("zero", features, model)
        given = bottleneck.information((features - mean) / std, *bottleneck.gates(start, 0.0)).sum(1)
        everything = explain("iba", model, batch, beta=0.0, sigma=0.0)
        assert bool((everything[:, :2, :2] > given[:, :2, :2] / math.log(2)).all())
        # Features that the class does not depend on have no gradient at all and stay as they were.
        assert torch.allclose(everything[:, 2:], given[:, 2:] / math.log(2), rtol=1e-5)

    def test_noise_around_the_images_mean_hides_nothing_from_a_head_that_averages(self) -> None:
        head = nn.Sequential(
            nn.Unflatten(1, (3, 4, 4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        )
        torch.manual_seed(0)
        head[3].weight.data = torch.tensor([[0.0, 0, 0], [30, 0, 0]])
        head[3].bias.data = torch.tensor([0.0, -12])
        model = sensor(head)
        images = 0.05 * torch.rand(2, 3, 16, 16)
        images[:, 0, :8, :8] += 0.95
        images[:, 0, 8:, 8:] += 0.95
        batch = batch_of(model, images)
        blank = explain("iba", model, batch, statistics="image", sigma=0.0, iterations=20)
        seen = explain("iba", model, batch, statistics="zero", sigma=0.0, iterations=20)
        assert float(blank.sum((1, 2)).max()) < 0.1 * float(seen.sum((1, 2)).min())
        assert float((seen[:, :2, :2].sum() + seen[:, 2:, 2:].sum()) / seen.sum()) > 0.95

    def test_layers_before_the_target_layer(self, model: Model, batch: Batch) -> None:
        name = "stem" if model.family == "cnn" else "blocks.0"
        maps = explain("iba", model, batch, layer=name, iterations=2, samples=2)
        assert maps.shape[1:] == batch.activations(name).shape[2:] and bool((maps >= 0).all())

    def test_copies_that_do_not_fit_one_pass(self, cnn: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch(cnn, 3)
        whole = explain("iba", cnn, batch, iterations=3, samples=5, beta=0.1)
        monkeypatch.setattr("faithmap.perturb.chunk_size", lambda _model: 8)  # two copies a pass
        with cnn.counting() as meter:
            parts = explain("iba", cnn, batch, iterations=3, samples=5, beta=0.1)
        assert (meter.forwards, meter.backwards) == (3 * 16, 3 * 15)
        assert float((whole - parts).abs().max()) <= 1e-4 * float(whole.max() - whole.min())

    @pytest.mark.parametrize(
        "params",
        [
            {"iterations": 0},
            {"samples": 0},
            {"beta": -1.0},
            {"sigma": -1.0},
            {"learning_rate": 0.0},
            {"min_std": 0.0},
        ],
    )
    def test_senseless_settings_are_refused(self, cnn: Model, params: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match="expected at least one iteration"):
            explain("iba", cnn, make_batch(cnn, 1), **params)
