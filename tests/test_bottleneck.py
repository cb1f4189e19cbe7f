"""The parts of a bottleneck: gates, information, exchanged features, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from planted_cells import batch_of, explain
from torch import nn

import slow_bottleneck
from faithmap import bottleneck
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import HOOK_KINDS
from faithmap.models import Model


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
