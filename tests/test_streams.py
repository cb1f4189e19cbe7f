"""The dual-stream bottleneck of InfoCAM (reconstruction): its parts, and a slow rewrite of all of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import planted_channels as scene
import pytest
import torch
from conftest import batch_of, draw, explain, inside, make_batch, make_cnn
from planted_channels import fitted
from torch import nn

import slow_infocam
from faithmap import bottleneck, cuts, registry, streams
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.cuts import cut_at
from faithmap.models import Model
from faithmap.plugin import FITTED
from faithmap.records import canonical_json
from faithmap.stream_bounds import StreamReport, belief_divergence, stream_report
from faithmap.streams import Gates

QUICK = {"iterations": 4, "samples": 4, "prior_samples": 4}


class TestParts:
    def test_the_divergence_equals_an_integral(self) -> None:
        grid = np.linspace(-14, 14, 400_001)
        for alpha, r in ((0.3, 1.7), (-2.0, 3.0), (2.5, -0.4), (-6.0, 0.0)):
            share = slow_infocam.sigmoid(alpha)
            for sign, keep in ((1, share), (-1, 1 - share)):  # both streams
                centre, spread = keep * r, 1 - keep
                given = -0.5 * ((grid - centre) / spread) ** 2 - math.log(spread * math.sqrt(2 * math.pi))
                alone = -0.5 * grid**2 - math.log(math.sqrt(2 * math.pi))
                exact = float(np.trapezoid(np.exp(given) * (given - alone), grid))
                found = streams.divergence(torch.tensor(sign * alpha).double(), torch.tensor(r).double())
                assert float(found) == pytest.approx(exact, abs=1e-6)

    def test_the_divergence_keeps_its_digits(self) -> None:
        alpha = torch.linspace(-30, 30, 241)
        found = streams.divergence(alpha, torch.tensor(1.3))
        exact = streams.divergence(alpha.double(), torch.tensor(1.3).double())
        assert bool(torch.isfinite(found).all()) and float(found.min()) > -1e-12
        middle = (alpha > -8) & (alpha < 8)
        assert torch.allclose(found[middle].double(), exact[middle], rtol=1e-3)
        assert bool((found[middle][1:] >= found[middle][:-1]).all())
        usual = bottleneck.information(
            torch.tensor(1.3).double(), alpha.double().sigmoid(), (-alpha.double()).sigmoid()
        )
        assert torch.allclose(exact, usual, atol=1e-9)
        shut = torch.tensor(-torch.inf)
        assert float(streams.divergence(shut, torch.tensor(5.0))) == 0

    def test_log_odds_and_what_is_told(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, targets = 3 * torch.randn(50, 4, generator=generator), torch.arange(50) % 4
        scores = streams.log_odds(logits, targets)
        p = logits.softmax(1).gather(1, targets.view(-1, 1)).squeeze(1)
        assert torch.allclose(scores.sigmoid(), p, atol=1e-6)
        assert torch.allclose(streams.log_odds(logits + 7.0, targets), scores, atol=1e-5)
        prior = torch.full_like(scores, -0.5)
        expected = [slow_infocam.told(float(score), -0.5) for score in scores]
        assert streams.told(scores, prior).numpy() == pytest.approx(expected, abs=1e-6)
        assert expected.count(0.0) > 5 and max(expected) > 0.5

    def test_what_is_told_has_a_gradient_where_the_head_is_sure(self) -> None:
        score = torch.tensor([40.0, 2.0, -3.0], requires_grad=True)
        prior = torch.tensor([-1.0, -1.0, -1.0])
        (gradient,) = torch.autograd.grad(streams.told(score, prior).sum(), score)
        pi = slow_infocam.sigmoid(-1.0)
        assert gradient.tolist() == pytest.approx([1 - pi, slow_infocam.sigmoid(2.0) - pi, 0.0], abs=1e-6)

    def test_gates_of_each_kind(self) -> None:
        model = scene.planted()
        features, _ = fitted(model, scene.planted_batch(model, 2), prior_samples=2, iterations=1, samples=2)
        generator = torch.Generator().manual_seed(0)
        for kind in streams.KINDS:
            start = Gates.start(kind, features, 0.0)
            gates = Gates(kind, torch.randn(start.alpha.shape, generator=generator))
            for i in range(2):
                arrays = [t[i].double().numpy() for t in (features.values, features.mean, features.std)]
                share = slow_infocam.opened(kind, gates.alpha[i].double().numpy(), *arrays[:2])
                assert gates.passed(features)[i].numpy() == pytest.approx(share, abs=1e-6)
                assert gates.nats(features)[i].numpy() == pytest.approx(
                    slow_infocam.nats(*arrays, share), abs=1e-4
                )

    def test_the_streams_share_the_features(self) -> None:
        model = scene.planted()
        features, gates = fitted(model, scene.planted_batch(model, 2), **QUICK)
        centre, spread = gates.streams(features)
        assert torch.allclose(centre.sum(1), features.values + features.mean, atol=1e-5)
        assert torch.allclose(spread.sum(1), features.std, atol=1e-6)

    def test_a_shut_gate_hides_the_image_and_an_open_one_shows_it(self, model: Model) -> None:
        batch = make_batch(model, 2)
        cut = cut_at(model)
        output = batch.context.outputs(cut.layer)
        features = streams.with_noise(model, cut, output, batch.targets, "zero", min_std=0.01, min_active=0.0)
        from faithmap.cuts import NetworkTail

        tail = NetworkTail(model, cut)
        opened, spread = Gates.start("channel", features, torch.inf).streams(features)
        assert not (spread[:, 0] * features.alive).any()
        assert torch.allclose(tail.logits(opened[:, 0]), batch.logits, atol=1e-5)
        same = features.select(torch.tensor([0, 0]))  # one noise for both images
        mixed = Gates.start("channel", same, -torch.inf).streams(
            streams.Features(features.values, same.mean, same.std, same.alive, same.targets)
        )
        blind = tail.logits(mixed[0][:, 0] + mixed[1][:, 0])
        assert torch.allclose(blind[0], blind[1], atol=1e-6)

    @pytest.mark.parametrize("squares", [0.0, 0.3, 1.0, 50.0])
    def test_the_gates_equation_is_solved(self, squares: float) -> None:
        gains = torch.tensor([0.0, 1e-6, 1e-3, 0.2, 1.0, 2.0, 3.0, 40.0, 1e4, 1e6], dtype=torch.float64)
        found = streams.solved(gains, torch.full_like(gains, 0.5), torch.full_like(gains, squares), 4.0)
        expected = [slow_infocam.halved(gain / 2, squares) if gain else 0.0 for gain in gains.tolist()]
        assert found.numpy() == pytest.approx(expected, abs=1e-9)
        none = streams.solved(gains, torch.zeros_like(gains), torch.ones_like(gains), 4.0)
        assert not none.any()


class TestReport:
    """Bounds a to c of what gates come to."""

    def found(self, model: Model, batch: Batch, **params: Any) -> StreamReport:
        infocam = registry.get("explainer", "infocam").make(params)
        report: StreamReport = infocam.report(model, batch, samples=2000)  # type: ignore[attr-defined]
        return report

    @pytest.mark.parametrize("kind", streams.KINDS)
    def test_equals_the_slow_rewrite(self, kind: str) -> None:
        model, batch = sensor()
        features, _ = fitted(model, batch, **QUICK)
        alpha = Gates.start(kind, features, 0.0).alpha
        gates = Gates(kind, torch.randn(alpha.shape, generator=torch.Generator().manual_seed(2)))
        tail = cuts.tail_of(model, cut_at(model))
        generators = [batch.generator(i) for i in range(2)]
        report = stream_report(tail, features, gates, generators, samples=6, chunk=5)
        for i in range(2):
            slow, arrays = TestReference.parts(model, features, i)
            share = slow_infocam.opened(kind, gates.alpha[i].double().numpy(), *arrays[:2])
            draws = torch.randn(2, 3, *arrays[0].shape, generator=batch.generator(i)).double().numpy()
            expected = slow_infocam.report(slow, int(batch.targets[i]), *arrays, share, draws[0], draws[1])
            for name, value in expected.items():
                assert float(getattr(report, name)[i]) == pytest.approx(value, rel=1e-4, abs=1e-5)
            assert 0 <= expected["leak"] <= expected["bound"] and expected["bound"] > 0

    def test_a_divergence_of_beliefs(self) -> None:
        scores, prior = torch.linspace(-30, 30, 61), torch.tensor(-0.7)
        found = belief_divergence(scores, prior)
        expected = [slow_infocam.belief_divergence(float(s), -0.7) for s in scores]
        assert found.numpy() == pytest.approx(expected, abs=1e-5)
        assert float(belief_divergence(prior, prior)) == 0 and float(found.min()) >= 0
        assert float(found[-1]) == pytest.approx(-math.log(slow_infocam.sigmoid(-0.7)), abs=1e-5)

    def test_known_answers(self, model: Model) -> None:
        """Gates that are open pass the image and leave noise; gates that are shut do the opposite."""
        batch = make_batch(model, 2)
        cut = cut_at(model)
        output = batch.context.outputs(cut.layer)
        features = streams.with_noise(model, cut, output, batch.targets, "zero", min_std=0.01, min_active=0.0)
        clean = torch.nn.functional.cross_entropy(batch.logits, batch.targets, reduction="none")

        def report(alpha: float) -> StreamReport:
            generators = [batch.generator(i) for i in range(2)]
            gates = Gates.start("channel", features, alpha)
            return stream_report(cuts.tail_of(model, cut), features, gates, generators, samples=8, chunk=7)

        shut, opened = report(-torch.inf), report(60.0)
        assert torch.allclose(shut.kept, shut.noise) and not shut.information.any()
        assert torch.allclose(opened.kept, clean, atol=1e-5)
        for one in (shut, opened):
            assert torch.allclose(one.clean, clean, atol=1e-5)
            assert bool((one.leak <= one.bound + 1e-7).all())
        untouched = streams.log_odds(batch.logits, batch.targets)
        still = belief_divergence(untouched, self.prior(model, features, batch))
        # Channels that are never active are noise in both streams, so that not quite the image is left.
        assert not features.alive.all() or torch.allclose(shut.bound, still, atol=1e-4)

    @staticmethod
    def prior(model: Model, features: streams.Features, batch: Batch) -> torch.Tensor:
        tail = cuts.tail_of(model, cut_at(model))
        drawn = streams.signed_pairs(
            [batch.generator(i) for i in range(2)], (2, 4, *tail.shape), features.values
        )
        alone = tail.summarise(features.mean, features.std)
        with torch.no_grad():
            return streams.noisy_odds(tail, *alone, drawn[:, 0], features.targets, 9).mean(1)

    def test_much_beta_leaves_noise_and_little_beta_the_features(self) -> None:
        """Section 4.7, test 2."""
        model = scene.planted(gain=4.0)  # a head that is not yet sure
        batch = scene.planted_batch(model, 4)
        much = self.found(model, batch, beta=1e4)
        assert torch.allclose(much.kept, much.noise, atol=0.05)
        assert bool((much.kept > much.clean + 0.5).all())
        little = self.found(model, batch, beta=1e-3, gamma=0.0)
        assert bool((little.kept <= little.clean).all())

    def test_the_noise_stream_loses_what_gamma_asks_for(self) -> None:
        model = scene.planted(gain=36.0)  # one or two channels suffice
        batch = scene.planted_batch(model, 4)
        without, necessary = (self.found(model, batch, gamma=gamma) for gamma in (0.0, 1.0))
        assert bool((necessary.leak < 0.1).all())
        assert bool((without.leak > 0.3).all())


class Sensor(nn.Module):
    """Cell means of the colours, then a small network that reads all cells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.AvgPool2d(4)
        self.head = nn.Sequential(nn.Linear(3 * 4, 5), nn.Tanh(), nn.Linear(5, 3))
        for layer in (self.head[0], self.head[2]):
            nn.init.normal_(layer.weight, std=1.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(images).flatten(1))
        return logits


def sensor() -> tuple[Model, Batch]:
    model = Model(Sensor(), mean=0.3, std=0.2, input_size=8, name="sensor", target_layer="body")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, Batch(images, torch.tensor([1, 2]), ("a", "b"), Context(model, images))


class TestReference:
    @pytest.mark.parametrize("kind", ["channel", "half", "element"])
    @pytest.mark.parametrize("statistics", ["zero", "file"])
    def test_equals_the_slow_rewrite_step_by_step(self, kind: str, statistics: str, tmp_path: Path) -> None:
        model, batch = sensor()
        if statistics == "file":
            images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
            statistics = str(bottleneck.fit_statistics(model, [images]).save(tmp_path / "s.safetensors"))
        params = {
            "mode": "element" if kind == "element" else "channel", "halves": kind == "half", "beta": 0.7,
            "gamma": 1.5, "iterations": 3, "samples": 4, "prior_samples": 6, "statistics": statistics,
        }  # fmt: skip
        features, gates = fitted(model, batch, **params)
        for i in range(2):
            tail, (values, mean, std) = self.parts(model, features, i)
            generator, target = batch.generator(i), int(batch.targets[i])
            prior = self.prior(tail, target, mean, std, generator, 6)
            draws = [torch.randn(2, 2, *values.shape, generator=generator).double().numpy() for _ in range(3)]
            expected = slow_infocam.optimised(
                tail, target, values, mean, std, kind, np.zeros(gates.alpha[i].shape),
                [(one[0], one[1]) for one in draws], prior,
                beta=0.7, gamma=1.5, rate=1.0 if kind == "element" else 0.5,
            )  # fmt: skip
            assert gates.alpha[i].numpy() == pytest.approx(expected, rel=2e-3, abs=2e-3)

    def test_the_mean_field_equals_the_slow_rewrite(self) -> None:
        model, batch = sensor()
        features, gates = fitted(
            model, batch, mode="mean-field", halves=False, beta=0.2, contexts=3, prior_samples=6
        )
        for i in range(2):
            tail, (values, mean, std) = self.parts(model, features, i)
            generator, target = batch.generator(i), int(batch.targets[i])
            prior = self.prior(tail, target, mean, std, generator, 6)
            coins = (torch.rand(3, 3, generator=generator) < 0.5).numpy()
            noises = torch.randn(3, *values.shape, generator=generator).double().numpy()
            expected = slow_infocam.mean_field(
                tail, target, values, mean, std, coins, noises, prior, 0.2, 1.0
            )
            assert gates.alpha[i].sigmoid().numpy() == pytest.approx(expected, abs=1e-4)
            assert expected.max() > 0.1

    @staticmethod
    def parts(model: Model, features: streams.Features, i: int) -> tuple[Any, list[np.ndarray]]:
        twin = Sensor().double()
        twin.load_state_dict(model.module.state_dict())

        def tail(z: np.ndarray) -> np.ndarray:
            logits: np.ndarray = twin.head(torch.tensor(z).flatten()[None])[0].detach().numpy()
            return logits

        return tail, [t[i].double().numpy() for t in (features.values, features.mean, features.std)]

    @staticmethod
    def prior(
        tail: Any, target: int, mean: np.ndarray, std: np.ndarray, generator: torch.Generator, count: int
    ) -> float:
        noise = torch.randn(count, *mean.shape, generator=generator).double().numpy()
        return float(np.mean([slow_infocam.log_odds(tail(mean + std * e), target) for e in noise]))

    @pytest.mark.parametrize("weight", ["info", "gate"])
    @pytest.mark.parametrize("kind", ["channel", "half"])
    def test_maps_from_gates(self, kind: str, weight: str, tmp_path: Path) -> None:
        model, batch = sensor()
        images = 0.7 * torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 0.16
        file = str(bottleneck.fit_statistics(model, [images]).save(tmp_path / "s.safetensors"))
        params = {
            "mode": "channel", "halves": kind == "half", "beta": 0.1, "weight": weight, "statistics": file,
            **QUICK,
        }  # fmt: skip
        full = registry.get("explainer", "infocam").check(params)
        full.pop(FITTED)  # how a fit is named is no part of the seeds
        seeded = batch.with_seed_key(canonical_json(["infocam", full]))
        for picture in ("A_plus",) if kind == "half" else ("A", "A_plus"):  # two gates have no map "A"
            full["map"] = params["map"] = picture
            seeded = batch.with_seed_key(canonical_json(["infocam", full]))
            maps = explain("infocam", model, batch, **params)
            features, gates = fitted(model, seeded, **params)
            for i in range(2):
                values, mean = features.values[i].double().numpy(), features.mean[i].double().numpy()
                assert 0 < sum(values.mean(1) > mean.mean(1)) < 3  # one channel at least is absent
                carried = (
                    (gates.nats(features) if weight == "info" else gates.passed(features))[i].double().numpy()
                )
                expected = (
                    slow_infocam.half_map(values, mean, carried) if kind == "half"
                    else slow_infocam.channel_map(values, mean, carried, excess=picture == "A_plus")
                )  # fmt: skip
                assert maps[i].flatten().numpy() == pytest.approx(expected, abs=1e-5)


class TestInformationBottleneck:
    """With gamma 0 and beta 10, gates of elements are IBA's masks without smoothing."""

    def test_the_loss_is_that_of_iba(self) -> None:
        """The log-odds of one class against the others have the cross-entropy of all classes."""
        logits, targets = (
            3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0)),
            torch.arange(20) % 4,
        )
        usual = nn.functional.cross_entropy(logits, targets, reduction="none")
        assert torch.allclose(nn.functional.softplus(-streams.log_odds(logits, targets)), usual, atol=1e-5)

    @pytest.mark.parametrize("beta", [10.0, 0.5])
    def test_the_map_is_that_of_iba(self, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the same start and the same draws, which iba does not take in pairs of opposite sign."""
        model = make_cnn()
        batch = batch_of(model)
        layer = "stem"  # of which no channel is zero everywhere: iba keeps those, infocam shuts them
        assert bool(batch.activations(layer).flatten(2).any(2).all())
        shape = batch.activations(layer).shape[1:]
        half = [draw(2, 3, *shape, seed=step).float() for step in range(10)]
        steps = iter(half)
        monkeypatch.setattr(
            streams,
            "_normal",
            lambda *_: next(steps).flatten(3).unsqueeze(1),  # (n, one stream, 3, K, N)
        )
        found = explain(
            "infocam", model, batch, layer=layer, mode="element", map="density", gamma=0.0, beta=beta,
            start=5.0, iterations=10, samples=6, min_nats=0.0,
        )  # fmt: skip
        iba, again = inside("iba"), iter(half)
        gradient = iba._gradient

        def with_same_draws(model: Any, here: Any, alpha: Any, noise: Any, **more: Any) -> torch.Tensor:
            drawn = next(again)
            result: torch.Tensor = gradient(model, here, alpha, torch.cat([drawn, -drawn], 1), **more)
            return result

        monkeypatch.setattr(iba, "_gradient", with_same_draws)
        bits = explain("iba", model, batch, layer=layer, sigma=0.0, beta=beta, samples=6)
        assert bool((bits > 0).any())
        assert torch.allclose(found, bits * math.log(2), rtol=1e-3, atol=1e-5)
