"""FullGrad and Guided Grad-CAM: the CAM family's methods that go back to the pixels.

Against rewrites from their papers, completeness, and other libraries where those compute the same.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch_of, explain, inside, make_vit
from torch import nn
from torch.nn import functional as F

import slow_cams
import slow_explainers
from faithmap import registry
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.explaining import undefined
from faithmap.models import Model, load_model
from faithmap.operations import operations_of


class Normed(nn.Module):
    """Convolutions with and without bias, batch norms, ReLU6 in place, a ReLU function, a sum, two heads."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.one = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.cap = nn.ReLU6(inplace=True)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.norm(self.one(images))
        first = F.hardtanh(first, 0.0, 6.0) if self.functional else self.cap(first)
        second = self.two(first)
        second = F.relu(second) if self.functional else self.act(second)
        features = self.pool(first + second).mean((2, 3))
        logits: torch.Tensor = self.head(self.hidden(features).relu())
        return logits


def normed(functional: bool = False) -> Model:
    """A `Normed` whose statistics are not those of a fresh network and whose ReLU6 meets its cap."""
    torch.manual_seed(4)
    network = Normed(functional).double()
    with torch.no_grad():
        network.norm.running_mean.normal_(0, 0.3)
        network.norm.running_var.uniform_(0.5, 2.0)
        network.norm.weight.uniform_(2.0, 6.0)
        network.norm.bias.normal_(1, 1)
        network.hidden.bias.uniform_(0.2, 0.5)
    model = Model(network, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), input_size=16, target_layer="two")
    return model.double()


class Gated(nn.Module):
    """A network whose features are multiplied by a gate made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images).relu()
        features = features * features.mean((2, 3), keepdim=True).sigmoid()
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


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


class TestFullGrad:
    def parts(self, model: Model, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        taken: list[torch.Tensor] = []
        first, _ = inside("fullgrad").full_gradient(model, model, batch.images, batch.targets, taken.append)
        return first, taken

    @pytest.mark.parametrize("build", [normed, lambda: normed(functional=True), lambda: make_double("cnn")])
    def test_parts_add_up_to_the_logit(self, build: Any) -> None:
        model = build()
        batch = batch_of(model, 3)
        first, taken = self.parts(model, batch)
        total = first.flatten(1).sum(1) + sum(part.flatten(1).sum(1) for part in taken)
        logits = batch.logits.gather(1, batch.targets[:, None])[:, 0].double()
        assert torch.allclose(total, logits, rtol=1e-5, atol=1e-5)
        assert float(first.flatten(1).sum(1).sub(logits).abs().min()) > 1e-2, "biases must matter"

    def test_parts_add_up_to_the_logit_of_a_trained_network(self) -> None:
        model = load_model("shapes/resnet")
        batch = batch_of(model)
        first, taken = self.parts(model, batch)
        terms = [first.flatten(1).sum(1), *(part.flatten(1).sum(1) for part in taken)]
        logits = batch.logits.gather(1, batch.targets[:, None])[:, 0]
        assert len(taken) == 16 + 1  # batch norms and the head
        assert torch.allclose(torch.stack(terms).sum(0), logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("rescale", ["layer", "channel"])
    def test_equals_a_rewrite_with_biases_laid_out_as_maps(self, rescale: str) -> None:
        model = normed()
        batch = batch_of(model)
        maps = explain("fullgrad", model, batch, rescale=rescale)
        for i in range(2):
            expected = np.zeros(batch.size)
            for share in bias_maps(model, batch.images[i], int(batch.targets[i])):
                expected += slow_cams.psi(
                    share, batch.size, slow_explainers.bilinear, whole=rescale == "layer"
                )
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-5 * expected.max()

    def test_cap_of_relu6_is_met(self) -> None:
        model = normed()
        batch = batch_of(model)
        values = model.module.norm(model.module.one(model.normalise(batch.images)))
        assert bool((values > 6).any()) and bool((values < 0).any())

    def test_without_biases_only_the_input_is_left(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 3, bias=False),
        )  # fmt: skip
        model = Model(network, mean=0.5, std=0.5, input_size=8)
        batch = batch_of(model)
        first, taken = self.parts(model, batch)
        assert taken == []
        share = first.abs()
        low, high = share.amin((1, 2, 3), keepdim=True), share.amax((1, 2, 3), keepdim=True)
        assert torch.allclose(explain("fullgrad", model, batch), ((share - low) / (high - low)).sum(1))

    def test_equals_the_librarys_whole_result(self, cnn: Model, capfd: pytest.CaptureFixture[str]) -> None:
        # Without normalisation: the library multiplies the gradient with what it is given. Its ranges
        # carry an epsilon of 1e-7, which large logits make vanish.
        model = Model(cnn.module, mean=0.0, std=1.0, input_size=32)
        with torch.no_grad():
            model.module.head.weight *= 1e4
        batch = batch_of(model)
        from pytorch_grad_cam.utils.image import scale_cam_image

        expected = library("fullgrad_cam", "FullGrad", model, batch, layers=False)
        maps = explain("fullgrad", model, batch, rescale="channel")
        assert np.asarray(scale_cam_image(maps.numpy())) == pytest.approx(expected, abs=2e-4)

    def test_says_where_it_is_not_defined(self, vit: Model) -> None:
        plugin = registry.get("explainer", "fullgrad")
        assert undefined(plugin, vit, set()) == "defined for cnn, not for vit"
        gated = Model(Gated(), mean=0.5, std=0.5, input_size=8)
        with gated.counting() as meter:
            assert "piecewise linear but for biases" in undefined(plugin, gated, set())
        assert (meter.forwards, meter.backwards) == (0, 0)
        assert "add up to" in undefined(plugin, load_model("shapes/convnext"), set())
        assert undefined(plugin, normed(), set()) == ""

    def test_smooth_activations_leave_nothing_out(self) -> None:
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.SiLU(inplace=True), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(),
            nn.Linear(64, 3),
        )  # fmt: skip
        model = Model(network, mean=0.5, std=0.5, input_size=8)
        batch = batch_of(model)
        first, taken = self.parts(model, batch)
        total = first.flatten(1).sum(1) + sum(part.flatten(1).sum(1) for part in taken)
        assert torch.allclose(total, batch.logits.gather(1, batch.targets[:, None])[:, 0], atol=1e-5)

    def test_unknown_rescale(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="did you mean 'channel'"):
            explain("fullgrad", cnn, batch_of(cnn, 1), rescale="chanel")


def make_double(kind: str) -> Model:
    from conftest import make_cnn

    return {"cnn": make_cnn, "vit": make_vit}[kind]().double()


def bias_maps(model: Model, image: torch.Tensor, target: int) -> list[np.ndarray]:
    """Input and biases of a `Normed`, each laid out as a map of its own, times their gradients."""
    network = model.module
    pixels = model.normalise(image[None]).requires_grad_()
    norm = network.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = (norm.bias - norm.running_mean * scale).detach()
    one = shift.view(1, -1, 1, 1).expand(1, 6, 8, 8).clone().requires_grad_()
    before = F.conv2d(pixels, network.one.weight, stride=2, padding=1) * scale.view(1, -1, 1, 1) + one
    six = torch.where(before > 6, 6.0, 0.0).detach().requires_grad_()
    first = before * ((before > 0) & (before < 6)) + six
    two = network.two.bias.detach().view(1, -1, 1, 1).expand(1, 6, 8, 8).clone().requires_grad_()
    second = (F.conv2d(first, network.two.weight, padding=1) + two).clamp_min(0)
    pooled = F.max_pool2d(first + second, 2).mean((2, 3))
    logit = network.head(network.hidden(pooled).clamp_min(0))[0, target]
    leaves = [pixels, one, six, two]
    gradients = torch.autograd.grad(logit, leaves)
    return [(leaf * grad)[0].detach().numpy() for leaf, grad in zip(leaves, gradients, strict=True)]


class GuidedRectifier(torch.autograd.Function):
    """A rectifier with a cap whose backward is written out by the rule."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cap: float) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(values)
        ctx.cap = cap
        return values.clamp(0, cap)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        return gradient * ((gradient > 0) & (values > 0) & (values < ctx.cap)), None


class TestGuidedGradCAM:
    def guided(self, model: Model, batch: Batch) -> torch.Tensor:
        gradients: torch.Tensor = inside("guided-gradcam").guided_gradients(
            model, batch.images, batch.targets
        )
        return gradients

    @pytest.mark.parametrize("functional", [False, True])
    def test_guided_gradient_equals_the_rule_written_out(self, functional: bool) -> None:
        model = normed(functional)
        network, batch = model.module, batch_of(model, 3)
        pixels = batch.images.clone().requires_grad_()
        first = GuidedRectifier.apply(network.norm(network.one(model.normalise(pixels))), 6.0)
        second = GuidedRectifier.apply(network.two(first), math.inf)
        hidden = GuidedRectifier.apply(network.hidden(network.pool(first + second).mean((2, 3))), math.inf)
        score = network.head(hidden).gather(1, batch.targets[:, None]).sum()
        (expected,) = torch.autograd.grad(score, pixels)
        assert torch.allclose(self.guided(model, batch), expected, rtol=1e-6, atol=1e-9)
        plain = batch.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(plain).gather(1, batch.targets[:, None]).sum(), plain)
        assert float((gradient - expected).abs().max()) > 0.1 * float(gradient.abs().max())

    def test_equals_captums_where_only_relu_modules_are(self, cnn: Model) -> None:
        from captum.attr import GuidedBackprop, GuidedGradCam

        batch = batch_of(cnn, 3)
        images = batch.images.clone().requires_grad_()
        with pytest.warns(UserWarning, match="backward hooks"):
            expected = GuidedBackprop(cnn).attribute(images, batch.targets)
        assert torch.allclose(self.guided(cnn, batch), expected, rtol=1e-5, atol=1e-9)
        with pytest.warns(UserWarning, match="backward hooks"):
            whole = GuidedGradCam(cnn, cnn.layer()).attribute(
                images, batch.targets, interpolate_mode="bilinear"
            )
        maps = explain("guided-gradcam", cnn, batch)
        assert torch.allclose(maps, whole.sum(1), rtol=1e-4, atol=1e-6 * float(maps.abs().max()))

    def test_is_the_plain_gradient_where_no_weight_is_negative(self, cnn: Model) -> None:
        with torch.no_grad():
            for parameter in cnn.parameters():
                parameter.abs_()
        batch = batch_of(cnn)
        pixels = batch.images.clone().requires_grad_()
        (plain,) = torch.autograd.grad(cnn(pixels).gather(1, batch.targets[:, None]).sum(), pixels)
        assert torch.allclose(self.guided(cnn, batch), plain, rtol=1e-5)

    def test_map_is_the_product(self, cnn: Model) -> None:
        batch = batch_of(cnn)
        coarse = F.interpolate(explain("gradcam", cnn, batch)[:, None], size=batch.size, mode="bilinear")
        product = coarse * self.guided(cnn, batch)
        assert torch.allclose(explain("guided-gradcam", cnn, batch), product.sum(1), atol=1e-9)

    def test_mobilenets_caps_are_guided(self) -> None:
        import timm

        torch.manual_seed(0)
        network = timm.create_model("mobilenetv2_035", num_classes=5)
        model = Model(network, mean=0.5, std=0.5, input_size=32, name="mobilenet")
        assert undefined(registry.get("explainer", "guided-gradcam"), model, set()) == ""
        batch = batch_of(model, 1)
        pixels = batch.images.clone().requires_grad_()
        (plain,) = torch.autograd.grad(model(pixels).gather(1, batch.targets[:, None]).sum(), pixels)
        assert not torch.allclose(self.guided(model, batch), plain, rtol=0.1)

    def test_says_where_the_rule_does_not_hold(self, vit: Model) -> None:
        plugin = registry.get("explainer", "guided-gradcam")
        assert undefined(plugin, vit, set()) == "defined for cnn, not for vit"

        def reason(*activations: nn.Module) -> str:
            layers = [
                nn.Conv2d(3, 4, 3),
                *activations,
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 3),
            ]
            return undefined(plugin, Model(nn.Sequential(*layers), mean=0.5, std=0.5, input_size=8), set())

        assert reason(nn.GELU()).endswith("the model applies gelu")
        assert reason(nn.ReLU(), nn.SiLU(inplace=True)).endswith("the model applies silu")
        assert reason(nn.Identity()).endswith("the model applies neither")
        assert reason(nn.ReLU6(inplace=True)) == reason(nn.ReLU()) == ""
        assert undefined(plugin, Model(Gated(), mean=0.5, std=0.5, input_size=8), set()) == ""

    def test_operations_are_seen_uncounted(self, cnn: Model) -> None:
        with cnn.counting() as meter:
            assert {"conv2d", "relu", "linear"} <= operations_of(cnn)
        assert meter.forwards == 0
