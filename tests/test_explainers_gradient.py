"""Saliency, integrated gradients and occlusion against closed forms, axioms and slow rewrites."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import explain, make_linear, pixel_weights, some_batch

import slow_explainers
from faithmap import perturb, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model


class TestSaliency:
    def test_is_the_weight_of_a_linear_model(self) -> None:
        model = make_linear()
        weights = pixel_weights(model)[:3]
        largest = explain("saliency", model, some_batch(model))
        assert torch.allclose(largest, weights.abs().amax(1), atol=1e-6)
        signed = explain("saliency", model, some_batch(model), abs=False)
        assert torch.allclose(signed, weights.sum(1), atol=1e-6)

    def test_is_the_slope_of_the_logit(self, model: Model, batch: Batch) -> None:
        model.double()
        images = batch.images.double()
        batch = Batch(images, batch.targets, batch.ids, Context(model, images))
        maps = explain("saliency", model, batch, abs=False)
        step = torch.zeros_like(images)
        step[:, :, 7, 9] = 1e-3
        with torch.no_grad():
            logits = (model.module((images + s * step - model.mean) / model.std) for s in (1, -1))
            above, below = (part.gather(1, batch.targets.view(-1, 1)).squeeze(1) for part in logits)
        slope = (above - below) / 2e-3
        assert maps[:, 7, 9].double() == pytest.approx(slope, rel=1e-2, abs=1e-4)


class TestIntegratedGradients:
    def test_of_a_linear_model_is_weight_times_image(self) -> None:
        model = make_linear()
        batch = some_batch(model)
        expected = (pixel_weights(model)[:3] * batch.images).sum(1)
        assert torch.allclose(explain("integrated-gradients", model, batch, n_steps=2), expected, atol=1e-5)

    def test_adds_up_to_the_gain_over_black(self, model: Model, batch: Batch) -> None:
        maps = explain("integrated-gradients", model, batch, n_steps=100)
        with torch.no_grad():
            gain = (model(batch.images) - model(torch.zeros_like(batch.images))).gather(
                1, batch.targets.view(-1, 1)
            )
        assert maps.sum((1, 2)) == pytest.approx(gain.squeeze(1), rel=0.02, abs=0.01)

    def test_equals_the_slow_integral(self, model: Model, batch: Batch) -> None:
        maps = explain("integrated-gradients", model, batch, n_steps=5, method="riemann_middle")
        for i in range(2):
            target = int(batch.targets[i])

            def gradient(image: np.ndarray, target: int = target) -> np.ndarray:
                pixels = torch.from_numpy(image)[None].float().requires_grad_()
                (slope,) = torch.autograd.grad(model(pixels)[0, target], pixels)
                result: np.ndarray = slope[0].double().numpy()
                return result

            expected = slow_explainers.integrated_gradients(gradient, batch.images[i].double().numpy(), 5)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_chunks_neither_change_the_map_nor_the_count(
        self, model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = explain("integrated-gradients", model, batch, n_steps=7)
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        monkeypatch.setattr(perturb, "chunk_size", lambda _model: 12)
        with model.counting() as meter:
            maps = explain("integrated-gradients", model, batch, n_steps=7)
        assert torch.allclose(maps, whole, atol=1e-4 * float(whole.abs().max()))
        assert max(sizes) <= 3
        assert (meter.forwards, meter.backwards) == (7 * len(batch), 7 * len(batch))

    def test_one_step_is_refused(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="n_steps: got 1, expected 2 or more"):
            explain("integrated-gradients", cnn, some_batch(cnn), n_steps=1)


class TestOcclusion:
    @pytest.mark.parametrize(
        ("window", "stride", "fill"), [(8, 4, 0.0), (6, 5, 0.5), (32, 32, 0.0), (3, 3, 1.0)]
    )
    def test_equals_the_slow_loop(
        self, window: int, stride: int, fill: float, model: Model, batch: Batch
    ) -> None:
        maps = explain("occlusion", model, batch, window=window / 32, stride=stride / 32, fill=fill)

        def predict(image: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits: np.ndarray = model(torch.from_numpy(image)[None].float())[0].double().numpy()
            return logits

        for i in range(2):
            image = batch.images[i].double().numpy()
            expected = slow_explainers.occlusion(predict, image, int(batch.targets[i]), window, stride, fill)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_of_a_linear_model_by_single_pixels_is_weight_times_image(self) -> None:
        model = make_linear()
        batch = some_batch(model)
        maps = explain("occlusion", model, batch, window=1 / 8, stride=1 / 8)
        expected = (pixel_weights(model)[:3] * batch.images).sum(1)
        assert torch.allclose(maps, expected, atol=1e-4)

    def test_default_is_15_by_8_at_224(self, cnn: Model) -> None:
        plugin = registry.get("explainer", "occlusion")
        large = Model(cnn.module, mean=0.5, std=0.5, input_size=224)
        assert plugin.facts.forwards(large, plugin.check({})) == 1 + 28 * 28
        assert plugin.facts.forwards(cnn, plugin.check({})) == 1 + 31 * 31  # 2 by 1 at 32

    def test_chunks_neither_change_the_map_nor_the_count(
        self, cnn: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = some_batch(cnn, 5)
        params = {"window": 0.25, "stride": 0.125}
        whole = explain("occlusion", cnn, batch, **params)
        sizes: list[int] = []
        cnn.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        monkeypatch.setattr(perturb, "chunk_size", lambda _model: 3)
        with cnn.counting() as meter:
            maps = explain("occlusion", cnn, batch, **params)
        assert max(sizes) <= 3
        assert meter.forwards == 5 * (1 + 49)
        assert torch.allclose(maps, whole, atol=1e-4 * float(whole.abs().max()))

    @pytest.mark.parametrize("params", [{"window": 0.1, "stride": 0.2}, {"window": 1.5}, {"stride": 0.0}])
    def test_impossible_windows_are_refused(self, params: dict[str, float], cnn: Model) -> None:
        with pytest.raises(RequestError, match="expected 0 < stride <= window <= 1"):
            explain("occlusion", cnn, some_batch(cnn), **params)


@pytest.mark.parametrize("name", ["saliency", "integrated-gradients", "occlusion"])
@pytest.mark.parametrize("frozen", [True, False])
def test_captum_stays_silent(
    name: str, frozen: bool, model: Model, batch: Batch, capfd: pytest.CaptureFixture[str]
) -> None:
    model.requires_grad_(not frozen)
    params = dict(registry.get("explainer", name).facts.check_params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(name, model, batch, **params)
    assert capfd.readouterr() == ("", "")
