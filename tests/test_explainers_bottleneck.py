"""IBA and Opti-CAM against slow rewrites from their papers and on networks whose evidence is planted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from torch import nn

import slow_bottleneck
from faithmap import bottleneck, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import HOOK_KINDS, bind
from faithmap.models import Model
from faithmap.records import canonical_json
from faithmap.resize import upsample


def explain(name: str, model: Model, batch: Batch, **params: Any) -> torch.Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch.select(range(len(batch))))


class Sensor(nn.Module):
    """Features are cell means of the channels; a linear head, or a small network, reads the cells."""

    def __init__(self, head: nn.Module, cell: int = 4) -> None:
        super().__init__()
        self.body = nn.AvgPool2d(cell)
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(images).flatten(1))
        return logits


def sensor(head: nn.Module, side: int = 16, cell: int = 4) -> Model:
    return Model(Sensor(head, cell), mean=0.0, std=1.0, input_size=side, name="sensor", target_layer="body")


def planted(gain: float = 20.0) -> Model:
    """Class 1 is seen in the red of the four cells in the upper left, and nowhere else."""
    head = nn.Linear(3 * 16, 2)
    weight = torch.zeros(2, 3, 4, 4)
    weight[1, 0, :2, :2] = gain / 4
    head.weight.data = weight.flatten(1)
    head.bias.data = torch.tensor([0.0, -gain / 2])
    return sensor(head)


def batch_of(model: Model, images: torch.Tensor, target: int = 1) -> Batch:
    ids = tuple(f"image-{i}" for i in range(len(images)))
    return Batch(images, torch.full((len(images),), target), ids, Context(model, images))


def bright(count: int = 2, side: int = 16) -> torch.Tensor:
    """Noise around light grey."""
    return 0.8 + 0.2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


class TestParts:
    @pytest.mark.parametrize("sigma", [0.4, 1.0, 1.7])
    def test_smoothing_equals_the_published_kernel(self, sigma: float) -> None:
        plane = np.random.default_rng(0).random((9, 7))
        rows, columns = (bottleneck.smoothing_matrix(n, sigma).double().numpy() for n in plane.shape)
        assert rows @ plane @ columns.T == pytest.approx(slow_bottleneck.smooth(plane, sigma), abs=1e-6)
        kernel = slow_bottleneck.kernel(sigma)
        assert kernel.shape == (2 * round(2 * sigma) + 1,) * 2
        assert np.outer(rows[4], columns[3])[4 - len(kernel) // 2 : 5 + len(kernel) // 2].max() == (
            pytest.approx(kernel.max(), rel=1e-6)
        )

    def test_the_kernel_of_sigma_one_by_hand(self) -> None:
        bell = np.exp(-0.5 * np.array([4.0, 1, 0, 1, 4]))
        assert bottleneck.smoothing_matrix(7, 1.0)[3].numpy() == pytest.approx(
            [0, *(bell / bell.sum()), 0], abs=1e-7
        )
        # At the border the two cells beyond it are the second and third, seen in a mirror.
        first = np.array([bell[2], 2 * bell[1], 2 * bell[0]]) / bell.sum()
        assert bottleneck.smoothing_matrix(7, 1.0)[0, :4].numpy() == pytest.approx([*first, 0], abs=1e-7)

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_short_axes_keep_what_they_hold(self, length: int) -> None:
        matrix = bottleneck.smoothing_matrix(length, 1.0)
        assert matrix.sum(1).numpy() == pytest.approx(np.ones(length), abs=1e-6)

    def test_gates_are_complements_and_keep_their_digits(self) -> None:
        alpha = torch.linspace(-40, 40, 8 * 6).view(1, 8, 6)
        passed, damped = bottleneck.gates(alpha, 1.0)
        assert (passed + damped).numpy() == pytest.approx(np.ones((1, 8, 6)), abs=1e-6)
        passed, damped = bottleneck.gates(torch.full((2, 5, 5), 30.0), 1.0)
        assert damped.numpy() == pytest.approx(np.full((2, 5, 5), math.exp(-30)), rel=1e-5)
        assert bool(torch.isfinite(bottleneck.information(torch.ones(2, 5, 5), passed, damped)).all())

    def test_information_equals_the_papers_divergence(self) -> None:
        generator = np.random.default_rng(1)
        features, mean, std = generator.normal(size=(3, 50)) * 3
        std, share = np.abs(std) + 0.1, generator.random(50)
        expected = [slow_bottleneck.divergence(*one) for one in zip(features, mean, std, share, strict=True)]
        normed, passed = torch.tensor((features - mean) / std), torch.tensor(share)
        assert bottleneck.information(normed, passed, 1 - passed).numpy() == pytest.approx(expected, rel=1e-9)

    def test_the_divergence_equals_an_integral(self) -> None:
        grid = np.linspace(-12, 12, 200_001)

        def density(centre: float, spread: float) -> np.ndarray:
            return np.exp(-0.5 * ((grid - centre) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))

        for feature, share in ((1.7, 0.3), (-0.4, 0.8)):
            given, alone = density(share * feature, 1 - share), density(0.0, 1.0)
            integrand = given * (np.log(given + 1e-300) - np.log(alone))
            assert slow_bottleneck.divergence(feature, 0, 1, share) == pytest.approx(
                float(np.trapezoid(integrand, grid)), abs=1e-6
            )

    def test_no_share_no_information(self) -> None:
        zero, one = torch.zeros(4), torch.ones(4)
        assert bottleneck.information(torch.tensor([-3.0, 0, 1, 9]), zero, one).tolist() == [0, 0, 0, 0]


class TestExchange:
    @pytest.mark.parametrize("make", [make_cnn, make_vit])
    @pytest.mark.parametrize("layer", [None, "early"])
    def test_own_features_give_the_same_logits(self, make: Callable[[], Model], layer: str | None) -> None:
        model = make()
        name = None if layer is None else {"cnn": "stem", "vit": "blocks.1"}[model.family]
        batch = make_batch(model, 3)
        features = batch.activations(name)
        logits = bottleneck.logits_with(model, batch.images, features, name)
        assert torch.allclose(logits, batch.logits, atol=1e-5)
        others = bottleneck.logits_with(model, batch.images, features.flip(0), name)
        assert not torch.allclose(others, batch.logits, atol=1e-3)

    def test_prefix_tokens_pass_as_they_are(self, vit: Model) -> None:
        batch = make_batch(vit, 2)
        seen: list[torch.Tensor] = []
        handle = vit.layer("blocks.1").register_forward_hook(lambda *call: seen.append(call[2].detach()))
        try:
            bottleneck.logits_with(vit, batch.images, torch.zeros(2, 64, 8, 8), "blocks.0")
            vit(batch.images)
        finally:
            handle.remove()
        changed, clean = seen
        assert not torch.allclose(changed[:, 0], clean[:, 0])  # attention has read other patches
        tokens = torch.arange(2 * 65 * 64, dtype=torch.float32).view(2, 65, 64)
        features = -torch.arange(2 * 64 * 64, dtype=torch.float32).view(2, 64, 8, 8)
        put = bottleneck._put_back(vit, tokens, features, vit.target_layer, vit.input_size)
        assert torch.equal(put[:, 0], tokens[:, 0])
        assert torch.equal(vit.features(put), features)

    def test_maps_that_hold_their_channels_last(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 5, 4, stride=4)
                self.turn = nn.Identity()
                self.head = nn.Linear(5, 3)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                maps: torch.Tensor = self.turn(self.stem(images).permute(0, 2, 3, 1))
                logits: torch.Tensor = self.head(maps.square().mean((1, 2)))
                return logits

        torch.manual_seed(0)
        model = Model(Last(), mean=0.5, std=0.5, input_size=(32, 48), target_layer="turn")
        images = torch.rand(2, 3, 32, 48)
        features = Context(model, images).activations()
        assert features.shape == (2, 5, 8, 12)
        assert torch.allclose(bottleneck.logits_with(model, images, features), model(images), atol=1e-6)
        doubled = bottleneck.logits_with(model, images, 2 * features) - model.module.head.bias
        assert torch.allclose(doubled, 4 * (model(images) - model.module.head.bias), atol=1e-4)

    def test_nothing_is_left_behind_by_an_error(self, cnn: Model) -> None:
        with pytest.raises(RuntimeError), torch.no_grad():
            bottleneck.logits_with(cnn, torch.rand(1, 3, 32, 32), torch.rand(1, 6, 3, 3))
        assert not any(getattr(module, kind) for module in cnn.modules() for kind in HOOK_KINDS)
        assert torch.is_grad_enabled()

    def test_a_layer_that_runs_twice_or_never_is_refused(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.ReLU()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)
                self.idle = nn.Conv2d(3, 3, 1)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.act(self.conv(self.act(images))).mean((2, 3))
                return logits

        model = Model(Twice(), mean=0.0, std=1.0, input_size=8, target_layer="conv")
        images, features = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
        with pytest.raises(RequestError, match="more than once"):
            bottleneck.logits_with(model, images, features, "act")
        with pytest.raises(RequestError, match="takes no part"):
            bottleneck.logits_with(model, images, features, "idle")

    def test_features_that_are_computed_are_refused(self, vit: Model) -> None:
        def doubled(tokens: torch.Tensor) -> torch.Tensor:
            return 2 * tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 8, 8)

        model = Model(vit.module, mean=0.5, std=0.5, input_size=32, reshape=doubled)
        batch = make_batch(model, 1)
        with pytest.raises(RequestError, match="only moves values"):
            bottleneck.logits_with(model, batch.images, batch.activations())


class TestStatistics:
    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_welford_equals_numpy(self, offset: float) -> None:
        values = np.random.default_rng(0).normal(size=(23, 2, 3)) + offset
        estimate = bottleneck.Welford()
        for part in torch.tensor(values).split([1, 10, 2, 10]):
            estimate.update(part)
        assert estimate.mean.numpy() == pytest.approx(values.mean(0), rel=1e-12)
        assert estimate.std.numpy() == pytest.approx(values.std(0, ddof=1), rel=1e-8)

    @pytest.mark.parametrize("make", [make_cnn, make_vit])
    def test_fit_save_and_load(self, make: Callable[[], Model], tmp_path: Path) -> None:
        model = make()
        images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        features = Context(model, images).activations().double().numpy()
        fitted = bottleneck.fit_statistics(model, images.split(3))
        assert (fitted.count, fitted.layer, fitted.model) == (7, model.target_layer, model.digest())
        assert fitted.mean.numpy() == pytest.approx(features.mean(0), abs=1e-5)
        assert fitted.std.numpy() == pytest.approx(features.std(0, ddof=1), abs=1e-5)
        loaded = bottleneck.load_statistics(fitted.save(tmp_path / "s.safetensors"), model)
        assert torch.equal(loaded.mean, fitted.mean) and torch.equal(loaded.std, fitted.std)
        assert loaded.count == 7

    def test_own_statistics_by_hand(self, cnn: Model) -> None:
        features = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 4.0]]]])
        mean, std = bottleneck.reference("image", features, cnn)
        assert mean.flatten().tolist() == [2, 1] and std.flatten().tolist() == pytest.approx([1, 3**0.5])
        mean, std = bottleneck.reference("zero", features, cnn)
        assert mean.flatten().tolist() == [0, 0] and std.flatten().tolist() == pytest.approx([5**0.5, 2])

    def test_what_does_not_fit_is_refused(self, cnn: Model, tmp_path: Path) -> None:
        images = torch.rand(3, 3, 32, 32)
        file = bottleneck.fit_statistics(cnn, [images]).save(tmp_path / "s.safetensors")
        batch = make_batch(cnn, 1)
        with pytest.raises(RequestError, match="layer 'body', asked for 'stem'"):
            explain("iba", cnn, batch, statistics=str(file), layer="stem")
        with pytest.raises(RequestError, match="made for weights"):
            explain("iba", make_cnn(seed=1), batch, statistics=str(file))
        large = torch.rand(1, 3, 40, 40)
        with pytest.raises(RequestError, match=r"\(6, 8, 8\), the images have \(6, 10, 10\)"):
            explain("iba", cnn, batch_of(cnn, large), statistics=str(file))
        with pytest.raises(RequestError, match="did you mean 'zero'"):
            explain("iba", cnn, batch, statistics="zeros")
        text = tmp_path / "text.safetensors"
        text.write_text("no tensors")
        with pytest.raises(RequestError, match="holds no statistics"):
            explain("iba", cnn, batch, statistics=str(text))
        with pytest.raises(RequestError, match="a spread takes two"):
            bottleneck.fit_statistics(cnn, [images[:1]])
        with pytest.raises(RequestError, match="images of one size"):
            bottleneck.fit_statistics(cnn, [images, large])


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
        assert bool((final >= start).all()) and bool((final > start + 1e-5).any())

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
