"""HiResCAM, Eigen-CAM, Ablation-CAM and augmented Grad-CAM++, and chunks of all of their family.

Against slow rewrites from their papers, closed forms, and other libraries where those compute the same.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch_of, explain, inside, make_batch
from torch import nn

import slow_cams
import slow_explainers
from faithmap import perturb, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model

FAMILY = ("hirescam", "eigencam", "ablationcam", "fullgrad", "guided-gradcam", "augmented-gradcam++")


class TestHiResCAM:
    @pytest.mark.parametrize("relu", [True, False])
    def test_equals_the_papers_formula(self, relu: bool, model: Model, batch: Batch) -> None:
        maps = explain("hirescam", model, batch, relu=relu)
        for i in range(len(batch)):
            features, gradients = (t[i].double().numpy() for t in (batch.activations(), batch.gradients()))
            expected = slow_cams.hirescam(features, gradients, relu=relu)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-5 * np.abs(expected).max()

    def test_splits_the_logit_among_the_cells_before_one_linear_layer(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 3)
        )
        model = Model(network, mean=0.5, std=0.5, input_size=16, target_layer="1")
        batch = batch_of(model, 3)
        signed = explain("hirescam", model, batch, relu=False)
        logits = batch.logits.gather(1, batch.targets[:, None])[:, 0]
        assert torch.allclose(signed.sum((1, 2)), logits - network[3].bias[batch.targets], atol=1e-5)
        assert not torch.allclose(explain("gradcam", model, batch), signed.clamp_min(0), atol=1e-3)

    def test_is_gradcam_behind_mean_pooling_and_one_linear_layer(self, cnn: Model) -> None:
        batch = batch_of(cnn)
        assert torch.allclose(explain("hirescam", cnn, batch), explain("gradcam", cnn, batch), atol=1e-7)

    def test_equals_the_librarys_whole_result(self, model: Model, batch: Batch) -> None:
        expected = library("hirescam", "HiResCAM", model, batch)
        assert finished(explain("hirescam", model, batch), batch) == pytest.approx(expected, abs=1e-4)


def library(module: str, method: str, model: Model, batch: Batch, layers: bool = True) -> np.ndarray:
    """pytorch-grad-cam's own whole result: (B, H, W), min-max normalised, resized."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cls = getattr(importlib.import_module(f"pytorch_grad_cam.{module}"), method)
    made = cls(model, [model.layer()] if layers else [], reshape_transform=model.anatomy.reshape)
    targets = [ClassifierOutputTarget(int(target)) for target in batch.targets]
    try:
        result: np.ndarray = made(batch.images, targets)
    finally:
        made.activations_and_grads.release()
    return result


def finished(maps: torch.Tensor, batch: Batch) -> np.ndarray:
    """Native maps finished as pytorch-grad-cam does: min-max, resize, min-max."""
    from pytorch_grad_cam.utils.image import scale_cam_image

    height, width = batch.size
    return np.asarray(scale_cam_image(scale_cam_image(maps.numpy(), (width, height))))


class TestEigenCAM:
    @pytest.mark.parametrize("centre", [False, True])
    def test_equals_a_power_iteration(self, centre: bool, model: Model, batch: Batch) -> None:
        maps = explain("eigencam", model, batch, centre=centre)
        for i in range(len(batch)):
            expected = slow_cams.eigencam(batch.activations()[i].double().numpy(), centre=centre)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_finds_the_plane_of_features_of_rank_one(self) -> None:
        # Twelve pixels of one colour, each as bright as a known number: features are their product.
        model = Model(
            nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            mean=0.0, std=1.0, input_size=(3, 4), target_layer="0",
        )  # fmt: skip
        with torch.no_grad():
            model.module[0].weight.copy_(torch.tensor([[3.0, 0, 0], [0, -4.0, 0]]).view(2, 3, 1, 1))
        plane = torch.arange(12.0).view(3, 4) / 12
        images = plane.expand(1, 3, 3, 4).contiguous()
        batch = Batch(images, torch.tensor([0]), ("a",), Context(model, images))
        assert torch.allclose(explain("eigencam", model, batch, centre=False)[0], 5 * plane, atol=1e-6)
        # Less its mean, the same plane.
        centred = explain("eigencam", model, batch)[0]
        assert torch.allclose(centred, 5 * (plane - plane.mean()), atol=1e-6)

    def test_rectified_features_that_are_not_centred_give_no_negative_cell(self, cnn: Model) -> None:
        batch = batch_of(cnn, 4)
        assert bool((batch.activations() >= 0).all())
        assert float(explain("eigencam", cnn, batch, centre=False).min()) >= -1e-6

    def test_it_equals_the_librarys_whole_result_or_its_negative(self, model: Model, batch: Batch) -> None:
        maps = explain("eigencam", model, batch)
        expected = library("eigen_cam", "EigenCAM", model, batch)
        positive, negative = (finished((sign * maps).clamp_min(0), batch) for sign in (1, -1))
        for i in range(len(batch)):
            assert min(np.abs(signed[i] - expected[i]).max() for signed in (positive, negative)) < 1e-3


class TestAblationCAM:
    @pytest.mark.parametrize("denominator", ["score", "magnitude"])
    def test_equals_the_papers_formula(self, denominator: str, model: Model, batch: Batch) -> None:
        model.double()
        images = batch.images[:2].double()
        # One logit of each sign.
        logits = model(images).detach()
        targets = torch.stack([logits[0].argmax(), logits[1].argmin()])
        assert logits[0, targets[0]] > 0 > logits[1, targets[1]]
        batch = Batch(images, targets, ("a", "b"), Context(model, images))
        maps = explain("ablationcam", model, batch, denominator=denominator)
        for i in range(2):
            expected = slow_cams.ablationcam(
                batch.activations()[i].numpy(),
                float(logits[i, targets[i]]),
                lambda k, i=i: logit_without(model, images[i], int(targets[i]), k),
                magnitude=denominator == "magnitude",
            )
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_closed_form_behind_mean_pooling_and_one_linear_layer(self, cnn: Model) -> None:
        batch = batch_of(cnn, 3)
        means = batch.activations().mean((2, 3))
        logits = batch.logits.gather(1, batch.targets[:, None])
        weights = cnn.module.head.weight[batch.targets] * means / logits
        expected = (weights[:, :, None, None] * batch.activations()).sum(1).clamp_min(0)
        assert torch.allclose(explain("ablationcam", cnn, batch), expected, rtol=1e-3, atol=1e-5)

    def test_equals_the_librarys_whole_result(self, cnn: Model, capfd: pytest.CaptureFixture[str]) -> None:
        batch = batch_of(cnn, 3)
        expected = library("ablation_cam", "AblationCAM", cnn, batch)
        capfd.readouterr()  # its progress bars
        assert finished(explain("ablationcam", cnn, batch), batch) == pytest.approx(expected, abs=1e-3)
        assert capfd.readouterr() == ("", "")

    def test_channels_of_zeros_cost_nothing(self, cnn: Model) -> None:
        with torch.no_grad():
            for channel in range(4):
                cnn.module.body[0].weight[channel] = 0
                cnn.module.body[0].bias[channel] = -1.0
        batch = batch_of(cnn, 3)
        alive = int((batch.activations() != 0).flatten(2).any(2).sum())
        assert alive <= 6
        with cnn.counting() as meter:
            explain("ablationcam", cnn, batch.select([0, 1, 2]))
        # The images themselves, and two channels twice to see whether they may share a pass.
        assert meter.forwards == alive + 3 + 2 * 2

    @pytest.mark.parametrize("chunk", [1, 4, 64])
    def test_trunk_is_run_once_a_chunk_and_changes_nothing(
        self, chunk: int, model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plugin = inside("ablationcam")
        sizes: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        shared = explain("ablationcam", model, batch.select([0, 1]))
        assert max(sizes) <= 2
        monkeypatch.setattr(plugin, "_shares_its_trunk", lambda *_args: False)
        monkeypatch.setattr(perturb, "chunk_size", lambda _model: chunk)
        sizes.clear()
        whole = explain("ablationcam", model, batch.select([0, 1]))
        assert max(sizes[1:]) <= chunk
        assert torch.allclose(shared, whole, rtol=1e-3, atol=1e-5 * float(whole.max()))

    def test_a_network_that_cannot_share_is_run_whole(self) -> None:
        class Joined(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.early, self.late = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
                self.head = nn.Linear(8, 3)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                early = self.early(images)
                both = torch.cat([early, self.late(early)], 1).relu()
                logits: torch.Tensor = self.head(both.mean((2, 3)))
                return logits

        torch.manual_seed(0)
        model = Model(Joined(), mean=0.5, std=0.5, input_size=8, target_layer="late")
        batch = batch_of(model)
        maps = explain("ablationcam", model, batch)
        for i in range(2):
            expected = slow_cams.ablationcam(
                batch.activations()[i].double().numpy(),
                float(batch.logits[i, i]),
                lambda k, i=i: logit_without(model, batch.images[i], i, k),
            )
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_class_token_keeps_the_channel(self, vit: Model) -> None:
        ablation = inside("ablationcam")._Ablation(vit, None, (32, 32))
        channels = torch.tensor([3, 5])
        seen: list[torch.Tensor] = []
        with torch.no_grad(), ablation.of(channels):
            handle = vit.layer().register_forward_hook(lambda _m, _i, output: seen.append(output))
            vit(torch.rand(1, 3, 32, 32))
            handle.remove()
        (tokens,) = seen
        assert bool((tokens[0, 1:, 3] == 0).all()) and bool((tokens[0, :, 5] != 0).any())
        assert bool((tokens[:, 0] != 0).all())

    def test_wrong_requests(self, vit: Model) -> None:
        with pytest.raises(RequestError, match="did you mean 'magnitude'"):
            explain("ablationcam", vit, make_batch(vit, 1), denominator="magnitud")
        blurred = Model(
            vit.module, mean=0.5, std=0.5, input_size=32, target_layer=vit.target_layer,
            reshape=lambda tokens: tokens[:, 1:].float().transpose(1, 2).unflatten(2, (8, 8)) / 2,
        )  # fmt: skip
        with pytest.raises(RequestError, match="only picks and"):
            explain("ablationcam", blurred, batch_of(blurred, 1))


def logit_without(model: Model, image: torch.Tensor, target: int, channel: int) -> float:
    """A logit when a channel is set to zero by hand: in maps everywhere, in tokens behind the first."""

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        if changed.ndim == 4:
            changed[:, channel] = 0
        else:
            changed[:, 1:, channel] = 0
        return changed

    handle = model.layer().register_forward_hook(hook)
    with torch.no_grad():
        value = float(model.module(model.normalise(image[None]))[0, target])
    handle.remove()
    return value


class TestAugmentedGradCAM:
    def test_equals_a_rewrite_pixel_by_pixel(self) -> None:
        from conftest import TinyCNN

        torch.manual_seed(0)
        model = Model(TinyCNN(), mean=(0.3, 0.5, 0.7), std=0.5, input_size=(16, 24)).double()
        batch = batch_of(model)
        plugin = registry.get("explainer", "augmented-gradcam++")
        maps = plugin.target(model, batch, copies=3, degrees=40.0, translate=0.2)
        reach = torch.tensor([math.radians(40), 0.2, 0.2])
        for i in range(2):
            drawn = ((2 * torch.rand(3, 3, generator=batch.generator(i)) - 1) * reach).tolist()
            moves = [(angle, round(24 * right) / 24, round(16 * down) / 16) for angle, right, down in drawn]
            cams = [plus_plus(model, batch.images[i], i)]
            for angle, right, down in moves:
                copy = slow_cams.moved_image(batch.images[i].numpy(), angle, right, down, (0.3, 0.5, 0.7))
                cams.append(plus_plus(model, torch.from_numpy(copy), i))
            expected = slow_cams.augmented(cams[0], cams[1:], moves, batch.size)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-3

    @pytest.mark.parametrize("still", [{"copies": 0}, {"copies": 3, "degrees": 0.0, "translate": 0.0}])
    def test_without_motion_it_is_gradcam_plus_plus_stretched(
        self, still: dict[str, Any], model: Model, batch: Batch
    ) -> None:
        single = explain("gradcam++", model, batch)
        low, high = single.amin((1, 2), keepdim=True), single.amax((1, 2), keepdim=True)
        maps = explain("augmented-gradcam++", model, batch, **still)
        assert torch.allclose(maps, (single - low) / (high - low), atol=1e-4)

    def test_maps_come_back_to_where_the_object_is(self) -> None:
        # One channel that shows how bright a cell is: its map moves with the object.
        network = nn.Sequential(
            nn.AvgPool2d(4),
            nn.Conv2d(3, 1, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(1, 2),
        )
        model = Model(network, mean=0.5, std=0.5, input_size=(48, 64), target_layer="2")
        with torch.no_grad():
            network[1].weight.fill_(1.0)
            network[1].bias.zero_()
            network[5].weight.copy_(torch.tensor([[1.0], [0.5]]))
        images = torch.full((1, 3, 48, 64), 0.5)
        images[:, :, 12:20, 36:44] = 1.0
        batch = Batch(images, torch.tensor([0]), ("a",), Context(model, images))
        maps = explain("augmented-gradcam++", model, batch, copies=40)[0]
        assert divmod(int(maps.argmax()), 16) in {(i, j) for i in (3, 4) for j in (9, 10)}
        # Laid back the object stays: the mass further than three cells away is small.
        y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
        near = ((y - 3.5) ** 2 + (x - 9.5) ** 2) <= 9
        assert float(maps[near].sum() / maps.sum()) > 0.95

    def test_one_forward_and_one_backward_a_copy(self, model: Model, batch: Batch) -> None:
        with model.counting() as meter:
            explain("augmented-gradcam++", model, batch.select([0, 1]), copies=5)
        assert (meter.forwards, meter.backwards) == (12, 12)

    def test_wrong_requests(self, cnn: Model) -> None:
        for wrong in ({"copies": -1}, {"degrees": 200.0}, {"translate": 1.0}):
            with pytest.raises(RequestError, match="expected copies of 0 or more"):
                explain("augmented-gradcam++", cnn, batch_of(cnn, 1), **wrong)


def plus_plus(model: Model, image: torch.Tensor, target: int) -> np.ndarray:
    """Grad-CAM++ of one image by the slow rewrite."""
    context = Context(model, image[None])
    gradients = context.gradients(torch.tensor([target]))[0].double().numpy()
    return slow_explainers.gradcam_plus_plus(context.activations()[0].double().numpy(), gradients)


@pytest.mark.parametrize("name", FAMILY)
def test_chunks_do_not_change_the_map(name: str, cnn: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(cnn, 3)
    params = registry.get("explainer", name).facts.check_params
    whole = explain(name, cnn, batch.select([0, 1, 2]), **params)
    monkeypatch.setattr(perturb, "chunk_size", lambda _model: 2)
    parts = explain(name, cnn, batch.select([0, 1, 2]), **params)
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
