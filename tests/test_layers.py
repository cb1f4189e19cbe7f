"""Layers that are named by their depth: a share of a transformer's blocks, the end of a CNN's stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import faithmap
from faithmap.errors import RequestError
from faithmap.layers import stage_ends
from faithmap.models import Model


class Bottleneck(nn.Module):
    """Its first convolution still has the grid that the block then leaves."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(Bottleneck(2), Bottleneck(1))  # 16 x 16
        self.two = nn.Sequential(Bottleneck(2), Bottleneck(1))  # 8 x 8
        self.three = nn.Sequential(Bottleneck(2), Bottleneck(1))  # 4 x 4
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.three(self.two(self.one(x)))).flatten(1))


def name_of(model: Model, place: str) -> str:
    found = model.layer(place)
    return next(name for name, module in model.module.named_modules() if module is found)


def test_stages_end_with_the_last_layer_of_their_grid() -> None:
    network = Stages().eval()
    assert stage_ends(network, torch.zeros(1, 3, 32, 32)) == ["one", "two", "three"]
    model = Model(network, mean=(0, 0, 0), std=(1, 1, 1), input_size=32)
    assert [name_of(model, f"stage:-{k}") for k in (1, 2, 3)] == ["three", "two", "one"]


@pytest.mark.parametrize(
    ("name", "size", "stages"),
    [
        ("timm/test_resnet", 64, ["layer4", "layer3", "layer2", "layer1"]),
        ("timm/test_convnext", 64, ["norm_pre", "stages.2", "stages.1"]),
        ("timm/resnet18", 64, ["layer4", "layer3", "layer2", "layer1"]),
    ],
)
def test_stages_of_known_networks(name: str, size: int, stages: list[str]) -> None:
    model = faithmap.load_model(name, pretrained=False, input_size=size)
    assert [name_of(model, f"stage:-{1 + k}") for k in range(len(stages))] == stages


def test_blocks_are_counted_as_shares_of_the_depth() -> None:
    model = faithmap.load_model("shapes/vit")
    depth = len(model.layer("blocks"))  # type: ignore[arg-type]
    for k in range(1, 13):
        assert name_of(model, f"block:{k}/12") == f"blocks.{-(-depth * k // 12) - 1}"


def test_a_plugin_takes_such_a_layer() -> None:
    model, images = faithmap.load_model("shapes/resnet"), torch.rand(2, 3, 96, 96)
    deep = faithmap.explain(model, images, explainer="gradcam", layer="stage:-1")
    assert torch.equal(deep, faithmap.explain(model, images, explainer="gradcam"))
    assert not torch.equal(deep, faithmap.explain(model, images, explainer="gradcam", layer="stage:-2"))


def test_a_model_may_be_given_one_as_its_target_layer() -> None:
    model = faithmap.load_model("shapes/resnet", layer="stage:-2")
    assert (model.target_layer, model.grid) == ("layer1", (24, 24))
    with pytest.raises(RequestError, match="has 3 grids"):
        faithmap.load_model("shapes/resnet", layer="stage:-7").target_layer  # noqa: B018


@pytest.mark.parametrize(
    ("model", "place", "sentence"),
    [
        ("shapes/resnet", "block:1/2", "the model is no plain vision transformer; write 'stage:-1'"),
        ("shapes/resnet", "stage:-9", "the model has 3 grids of features"),
        ("shapes/resnet", "stage:2", "expected the dotted name of a layer, 'block:9/12'"),
        ("shapes/vit", "stage:-1", "the model is a vision transformer; write 'block:1/2'"),
        ("shapes/vit", "block:3/2", "expected the dotted name of a layer"),
        ("shapes/vit", "block:0/2", "expected the dotted name of a layer"),
        ("shapes/vit", "stage:-0", "expected the dotted name of a layer"),
    ],
)
def test_a_place_that_is_not_there_is_a_sentence(model: str, place: str, sentence: str) -> None:
    with pytest.raises(RequestError, match="layer") as caught:
        faithmap.load_model(model).layer(place)
    assert sentence in str(caught.value)
