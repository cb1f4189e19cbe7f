"""The CAMs against slow rewrites from their papers and against pytorch-grad-cam's own results."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import explain
from torch import nn

import slow_explainers
from faithmap import cam
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model

GRADIENT_CAMS = ("gradcam", "gradcam++", "xgradcam", "layercam")
LIBRARY = {
    "gradcam": ("grad_cam", "GradCAM"),
    "gradcam++": ("grad_cam_plusplus", "GradCAMPlusPlus"),
    "xgradcam": ("xgrad_cam", "XGradCAM"),
    "layercam": ("layer_cam", "LayerCAM"),
    "scorecam": ("score_cam", "ScoreCAM"),
}


def cold(model: Model, batch: Batch) -> Batch:
    """The same images for another model, or with nothing computed yet."""
    return Batch(batch.images, batch.targets, batch.ids, Context(model, batch.images), grid=batch.grid)


def in_double(model: Model, batch: Batch) -> Batch:
    images = batch.images.double()
    return Batch(images, batch.targets, batch.ids, Context(model, images), grid=batch.grid)


def some_batch(model: Model, count: int = 2) -> Batch:
    """Seeded images, of the classes 0, 1, ..."""
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.arange(count), tuple("abcdef"[:count]), Context(model, images))


def library_result(name: str, model: Model, batch: Batch) -> np.ndarray:
    """pytorch-grad-cam's own whole result: (B, H, W), min-max normalised, resized."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    module, method = LIBRARY[name]
    cls = getattr(importlib.import_module(f"pytorch_grad_cam.{module}"), method)
    explainer = cls(model, [model.layer()], reshape_transform=model.anatomy.reshape)
    targets = [ClassifierOutputTarget(int(target)) for target in batch.targets]
    try:
        result: np.ndarray = explainer(batch.images, targets)
    finally:
        explainer.activations_and_grads.release()
    return result


def as_library(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Finish native maps as pytorch-grad-cam does: min-max, resize, min-max."""
    from pytorch_grad_cam.utils.image import scale_cam_image

    return np.asarray(scale_cam_image(scale_cam_image(maps.numpy(), (size[1], size[0]))))


def in_other_units(model: Model, factor: float) -> Model:
    """A twin that computes the same logits from target features `factor` times as small."""
    twin = copy.deepcopy(model.module)
    with torch.no_grad():
        if model.family == "vit":
            block = twin.blocks[-1]
            block.norm1.weight /= factor
            block.norm1.bias /= factor
            block.attn.qkv.weight *= factor
        else:
            twin.body[0].weight /= factor
            twin.body[0].bias /= factor
            twin.head.weight *= factor
    return Model(twin, mean=0.5, std=0.5, input_size=model.input_size)


class TestGradientCAMs:
    @pytest.mark.parametrize("name", GRADIENT_CAMS)
    def test_equals_the_papers_formula(self, name: str, model: Model, batch: Batch) -> None:
        maps = explain(name, model, batch)
        slow = getattr(slow_explainers, name.replace("++", "_plus_plus"))
        assert bool((maps.flatten(1).amax(1) > 0).any())
        for i in range(len(batch)):
            expected = slow(batch.activations()[i].double().numpy(), batch.gradients()[i].double().numpy())
            # Transformers' features are signed: sums in denominators cancel, and round-off grows.
            tolerance = 2e-3 if model.family == "vit" else 1e-5
            assert np.abs(maps[i].numpy() - expected).max() <= tolerance * max(expected.max(), 1e-9)

    @pytest.mark.parametrize("name", ["gradcam", "xgradcam", "layercam"])
    def test_equals_the_librarys_whole_result(self, name: str, model: Model, batch: Batch) -> None:
        maps = explain(name, model, batch)
        assert as_library(maps, batch.size) == pytest.approx(library_result(name, model, batch), abs=1e-4)

    def test_gradcam_plus_plus_equals_the_librarys_where_its_epsilon_vanishes(
        self, model: Model, batch: Batch
    ) -> None:
        maps = explain("gradcam++", model, batch)
        twin = in_other_units(model, 1e6)
        assert torch.allclose(twin(batch.images), model(batch.images), atol=1e-4)
        assert as_library(maps, batch.size) == pytest.approx(
            library_result("gradcam++", twin, batch), abs=1e-3
        )

    def test_gradcam_plus_plus_does_not_depend_on_the_unit_of_the_features(self, cnn: Model) -> None:
        batch = some_batch(cnn, 3)
        maps = explain("gradcam++", cnn, batch)
        for factor in (1e-3, 1e3):
            twin = in_other_units(cnn, factor)
            assert torch.allclose(explain("gradcam++", twin, cold(twin, batch)), maps, rtol=1e-4, atol=1e-7)
        # The library's own result does: its epsilon outweighs small gradients.
        small = library_result("gradcam++", in_other_units(cnn, 1e-3), batch)
        assert np.abs(small - library_result("gradcam++", in_other_units(cnn, 1e3), batch)).max() > 0.01

    def test_one_forward_and_one_backward_serve_all(self, model: Model, batch: Batch) -> None:
        fresh = cold(model, batch)
        with model.counting() as meter:
            for name in GRADIENT_CAMS:
                explain(name, model, fresh)
        assert (meter.forwards, meter.backwards) == (len(batch), len(batch))

    @pytest.mark.parametrize("name", GRADIENT_CAMS)
    def test_native_grid_no_sign_and_no_graph(self, name: str, model: Model, batch: Batch) -> None:
        maps = explain(name, model, batch)
        assert maps.shape == (len(batch), *model.grid)
        assert bool((maps >= 0).all())
        assert not maps.requires_grad

    @pytest.mark.parametrize("name", GRADIENT_CAMS)
    def test_zero_gradient_gives_a_zero_map(self, name: str, cnn: Model, batch: Batch) -> None:
        nn.init.zeros_(cnn.module.head.weight)
        maps = explain(name, cnn, cold(cnn, batch))
        assert bool((maps == 0).all())

    @pytest.mark.parametrize("name", [*GRADIENT_CAMS, "scorecam"])
    def test_another_layer(self, name: str, cnn: Model) -> None:
        batch = some_batch(cnn)
        assert explain(name, cnn, batch, layer="stem").shape == (2, 16, 16)
        with pytest.raises(RequestError, match="did you mean 'stem'"):
            explain(name, cnn, batch, layer="stemm")


class TestScoreCAM:
    @pytest.mark.parametrize(
        "params",
        [
            {},
            {"score": "probability"},
            {"score": "probability", "channel_softmax": False, "space": "normalised"},
            {"channel_softmax": False, "subtract_blank": True},
        ],
    )
    def test_equals_algorithm_1_and_its_readings(
        self, params: dict[str, Any], model: Model, batch: Batch
    ) -> None:
        model.double()
        batch = in_double(model, batch.select([0, 1]))
        maps = explain("scorecam", model, batch, **params)

        def predict(image: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits: np.ndarray = model(torch.from_numpy(image)[None])[0].double().numpy()
            return logits

        for i in range(2):
            expected = slow_explainers.scorecam(
                predict,
                batch.images[i].numpy(),
                batch.activations()[i].numpy(),
                int(batch.targets[i]),
                probability=params.get("score") == "probability",
                channel_softmax=params.get("channel_softmax", True),
                subtract_blank=params.get("subtract_blank", False),
                colour=0.5 if params.get("space") == "normalised" else 0.0,
            )
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_equals_the_librarys_whole_result(
        self, model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        # The library aligns corners when it upsamples; the protocol here, and the authors' code, do not.
        monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))
        expected = library_result("scorecam", model, batch)
        capfd.readouterr()  # its progress bars
        assert as_library(explain("scorecam", model, batch), batch.size) == pytest.approx(expected, abs=1e-4)
        assert capfd.readouterr() == ("", "")

    def test_blank_image_cancels_under_the_channel_softmax(self, cnn: Model) -> None:
        batch = some_batch(cnn)
        less = explain("scorecam", cnn, batch, subtract_blank=True)
        assert torch.allclose(less, explain("scorecam", cnn, batch), rtol=1e-4, atol=1e-6)

    def test_dead_channels_cost_one_forward_in_all(self, cnn: Model) -> None:
        with torch.no_grad():
            for channel in range(4):
                cnn.module.body[0].weight[channel] = 0
                cnn.module.body[0].bias[channel] = -1.0
        batch = some_batch(cnn, 3)
        alive = int((~cam.constant_channels(batch.activations())).sum())
        assert alive < 3 * 6 - 11
        with cnn.counting() as meter:
            explain("scorecam", cnn, batch)
        assert meter.forwards == alive + 1

    @pytest.mark.parametrize("chunk", [1, 5, 64])
    def test_chunks_do_not_change_the_map(
        self, chunk: int, model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = explain("scorecam", model, batch)
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        monkeypatch.setattr(cam, "chunk_size", lambda _model: chunk)
        maps = explain("scorecam", model, batch)
        assert max(sizes) <= chunk
        assert torch.allclose(maps, whole, rtol=1e-4, atol=1e-5 * float(whole.max()))

    def test_unknown_readings_suggest_the_nearest(self, cnn: Model) -> None:
        batch = some_batch(cnn, 1)
        with pytest.raises(RequestError, match="did you mean 'probability'"):
            explain("scorecam", cnn, batch, score="probabilty")
        with pytest.raises(RequestError, match="did you mean 'normalised'"):
            explain("scorecam", cnn, batch, space="normalized")


class TestSharedPieces:
    def test_min_max_of_a_constant_is_zero(self) -> None:
        maps = torch.stack([torch.full((3, 3), 7.0), torch.arange(9.0).view(3, 3) - 4])
        stretched = cam.min_max(maps)
        assert bool((stretched[0] == 0).all())
        assert (float(stretched[1].min()), float(stretched[1].max())) == (0.0, 1.0)

    def test_channel_count_is_not_metered(self, model: Model) -> None:
        with model.counting() as meter:
            count = cam.channel_count(model)
        assert meter.forwards == 0
        images = torch.zeros(1, 3, *model.input_size)
        assert count == Context(model, images).activations().shape[1]

    def test_no_hook_stays(self, model: Model) -> None:
        cam.channel_count(model)
        assert not any(module._forward_hooks for module in model.modules())
