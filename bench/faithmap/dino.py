"""DINO's vision transformers with the linear classifiers that their authors published beside them.

timm has the transformers without a head. The classifiers are files of their own, such as
`dino_vitbase16_linearweights.pth`, and read more than the last class token. Those of ViT-S/16 and ViT-S/8
read the class tokens of the last four blocks, each behind the final norm, side by side, earlier blocks
first. Those of ViT-B/16 and ViT-B/8 read the last class token and the mean of the last patch tokens, entry
by entry in turn. Source: Caron et al. 2021 (arXiv:2104.14294), and the authors' program of linear evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from faithmap.errors import RequestError, nearest
from faithmap.heads import SPREAD
from faithmap.model_sources import load_state, misfit, read_state, unavailable

#: Blocks whose class tokens are read, whether the mean patch token is read, and the authors' file.
CLASSIFIERS: dict[str, tuple[int, bool, str]] = {
    "vit_small_patch16_224": (4, False, "dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth"),
    "vit_small_patch8_224": (4, False, "dino_deitsmall8_pretrain/dino_deitsmall8_linearweights.pth"),
    "vit_base_patch16_224": (1, True, "dino_vitbase16_pretrain/dino_vitbase16_linearweights.pth"),
    "vit_base_patch8_224": (1, True, "dino_vitbase8_pretrain/dino_vitbase8_linearweights.pth"),
}
#: Where the authors keep the classifiers.
BASE_URL = "https://dl.fbaipublicfiles.com/dino/"
CLASSES = 1000


class DinoClassifier(VisionTransformer):
    """A vision transformer of timm whose head reads what DINO's linear classifiers read."""

    read_blocks: int
    reads_patches: bool

    def forward_features(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Tokens (B, N, blocks * C) of the blocks that are read, each behind the final norm."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        read = []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - place <= self.read_blocks:
                read.append(self.norm(x))
        return read[0] if len(read) == 1 else torch.cat(read, dim=2)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """What the head takes (B, head.in_features)."""
        tokens = x[:, 0]
        if self.reads_patches:
            mean = x[:, self.num_prefix_tokens :].mean(1)
            tokens = torch.stack((tokens, mean), dim=2).flatten(1)
        return tokens


def build(name: str, params: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A DINO transformer with its classifier, and the transform that it was evaluated with.

    Args:
        name: one of `CLASSIFIERS`.
        params: `head`, the authors' file of the classifier, or a state dict with one weight and one bias;
            `weights`, the transformer's file (timm's or the authors' names, without a head), or a file of
            both; `pretrained`, which fetches what is not given; `kwargs` of timm.

    Raises:
        RequestError: the name is unknown, or a file is missing or does not fit.
    """
    if name not in CLASSIFIERS:
        raise RequestError(f"there is no DINO classifier 'dino/{name}'; {nearest(name, CLASSIFIERS)}")
    blocks, patches, file = CLASSIFIERS[name]
    given = params.get("weights")
    download = bool(params.get("pretrained", not given))
    kwargs = dict(params.get("kwargs") or {})
    classes = int(kwargs.pop("num_classes", CLASSES))
    full = f"dino/{name}"
    try:
        module: Any = timm.create_model(f"{name}.dino", pretrained=download, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        raise RequestError(f"{full} does not take kwargs {kwargs}: {error}") from error
    except Exception as error:
        if not download:
            raise
        raise unavailable(full, error) from error
    config = resolve_model_data_config(module)
    state = dict(read_state(Path(str(given)), full)) if given else {}
    both = "head.weight" in state
    if state and not both:
        load_state(module, state, Path(str(given)), full)
    # The same network, read in another way: timm builds no subclass of its own by name.
    module.__class__ = DinoClassifier
    module.read_blocks, module.reads_patches, module.num_classes = blocks, patches, classes
    module.head = nn.Linear(int(module.embed_dim) * (blocks + patches), classes)
    nn.init.normal_(module.head.weight, std=SPREAD)
    nn.init.zeros_(module.head.bias)
    if both:
        load_state(module, state, Path(str(given)), full)
    elif params.get("head"):
        path = Path(str(params["head"]))
        _load_head(module.head, read_state(path, full), str(path), full)
    elif download:
        _load_head(module.head, _published(file, full), file, full)
    elif given:
        raise RequestError(
            f"model '{full}': {given} holds no head; give head = the authors' {file.rpartition('/')[2]}"
        )
    side = config["input_size"][1:]
    # The authors resize to 256 and crop 224.
    return module, {
        "mean": config["mean"], "std": config["std"], "input_size": side, "crop_pct": 0.875,
        "interpolation": "bicubic",
    }  # fmt: skip


def _load_head(head: nn.Linear, state: Mapping[str, Tensor], file: str, full: str) -> None:
    """Load a classifier, whatever its layer is called: DINO's files say `module.linear.weight`."""
    plain = {key.rpartition(".")[2]: value for key, value in state.items()}
    fault = misfit(head.state_dict(), plain)
    if fault or len(plain) != len(state):
        raise RequestError(
            f"model '{full}': the classifier in {file} does not fit: {fault or 'it has several layers'}; "
            "expected one linear layer, as in the authors' files of linear weights"
        )
    head.load_state_dict({key: value.float() for key, value in plain.items()})


def _published(file: str, full: str) -> Mapping[str, Tensor]:
    try:
        loaded = torch.hub.load_state_dict_from_url(BASE_URL + file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unavailable(
            full, error, f"give head = the authors' {file.rpartition('/')[2]}, with weights = PATH or "
            "pretrained = true, or pretrained = false for random weights",
        ) from error  # fmt: skip
    state: Mapping[str, Tensor] = loaded.get("state_dict", loaded)
    return state
