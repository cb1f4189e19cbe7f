"""Input times gradient, SmoothGrad and GradientSHAP against closed forms, captum and slow loops."""

from __future__ import annotations

import pytest
import torch
from conftest import make_linear, pixel_weights, some_batch

from faithmap import registry, sampling
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.explaining import bind
from faithmap.models import Model
from faithmap.records import canonical_json


def explain(name: str, model: Model, batch: Batch, **params: object) -> torch.Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def seeded(name: str, batch: Batch, **params: object) -> Batch:
    """The batch as the explainer sees it, with its own draws."""
    plugin = registry.get("explainer", name)
    return batch.with_seed_key(canonical_json([name, plugin.check(params)]))


def gradient(model: Model, point: torch.Tensor, target: int) -> torch.Tensor:
    pixels = point[None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(pixels)[0, target], pixels)
    return slope[0]


def gains(model: Model, batch: Batch, start: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gain = model(batch.images) - model(start.expand_as(batch.images))
    return gain.gather(1, batch.targets.view(-1, 1)).squeeze(1)


class TestInputXGradient:
    @pytest.mark.parametrize("space", ["pixel", "normalised"])
    def test_of_a_linear_model_adds_up_to_its_gain(self, space: str) -> None:
        model = make_linear()
        batch = some_batch(model)
        maps = explain("input-x-gradient", model, batch, space=space)
        zero = model.mean if space == "normalised" else torch.zeros_like(model.mean)
        assert torch.allclose(maps, (pixel_weights(model)[:3] * (batch.images - zero)).sum(1), atol=1e-5)
        assert torch.allclose(maps.sum((1, 2)), gains(model, batch, zero), atol=1e-4)

    def test_normalised_is_captum_on_normalised_images(self, model: Model, batch: Batch) -> None:
        from captum.attr import InputXGradient

        maps = explain("input-x-gradient", model, batch, space="normalised")
        images = model.normalise(batch.images).requires_grad_()
        expected = InputXGradient(model.module).attribute(images, target=batch.targets).detach().sum(1)
        assert torch.allclose(maps, expected, atol=1e-5 * float(expected.abs().max()))

    def test_another_space_is_refused(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="unknown space 'pixels'; did you mean 'pixel'"):
            explain("input-x-gradient", cnn, some_batch(cnn), space="pixels")


class TestSmoothGrad:
    @pytest.mark.parametrize(("kind", "power"), [("signed", 1), ("abs", 1), ("square", 2)])
    def test_of_a_linear_model_is_its_weight_whatever_the_noise(self, kind: str, power: int) -> None:
        model = make_linear()
        weights = pixel_weights(model)[:3]
        maps = explain("smoothgrad", model, some_batch(model), n_samples=3, noise=0.5, kind=kind)
        expected = weights if kind == "signed" else weights.abs() ** power
        assert torch.allclose(maps, expected.sum(1), atol=1e-5)

    @pytest.mark.parametrize("kind", ["signed", "abs", "square"])
    def test_equals_the_slow_loop(self, kind: str, model: Model, batch: Batch) -> None:
        batch = batch.select([0, 1])
        batch.images[1] = 0.2 + 0.5 * batch.images[1]  # a narrower range means less noise
        params = {"n_samples": 4, "noise": 0.2, "kind": kind}
        maps = explain("smoothgrad", model, batch, **params)
        drawn = seeded("smoothgrad", batch, **params)
        for i in range(2):
            generator, image = drawn.generator(i), batch.images[i]
            spread = float(image.max() - image.min())
            total = torch.zeros(batch.size)
            for _ in range(4):
                noisy = image + 0.2 * spread * torch.randn(image.shape, generator=generator)
                slope = gradient(model, noisy, int(batch.targets[i]))
                total += {"signed": slope, "abs": slope.abs(), "square": slope**2}[kind].sum(0) / 4
            assert torch.allclose(maps[i], total, atol=1e-5 * float(total.abs().max()))

    def test_without_noise_is_saliency(self, model: Model, batch: Batch) -> None:
        maps = explain("smoothgrad", model, batch, n_samples=2, noise=0.0, kind="signed")
        expected = explain("saliency", model, batch, abs=False)
        assert torch.allclose(maps, expected, atol=1e-5 * float(expected.abs().max()))

    def test_defaults_are_published(self) -> None:
        """The square is that of the authors' library."""
        assert registry.get("explainer", "smoothgrad").parameters == {
            "n_samples": 50, "noise": 0.15, "kind": "square",
        }  # fmt: skip


class TestGradientShap:
    def test_from_black_on_a_linear_model_is_exact(self) -> None:
        model = make_linear()
        batch = some_batch(model)
        maps = explain("gradient-shap", model, batch, n_samples=2, baseline="black")
        assert torch.allclose(maps, (pixel_weights(model)[:3] * batch.images).sum(1), atol=1e-5)

    @pytest.mark.parametrize("baseline", ["noise", "black+noise"])
    def test_adds_up_in_expectation_on_a_linear_model(self, baseline: str) -> None:
        model = make_linear()
        batch = some_batch(model)
        weights = pixel_weights(model)[:3]
        share = 1.0 if baseline == "noise" else 0.5
        maps = explain("gradient-shap", model, batch, n_samples=4000, baseline=baseline)
        # A baseline is noise with chance `share`, else black: its logit has this mean and spread.
        middle, inner = 0.5 * weights.sum((1, 2, 3)), (weights**2).sum((1, 2, 3)) / 12
        spread = (share * inner + share * (1 - share) * middle**2).sqrt()
        expected = gains(model, batch, torch.zeros_like(model.mean)) - share * middle
        off = (maps.sum((1, 2)) - expected) / (spread / 4000**0.5)
        assert float(off.abs().max()) < 4

    @pytest.mark.parametrize(
        "params",
        [
            {"n_samples": 5},
            {"n_samples": 4, "baseline": "noise", "noise": 0.1},
            {"n_samples": 4, "baseline": "black"},
        ],
    )
    def test_equals_the_slow_loop(self, params: dict[str, object], model: Model, batch: Batch) -> None:
        batch = batch.select([0, 2])
        maps = explain("gradient-shap", model, batch, **params)
        drawn = seeded("gradient-shap", batch, **params)
        count, baseline = int(str(params["n_samples"])), params.get("baseline", "black+noise")
        for i in range(2):
            generator, image = drawn.generator(i), batch.images[i]
            total = torch.zeros(batch.size)
            for _ in range(count):
                place, coin = torch.rand(2, generator=generator)
                start = torch.zeros_like(image)
                if baseline == "noise" or (baseline == "black+noise" and coin < 0.5):
                    start = torch.rand(image.shape, generator=generator)
                end = image
                if "noise" in params:
                    end = image + 0.1 * torch.randn(image.shape, generator=generator)
                slope = gradient(model, start + place * (end - start), int(batch.targets[i]))
                total += ((end - start) * slope).sum(0) / count
            assert torch.allclose(maps[i], total, atol=1e-5 * float(total.abs().max()))

    def test_from_black_tends_to_integrated_gradients(self, cnn: Model) -> None:
        batch = some_batch(cnn)
        path = explain("integrated-gradients", cnn, batch, n_steps=60)
        maps = explain("gradient-shap", cnn, batch, n_samples=300, baseline="black")
        few = explain("gradient-shap", cnn, batch, n_samples=3, baseline="black")
        error, coarse = (maps - path).abs().mean(), (few - path).abs().mean()
        assert error < 0.05 * path.abs().mean() and error < coarse / 3

    def test_captum_agrees_on_a_linear_model(self) -> None:
        from captum.attr import GradientShap

        model = make_linear()
        batch = some_batch(model)
        images = batch.images.clone().requires_grad_()
        library = GradientShap(model).attribute(
            images, baselines=torch.zeros_like(images), n_samples=3, target=batch.targets
        )
        maps = explain("gradient-shap", model, batch, n_samples=3, baseline="black")
        assert torch.allclose(maps, library.detach().sum(1), atol=1e-5)


@pytest.mark.parametrize("name", ["smoothgrad", "gradient-shap"])
def test_chunks_neither_change_the_map_nor_the_count(
    name: str, model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = explain(name, model, batch, n_samples=5)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(sampling, "chunk_size", lambda _model, _size: 12)
    with model.counting() as meter:
        maps = explain(name, model, batch, n_samples=5)
    assert torch.allclose(maps, whole, atol=1e-5 * float(whole.abs().max()))
    assert max(sizes) == 3
    assert (meter.forwards, meter.backwards) == (5 * len(batch), 5 * len(batch))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("smoothgrad", {"n_samples": 0}, "got n_samples 0 and noise 0.15, expected n_samples >= 1"),
        ("smoothgrad", {"noise": -0.1}, "and noise >= 0"),
        ("smoothgrad", {"kind": "squared"}, "unknown kind 'squared'; did you mean 'square'"),
        ("gradient-shap", {"n_samples": 0}, "got n_samples 0"),
        ("gradient-shap", {"baseline": "blak"}, "unknown baseline 'blak'; did you mean 'black'"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, object], message: str, cnn: Model) -> None:
    with pytest.raises(RequestError, match=message):
        explain(name, cnn, some_batch(cnn), **params)
