"""The models of the papers' tables by name: what they are, their transforms, the layers that are meant."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import explain, some_batch
from safetensors.torch import save_file
from torch import Tensor, nn

from faithmap import dino, layers, model_sources
from faithmap.errors import RequestError
from faithmap.models import Model, load_model

SLOW = pytest.mark.slow
HALF, IMAGENET = (0.5, 0.5, 0.5), model_sources.IMAGENET_MEAN
#: name: family, mean, crop, interpolation, and the layers of the places with the side of their grids.
MODELS: dict[str, tuple[str, tuple[float, ...], float, str, dict[str, tuple[str, int]]]] = {
    "timm/vit_base_patch16_224": ("vit", HALF, 0.9, "bicubic", {"block:6/12": ("blocks.5", 14)}),
    "timm/deit_base_patch16_224": ("vit", IMAGENET, 0.9, "bicubic", {"block:6/12": ("blocks.5", 14)}),
    "timm/deit_tiny_patch16_224": ("vit", IMAGENET, 0.9, "bicubic", {"block:6/12": ("blocks.5", 14)}),
    "dino/vit_base_patch16_224": ("vit", IMAGENET, 0.875, "bicubic", {"block:6/12": ("blocks.5", 14)}),
    "dino/vit_small_patch16_224": ("vit", IMAGENET, 0.875, "bicubic", {"block:6/12": ("blocks.5", 14)}),
    "timm/resnetv2_50": (
        "cnn", HALF, 0.95, "bicubic",
        {"stage:-1": ("norm", 7), "stage:-2": ("stages.2", 14), "stage:-3": ("stages.1", 28)},
    ),
    "timm/resnet50": (
        "cnn", IMAGENET, 0.95, "bicubic",
        {"stage:-1": ("layer4", 7), "stage:-2": ("layer3", 14), "stage:-3": ("layer2", 28)},
    ),
    "timm/convnext_small": (
        "cnn", IMAGENET, 0.95, "bicubic",
        {"stage:-1": ("norm_pre", 7), "stage:-2": ("stages.2", 14), "stage:-3": ("stages.1", 28)},
    ),
    "torchvision/vgg16": (
        "cnn", IMAGENET, 0.875, "bilinear",
        {"stage:-1": ("avgpool", 7), "stage:-2": ("features.29", 14), "stage:-3": ("features.22", 28)},
    ),
    "torchvision/vgg19": (
        "cnn", IMAGENET, 0.875, "bilinear",
        {"stage:-1": ("avgpool", 7), "stage:-2": ("features.35", 14), "stage:-3": ("features.26", 28)},
    ),
    "torchvision/resnet18": (
        "cnn", IMAGENET, 0.875, "bilinear",
        {"stage:-1": ("layer4", 7), "stage:-2": ("layer3", 14), "stage:-3": ("layer2", 28)},
    ),
}  # fmt: skip
HEAVY = {"timm/resnetv2_50", "timm/convnext_small", "timm/resnet50"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in HEAVY else ()) for name in MODELS])
def test_transform_and_layers_at_full_size(name: str) -> None:
    """Shapes alone: on the meta device even the largest takes no memory and no arithmetic."""
    family, mean, crop, interpolation, places = MODELS[name]
    source, _, rest = name.partition("/")
    with torch.device("meta"):
        module, config = model_sources.SOURCES[source](rest, {"pretrained": False})
        example = torch.zeros(1, 3, 224, 224)
        module.eval()
        anatomy = layers.find_anatomy(module, example)
        outputs, _ = layers._trace(module, example)
        found = {place: layers.layer_at(module, example, place) for place in places}
    assert (anatomy.family, anatomy.classes) == (family, 1000)
    assert config["mean"] == pytest.approx(mean) and config["crop_pct"] == pytest.approx(crop)
    assert config["interpolation"] == interpolation
    assert found == {place: layer for place, (layer, _) in places.items()}
    for layer, side in places.values():
        features = layers.as_features(outputs[layer], anatomy.reshape, layer, (224, 224))
        assert tuple(features.shape[2:]) == (side, side)


def test_they_load_by_name_with_random_weights() -> None:
    for name, kwargs in [
        ("timm/vit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
        ("timm/resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}),
        ("torchvision/resnet18", {}),
        ("dino/vit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ]:
        model = load_model(name, pretrained=False, input_size=32, kwargs=kwargs)
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)


def test_the_sum_of_resnetv2s_last_block_has_a_name() -> None:
    """Keras' layer 187 of ResNet50V2 is the last block's sum; the final norm and its ReLU stand behind it."""
    kwargs = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}
    model = load_model("timm/resnetv2_50", pretrained=False, input_size=64, kwargs=kwargs, layer="stages.3")
    assert model.target_layer == "stages.3" and model.grid == (2, 2)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    block = model.module.stages[3].blocks[-1]
    handles = [
        layer.register_forward_hook(keep(name))
        for name, layer in {
            "sum": model.module.stages[3], "norm": model.module.norm, "branch": block.conv3,
            "shortcut": block.downsample,
        }.items()
    ]  # fmt: skip
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert torch.allclose(seen["sum"], seen["branch"] + seen["shortcut"], atol=1e-6)
    assert bool((seen["norm"] >= 0).all()) and bool((seen["sum"] < 0).any())


# DINO with its linear classifiers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2}
SMALL, BASE = "dino/vit_small_patch16_224", "dino/vit_base_patch16_224"


def backbone() -> nn.Module:
    import timm

    torch.manual_seed(3)
    network: nn.Module = timm.create_model(
        "vit_small_patch16_224.dino", pretrained=False, num_classes=0, **TINY
    )
    for parameter in network.parameters():  # biases and norms start alike
        nn.init.normal_(parameter, std=0.3)
    return network


def linear_weights(file: Path, width: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    """A file as the authors' evaluation saves it: the classifier's state in a record of the training."""
    generator = torch.Generator().manual_seed(4)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((classes, width), (classes,)))
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 100, "state_dict": state, "best_acc": 77.0}, file)
    return weight, bias


def loaded(tmp_path: Path, name: str, width: int, **changes: Any) -> tuple[Model, Tensor, Tensor]:
    weight, bias = linear_weights(tmp_path / "linearweights.pth", width)
    torch.save(backbone().state_dict(), tmp_path / "backbone.pth")
    given = {"weights": str(tmp_path / "backbone.pth"), "head": str(tmp_path / "linearweights.pth")}
    kwargs = {**TINY, "num_classes": 6}
    return load_model(name, input_size=32, kwargs=kwargs, **(given | changes)), weight, bias


def slow_tokens(images: Tensor) -> list[Tensor]:
    """The tokens (B, N, C) behind each block, each through the final norm."""
    network: Any = backbone().eval()
    x = network.patch_embed(images)
    x = torch.cat((network.cls_token.expand(len(x), -1, -1), x), 1) + network.pos_embed
    out = []
    for block in network.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
        out.append(network.norm(x))
    return out


def test_the_small_classifier_reads_four_class_tokens(tmp_path: Path) -> None:
    model, weight, bias = loaded(tmp_path, SMALL, 4 * 24)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = slow_tokens((images - model.mean) / model.std)
        read = torch.cat([tokens[place][:, 0] for place in (1, 2, 3, 4)], 1)
        assert torch.allclose(model(images), read @ weight.T + bias, atol=1e-4)


def test_the_base_classifier_reads_class_token_and_mean_in_turn(tmp_path: Path) -> None:
    model, weight, bias = loaded(tmp_path, BASE, 2 * 24)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        last = slow_tokens((images - model.mean) / model.std)[-1]
        read = torch.zeros(2, 48)
        for entry in range(24):
            read[:, 2 * entry] = last[:, 0, entry]
            read[:, 2 * entry + 1] = last[:, 1:, entry].mean(1)
        assert torch.allclose(model(images), read @ weight.T + bias, atol=1e-4)
    assert model.family == "vit" and model.grid == (4, 4) and model.num_classes == 6
    assert model.transform.crop_pct == 0.875


def test_one_file_of_both_serves_too(tmp_path: Path) -> None:
    model, _, _ = loaded(tmp_path, BASE, 48)
    both = tmp_path / "both.safetensors"
    save_file(model.module.state_dict(), both)
    again = load_model(BASE, input_size=32, weights=str(both), kwargs={**TINY, "num_classes": 6})
    assert again.weights_digest() == model.weights_digest()


def test_what_is_published_is_fetched_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    weight, _ = linear_weights(tmp_path / "linear.pth", 48)
    asked: list[str] = []
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked.append(f"{name} {pretrained}")
        network: nn.Module = create(name, pretrained=False, **kwargs)
        return network

    def fetched(url: str, **kwargs: Any) -> Any:
        asked.append(url)
        assert kwargs["weights_only"]
        return torch.load(tmp_path / "linear.pth", weights_only=True)

    monkeypatch.setattr(timm, "create_model", without_network)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    model = load_model(BASE, pretrained=True, input_size=32, kwargs={**TINY, "num_classes": 6})
    assert asked == ["vit_base_patch16_224.dino True", dino.BASE_URL + dino.CLASSIFIERS[BASE[5:]][2]]
    assert torch.equal(model.module.head.weight, weight)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("dino/vit_base_patch16", {}, "no DINO classifier 'dino/vit_base_patch16'; did you mean"),
        (SMALL, {}, r"does not fit: 'weight' has shape \(6, 48\), expected \(6, 96\)"),
        (BASE, {"head": None}, "holds no head; give head = the authors' dino_vitbase16_linearweights.pth"),
        (BASE, {"head": "nowhere.pth"}, "no weights file at nowhere.pth"),
        (BASE, {"pretrained": True}, "give weights = PATH or pretrained = true, not both"),
    ],
)
def test_bad_requests_are_a_sentence(
    tmp_path: Path, name: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        loaded(tmp_path, name, 48, **changes)


@pytest.mark.parametrize("name", [SMALL, BASE])
def test_explainers_of_transformers_explain_it(tmp_path: Path, name: str) -> None:
    from faithmap import registry
    from faithmap.explaining import undefined

    model, _, _ = loaded(tmp_path, name, 96 if name == SMALL else 48)
    batch = some_batch(model, 2)
    explained = []
    for explainer in (
        "gradcam", "raw-attention", "rollout", "generic-attention", "attention-guided-cam", "partial-lrp",
        "explainability", "attnlrp", "lrp", "integrated-gradients",
    ):  # fmt: skip
        plugin = registry.get("explainer", explainer)
        if undefined(plugin, model, frozenset()):
            continue
        maps = explain(explainer, model, batch, **dict(plugin.facts.check_params))
        assert bool(torch.isfinite(maps).all()) and float(maps.std()) > 0, explainer
        explained.append(explainer)
    assert {"gradcam", "raw-attention", "rollout", "generic-attention"} <= set(explained)


# Hugging Face, whose package need not be installed


class HubNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.body = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.classifier = nn.Linear(4, 10)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.body(pixel_values).mean((2, 3))))


VIT = {"size": {"height": 224, "width": 224}, "resample": 2}
RESNET = {"size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
          "crop_size": {"height": 224, "width": 224}}  # fmt: skip
CONVNEXT = {"size": {"shortest_edge": 224}, "resample": 3, "crop_pct": 0.875}


@pytest.mark.parametrize(
    ("processor", "transform"),
    [
        (VIT, ((224, 224), 1.0, "bilinear", "squash")),
        (RESNET, ((224, 224), 0.875, "bicubic", "center")),
        (CONVNEXT, ((224, 224), 0.875, "bicubic", "center")),
    ],
)
def test_the_hubs_transform_is_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: dict[str, Any], transform: tuple[Any, ...]
) -> None:
    asked: list[tuple[str, str]] = []

    def network(name: str, revision: str) -> HubNetwork:
        asked.append((name, revision))
        return HubNetwork()

    def processing(name: str, revision: str) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3, **processor)

    fake = SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=lambda name: name),
        AutoModelForImageClassification=SimpleNamespace(
            from_config=lambda config: HubNetwork(), from_pretrained=network
        ),
        AutoImageProcessor=SimpleNamespace(from_pretrained=processing),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)  # type: ignore[arg-type]
    for pretrained in (True, False):
        model = load_model("hf/google/vit-base-patch16-224", pretrained=pretrained)
        found = model.transform
        assert (found.size, found.crop_pct, found.interpolation, found.mode) == transform
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert set(asked) == {("google/vit-base-patch16-224", "main")}
    load_model("hf/google/vit-base-patch16-224", revision="v2")
    assert asked[-2:] == [("google/vit-base-patch16-224", "v2")] * 2
    weights = {name: torch.full_like(value, 0.25) for name, value in HubNetwork().state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    model = load_model("hf/google/vit-base-patch16-224", weights=str(tmp_path / "weights.safetensors"))
    assert all((value == 0.25).all() for value in model.module.state_dict().values())
