"""The embedded models: three small networks trained on the dataset `shapes`, one a family.

Each is a timm architecture, narrowed for speed and strided for a grid of 12 x 12 features at 96
pixels (a class activation map on the 3 x 3 grid that such a small image would else end in tells
little). Weights ship as half-precision safetensors, beside a card that says how they came about.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithmap.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import nn

NAMES = ("resnet", "vit", "convnext")
CLASSES = ("disc", "square", "triangle", "star", "plus", "ring", "crescent", "hourglass")
INPUT_SIZE = 96

#: timm's name of each architecture, and what is changed of it.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("test_resnet", {"output_stride": 8, "stem_width": 8, "channels": (24, 32, 24, 64)}),
    # The patch size counts cells of the convolutional stem, which has stride 8: tokens of 8 x 8 pixels.
    "vit": (
        "test_vit",
        {"img_size": 96, "patch_size": 1, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2},
    ),
    "convnext": (
        "test_convnext",
        {
            "output_stride": 8,
            "depths": (1, 2, 2, 1),
            "dims": (16, 32, 48, 64),
            "kernel_sizes": (7, 7, 5, 3),
            "ls_init_value": None,
            "act_layer": "gelu",
        },
    ),
}
#: Channels after each convolution of the ViT's stem: three 3 x 3 convolutions of stride 2.
STEM = (16, 32, 48)


def _known(name: str) -> str:
    if name not in NAMES:
        raise RequestError(f"there is no embedded model '{name}'; {nearest(name, NAMES)}")
    return name


def build(name: str) -> nn.Module:
    """Build an architecture with random weights.

    Raises:
        RequestError: no embedded model has that name.
    """
    import timm

    architecture, changes = ARCHITECTURES[_known(name)]
    if name == "vit":
        changes = {**changes, "embed_layer": _stem()}
    model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=len(CLASSES), **changes)
    return model


def _stem() -> Any:
    """The ViT's embedding: convolutions in place of one linear map of each patch.

    A transformer this small does not find edges in raw patches from some thousand images.
    """
    from timm.layers import HybridEmbed
    from torch import nn

    layers: list[nn.Module] = []
    before = 3
    for channels in STEM:
        layers += [nn.Conv2d(before, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return partial(HybridEmbed, backbone=nn.Sequential(*layers))


def card(name: str) -> dict[str, Any]:
    """What is known of an embedded model: architecture, normalisation, classes, training, accuracy."""
    text = (resources.files(__package__) / f"{_known(name)}.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def weights_path(name: str) -> AbstractContextManager[Path]:
    """The file of an embedded model's weights, for the length of a `with` block."""
    return resources.as_file(resources.files(__package__) / f"{_known(name)}.safetensors")


def load(name: str) -> nn.Module:
    """Load an embedded model, ready for inference, with its weights in single precision.

    Raises:
        RequestError: no embedded model has that name.
    """
    with weights_path(name) as path:
        return load_from(name, path)


def load_from(name: str, path: Path) -> nn.Module:
    """Build an architecture and fill it from a safetensors file."""
    import torch
    from safetensors.torch import load_file

    model = build(name)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value
                           for key, value in load_file(path).items()})  # fmt: skip
    if name == "resnet":
        # The memory layout in which convolutions run nearly twice as fast on a CPU.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()
