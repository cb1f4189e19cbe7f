"""The passes that explainers share: how many there are, what they give, and what they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.models import Model


class Net(nn.Module):
    """A convolution, a ReLU behind it (in place if asked), a head; and a layer that nothing calls."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.relu = nn.ReLU(inplace=inplace)
        self.unused = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu(self.conv(images)).mean((2, 3)))
        return logits


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, images: Tensor) -> tuple[Tensor, str]:
        return self.conv(images), "a second output"


class ThroughTuple(nn.Module):
    """Its features come out of a layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = TwoOutputs()
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features, _ = self.pair(images)
        logits: Tensor = self.head(features.relu().mean((2, 3)))
        return logits


def make(net: type[nn.Module] = Net, layer: str | None = "conv", **kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(net(**kwargs), mean=0.5, std=0.25, input_size=16, target_layer=layer)


def make_images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([0, 1, 2])


def plain_gradient(model: Model, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Features of `conv` and the targets' gradients, by hand."""
    net = model.module
    features = net.conv((images - 0.5) / 0.25).detach().requires_grad_()
    logits = net.head(features.relu().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.gather(1, targets.view(-1, 1)).sum(), features)
    return features.detach(), gradient


@pytest.mark.parametrize("inplace", [False, True])
def test_features_and_gradients_are_those_of_plain_autograd(inplace: bool) -> None:
    model, images = make(inplace=inplace), make_images()
    context = Context(model, images)
    features, gradient = plain_gradient(model, images, TARGETS)
    assert torch.allclose(context.activations(), features, atol=1e-6)
    assert bool((context.activations() < 0).any())  # what came before a ReLU in place, not after
    assert torch.allclose(context.gradients(TARGETS), gradient, atol=1e-7)
    assert torch.allclose(context.logits, model(images), atol=1e-6)


def test_one_forward_and_one_backward() -> None:
    model = make()
    context = Context(model, make_images())
    with model.counting() as meter:
        for _ in range(3):
            _ = context.logits, context.activations(), context.gradients(TARGETS)
    assert (meter.forwards, meter.backwards) == (3, 3)


def test_each_further_layer_and_class_costs_its_own_passes() -> None:
    model = make()
    context = Context(model, make_images())
    with model.counting() as meter:
        context.gradients(TARGETS)
        context.gradients(TARGETS.roll(1))
    assert (meter.forwards, meter.backwards) == (6, 6)
    with model.counting() as meter:
        context.gradients(TARGETS, "relu")
        context.gradients(TARGETS)
    assert (meter.forwards, meter.backwards) == (3, 3)


def test_another_class_has_its_own_gradient() -> None:
    model, images = make(), make_images()
    context = Context(model, images)
    for targets in (TARGETS, TARGETS.roll(1), TARGETS):
        assert torch.allclose(
            context.gradients(targets), plain_gradient(model, images, targets)[1], atol=1e-7
        )


def test_frozen_and_trainable_models_are_equal() -> None:
    images = make_images()
    trainable, frozen = make(), make()
    frozen.requires_grad_(False)
    one, two = Context(trainable, images), Context(frozen, images)
    assert torch.equal(one.gradients(TARGETS), two.gradients(TARGETS))
    assert torch.equal(one.activations(), two.activations())
    assert all(parameter.grad is None for parameter in trainable.parameters())


def test_works_where_gradients_are_switched_off_and_leaves_the_switch() -> None:
    model, images = make(), make_images()
    expected = Context(model, images).gradients(TARGETS)
    with torch.no_grad():
        assert torch.equal(Context(model, images).gradients(TARGETS), expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_layer_that_returns_a_tuple() -> None:
    model, images = make(ThroughTuple, "pair"), make_images()
    context = Context(model, images)
    assert context.activations().shape == (3, 4, 4, 4)
    assert bool((context.gradients(TARGETS) != 0).any())


def test_an_unused_layer_is_named() -> None:
    model = make()
    with pytest.raises(RequestError, match="'unused' takes no part in the forward pass"):
        Context(model, make_images()).activations("unused")
    with pytest.raises(RequestError, match="has no layer 'convv'; did you mean 'conv'"):
        Context(model, make_images()).activations("convv")
    with pytest.raises(RequestError, match="'unused' takes no part"):
        _ = make(layer="unused").target_layer


def test_no_hook_stays_even_after_a_failure() -> None:
    model = make()
    context = Context(model, make_images())
    context.gradients(TARGETS)
    broken = Context(model, torch.rand(2, 5, 16, 16))  # five channels: the convolution refuses them
    with pytest.raises(RuntimeError):
        broken.activations()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_release_forgets_everything() -> None:
    model = make()
    context = Context(model, make_images())
    context.gradients(TARGETS)
    context.release()
    with model.counting() as meter:
        _ = context.logits
    assert meter.forwards == 3


def test_a_model_without_features_still_has_logits() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    model = Model(module, mean=0.5, std=0.25, input_size=16)
    context = Context(model, make_images())
    assert context.logits.shape == (3, 3)
    with pytest.raises(RequestError, match="no layer of the model returns a feature map"):
        context.activations()


def test_a_selection_computes_nothing_again_of_the_others(model: Model, batch: Batch) -> None:
    whole = batch.gradients()
    part = batch.select([2, 0])
    with model.counting() as meter:
        gradients = part.gradients()
    assert (meter.forwards, meter.backwards) == (2, 2)
    assert torch.allclose(gradients, whole[[2, 0]], atol=1e-5)
