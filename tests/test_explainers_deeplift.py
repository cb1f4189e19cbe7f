"""DeepLIFT by hand, by its sum, against captum where that is right, and where it is not defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import some_batch
from torch import nn

import slow_perturbation
from faithmap import registry
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.explaining import bind, undefined
from faithmap.models import Model, load_model


def explain(model: Model, batch: Batch, **params: object) -> torch.Tensor:
    plugin = registry.get("explainer", "deeplift")
    return bind(plugin, plugin.check(params))(model, batch)


def reason(model: Model) -> str:
    return undefined(registry.get("explainer", "deeplift"), model, set())


def wrap(module: nn.Module, side: int = 16) -> Model:
    return Model(module, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), input_size=side, name="net")


def gains(model: Model, batch: Batch, start: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gain = model(batch.images) - model(start.expand_as(batch.images))
    return gain.gather(1, batch.targets.view(-1, 1)).squeeze(1)


class PooledNet(nn.Module):
    """Convolutions with batch norm and max pooling, one ReLU module used for all of them."""

    def __init__(self, stride: int, reuse: bool, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.pool = nn.MaxPool2d(3 if stride < 3 else stride, stride)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.act = activation()
        self.other = self.act if reuse else activation()
        self.head = nn.Linear(8, 4)
        norm = self.first[1]
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.pool(self.act(self.first(images)))
        features = features + self.other(self.second(features))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_two_layers_by_hand(activation: str) -> None:
    torch.manual_seed(1)
    kind = nn.ReLU if activation == "relu" else nn.Tanh
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), kind(), nn.Linear(7, 4))
    model = Model(module, mean=0.5, std=0.25, input_size=4, name="two-layers")
    batch = some_batch(model)
    maps = explain(model, batch)
    first, bias = (part.detach().double().numpy() for part in (module[1].weight, module[1].bias))
    for i in range(3):
        image = batch.images[i].double().flatten().numpy()
        expected = slow_perturbation.rescale_two_layers(
            first / 0.25, bias - first.sum(1) * 0.5 / 0.25, module[3].weight[i].detach().double().numpy(),
            image, np.zeros_like(image), (lambda x: np.maximum(x, 0)) if activation == "relu" else np.tanh,
        ).reshape(3, 4, 4).sum(0)  # fmt: skip
        assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU])
@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_adds_up_to_the_gain(stride: int, reuse: bool, activation: type[nn.Module], baseline: str) -> None:
    model = wrap(PooledNet(stride, reuse, activation))
    batch = some_batch(model)
    start = model.mean if baseline == "mean" else torch.zeros_like(model.mean)
    expected = gains(model, batch, start)
    assert reason(model) == ""
    assert torch.allclose(
        explain(model, batch, baseline=baseline).sum((1, 2)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/mobilenetv2_035", "torchvision/resnet18"])
def test_adds_up_on_networks_of_the_zoos(name: str) -> None:
    torch.manual_seed(0)
    model = load_model(name, pretrained=False, input_size=64)
    batch = some_batch(model, 2)
    assert reason(model) == ""
    with model.counting() as meter:
        total = explain(model, batch).sum((1, 2))
    assert (meter.forwards, meter.backwards) == (4, 2)
    assert torch.allclose(total, gains(model, batch, torch.zeros_like(model.mean)), rtol=1e-4, atol=1e-6)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 49, 4))


def rectified() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(54, 4),
    )  # fmt: skip


@pytest.mark.parametrize("build", [pooled, rectified])
def test_equals_captum_where_that_adds_up(build: Callable[[], nn.Module]) -> None:
    from captum.attr import DeepLift

    torch.manual_seed(3)
    model = wrap(build())
    batch = some_batch(model)
    # A reference that is not of one colour has no tied maxima, among which any choice is right.
    reference = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    module = inspect.getmodule(registry.get("explainer", "deeplift").target)
    paired = module._with_multipliers(model)  # type: ignore[union-attr]
    found, gain = module._contributions(paired, batch.images, reference, batch.targets)  # type: ignore[union-attr]
    images = batch.images.clone().requires_grad_()
    with pytest.warns(UserWarning, match="hooks"):
        library = DeepLift(model).attribute(
            images, baselines=reference.expand_as(images), target=batch.targets
        )
    assert torch.allclose(found, library.detach(), atol=1e-5 * float(found.abs().max()))
    assert torch.allclose(found.sum((1, 2, 3)), gain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("image", "reference", "expected"), [
    ([1.0, 3.0], [2.0, 0.0], [0.0, 1.0]),  # a rise of 1, by the second
    ([1.0, 0.5], [3.0, 0.0], [-2.0, 0.0]),  # a fall of 2, by the first
    ([0.5, 1.0], [2.0, 2.0], [0.0, -1.0]),  # a fall below two equal ones: by the image's highest
    ([0.5, 1.0], [0.0, 2.0], [0.0, -1.0]),
])  # fmt: skip
def test_max_pooling_by_hand(image: list[float], reference: list[float], expected: list[float]) -> None:
    module = inspect.getmodule(registry.get("explainer", "deeplift").target)
    pairs = torch.tensor([image, reference]).view(2, 1, 1, 2).requires_grad_()
    outputs = module._through_max_pool(nn.MaxPool2d((1, 2)), pairs)  # type: ignore[union-attr]
    assert outputs.flatten().tolist() == [max(image), max(reference)]
    (multipliers,) = torch.autograd.grad(outputs[0].sum(), pairs)
    contributions = multipliers[0].flatten() * (torch.tensor(image) - torch.tensor(reference))
    assert contributions.tolist() == pytest.approx(expected)


class CalledNet(nn.Module):
    """Its activation is a function, which no module shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.body(images)).mean((2, 3)))
        return logits


class FragileNet(CalledNet):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            raise ValueError("one image at a time, please")
        return super().forward(images)


class TestWhereItIsNotDefined:
    def test_a_transformer_is_told_its_modules(self, vit: Model) -> None:
        with vit.counting() as meter:
            text = reason(vit)
        assert "the rescale rule is not exact here" in text and "Attention, LayerNorm" in text
        assert meter.forwards == 0

    def test_convnext_is_told_its_norm(self) -> None:
        text = reason(load_model("timm/test_convnext", pretrained=False, input_size=64))
        assert "there is no rule for" in text and "LayerNorm" in text

    def test_an_activation_that_is_a_function_is_found_out(self) -> None:
        assert "called as a function" in reason(wrap(CalledNet()))

    def test_a_network_that_cannot_be_tried_says_why(self) -> None:
        assert "could not be tried: ValueError: one image at a time" in reason(wrap(FragileNet()))


def test_the_model_is_left_alone() -> None:
    model = wrap(PooledNet(2, reuse=True))
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    assert reason(model) == ""
    explain(model, some_batch(model))
    assert list(model.modules()) == modules
    assert all(vars(module).keys() == kept.keys() for module, kept in zip(modules, before, strict=True))


def test_another_baseline_is_refused(cnn: Model) -> None:
    with pytest.raises(RequestError, match="unknown baseline 'blak'; did you mean 'black'"):
        explain(cnn, some_batch(cnn), baseline="blak")
