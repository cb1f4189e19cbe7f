"""Where a network keeps its last spatial features, found without the user naming a layer.

CNNs: the module executed last whose output is a map (B, C, h, w) of more than one cell. Vision
transformers: the first norm of the last block, since after that block the patch tokens carry no
gradient when the class token is pooled; tokens are folded back to a grid by dropping the prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from faithmap.errors import RequestError, nearest

#: Turns a layer's output into features (B, C, h, w).
Reshape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Anatomy:
    """What is known of a network's insides."""

    family: str
    #: Dotted name of the target layer.
    layer: str
    #: (h, w) of the target layer's features at the model's input size.
    grid: tuple[int, int]
    reshape: Reshape | None
    classes: int


def fold_tokens(grid: tuple[int, int]) -> Reshape:
    """Make a function that drops prefix tokens (class, distillation, registers) and folds the rest.

    The number of prefix tokens is what is left over by the grid; at another input size the grid
    is taken as the largest square that the tokens fill.
    """

    def reshape(tokens: Tensor) -> Tensor:
        height, width = grid
        count = tokens.shape[1]
        if count < height * width or count - height * width > 16:
            height = width = math.isqrt(count)
        patches = tokens[:, count - height * width :]
        return patches.transpose(1, 2).reshape(len(tokens), tokens.shape[2], height, width)

    return reshape


def as_features(output: object, reshape: Reshape | None, layer: str, size: tuple[int, int]) -> Tensor:
    """Bring a layer's output to (B, C, h, w), or say why it cannot be.

    Args:
        output: what the layer returned.
        reshape: folds tokens (B, N, C) to features; not used on outputs that are maps already.
        layer: the layer's name, for messages.
        size: (H, W) of the images, which tells channels-first maps from channels-last ones.
    """
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise RequestError(
            f"layer '{layer}' returns a {type(output).__name__}; name a layer that returns a tensor"
        )
    if output.ndim == 4:
        return _channels_first(output, size)
    features = reshape(output) if reshape is not None else output
    if features.ndim != 4:
        raise RequestError(
            f"layer '{layer}' returns a tensor of shape {tuple(output.shape)}; expected (B, C, h, w): "
            "name another target_layer, or give reshape= a function that folds tokens to a grid"
        )
    return features


def _channels_first(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring (B, h, w, C), which Swin-like models use, to (B, C, h, w).

    A map has the proportions of the image, to within a cell; channels have not.
    """

    def proportional(height: int, width: int) -> bool:
        return abs(height * size[1] - width * size[0]) <= max(size)

    _, first, second, third = maps.shape
    if not proportional(second, third) and proportional(first, second):
        return maps.permute(0, 3, 1, 2)
    return maps


def find_anatomy(
    module: nn.Module,
    example: Tensor,
    layer: str | None = None,
    reshape: Reshape | None = None,
    family: str | None = None,
) -> Anatomy:
    """Find family, target layer, feature grid and number of classes by one forward pass.

    Args:
        module: the network, in evaluation mode, taking normalised images.
        example: one image (1, 3, H, W), as the network takes it.
        layer: a dotted module name, or a place as `layer_at` takes it, instead of the one found.
        reshape: turns that layer's output into (B, C, h, w).
        family: "cnn" or "vit" where the user knows better.

    Raises:
        RequestError: the layer does not exist, no spatial features could be found, or the network
            has no classes.
    """
    if getattr(module, "num_classes", None) == 0:
        raise RequestError(
            "the network has no classification head (num_classes=0), so there is no class to explain; "
            "give it one, with kwargs such as {num_classes = 1000} and weights that were trained with it"
        )
    if layer is not None and ":" in layer:
        layer = layer_at(module, example, layer)
    tokens = _token_layout(module)
    found_family = family or ("vit" if tokens is not None or _is_windowed(module) else "cnn")
    if layer is None and tokens is not None:
        layer = tokens[0]
    if reshape is None and tokens is not None and layer is not None:
        reshape = fold_tokens(tokens[1])
    size = (int(example.shape[2]), int(example.shape[3]))
    outputs, logits = _trace(module, example)
    if logits.ndim != 2:
        raise RequestError(
            f"the model returns a tensor of shape {tuple(logits.shape)}; expected logits (B, classes)"
        )
    if layer is None:
        layer = _last_map(outputs, size)
    if layer not in dict(module.named_modules()):
        names = [name for name, _ in module.named_modules() if name]
        raise RequestError(f"the model has no layer '{layer}'; {nearest(layer, names)}")
    if layer not in outputs:
        raise RequestError(
            f"layer '{layer}' takes no part in the model's forward pass; name another target_layer"
        )
    features = as_features(outputs[layer], reshape, layer, size)
    grid = (int(features.shape[2]), int(features.shape[3]))
    return Anatomy(found_family, layer, grid, reshape, int(logits.shape[1]))


def layer_at(module: nn.Module, example: Tensor, place: str) -> str:
    """The dotted name of a layer that is named by its depth, as papers do.

    Args:
        module: the network, in evaluation mode.
        example: one image (1, 3, H, W), as the network takes it.
        place: "block:9/12" is the block of a plain vision transformer that ends this share of its depth:
            the 9th of 12, the 5th of 6. "stage:-1", "stage:-2", ... is the end of a CNN's stage: the last
            layer of its smallest grid of features, of the next larger one, and so on: of a ResNet at 224
            pixels those of 7 x 7, 14 x 14 and 28 x 28.

    Raises:
        RequestError: the place is malformed, or the network has none such.
    """
    block = re.fullmatch(r"block:(\d+)/(\d+)", place)
    stage = re.fullmatch(r"stage:-(\d+)", place)
    if block and 0 < int(block[1]) <= int(block[2]):
        names = block_names(module)
        if not names:
            raise RequestError(f"layer '{place}': the model is no plain vision transformer; write 'stage:-1'")
        return names[math.ceil(len(names) * int(block[1]) / int(block[2])) - 1]
    if stage and int(stage[1]) > 0:
        if block_names(module):
            raise RequestError(f"layer '{place}': the model is a vision transformer; write 'block:1/2'")
        ends = stage_ends(module, example)
        if int(stage[1]) > len(ends):
            raise RequestError(f"layer '{place}': the model has {len(ends)} grids of features")
        return ends[-int(stage[1])]
    raise RequestError(
        f"layer '{place}': expected the dotted name of a layer, 'block:9/12' (a share of a transformer's "
        "depth) or 'stage:-2' (a CNN's last stage but one)"
    )


def stage_ends(module: nn.Module, example: Tensor) -> list[str]:
    """The last layer of each grid of features (B, C, h, w), from the largest grid to the smallest.

    What lies within a block that takes one grid and gives a smaller one counts as part of the next stage.
    """
    size = (int(example.shape[2]), int(example.shape[3]))
    grids: dict[str, tuple[int | None, int | None]] = {}

    def cells(value: object) -> int | None:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return None
        height, width = _channels_first(value, size).shape[2:]
        return int(height * width)

    def note(name: str, inputs: object, output: Tensor) -> None:
        first = inputs[0] if isinstance(inputs, tuple) and inputs else None
        grids[name] = (cells(first), cells(output))

    outputs, _ = _trace(module, example, note)
    ends: dict[int, str] = {}
    for name in outputs:
        grid = grids[name][1]
        parts = name.split(".")
        holders = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        within = (grids.get(holder, (None, None)) for holder in holders)
        leaving = any(taken == grid and given != grid for taken, given in within)
        if grid is not None and grid > 1 and not leaving:
            ends[grid] = name
    return [ends[grid] for grid in sorted(ends, reverse=True)]


@contextmanager
def watched(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, object, object], None]
) -> Iterator[None]:
    """Within the block, `see(name, module, inputs, output)` is told of each of these modules that has run."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, output: see(name, module, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(
    module: nn.Module, example: Tensor, note: Callable[[str, object, Tensor], None] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Run once and keep every submodule's tensor output, in the order in which they finished."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            outputs.pop(name, None)
            outputs[name] = output
            if note is not None:
                note(name, inputs, output)

    parts = ((name, part) for name, part in module.named_modules() if name)
    with watched(parts, keep), torch.no_grad():
        logits = module(example)
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"the model returns a {type(logits).__name__}; expected a tensor of logits (B, classes): "
            "wrap it in a module that returns the logits alone"
        )
    return outputs, logits


def _last_map(outputs: dict[str, Tensor], size: tuple[int, int]) -> str:
    """The last output that is a map of more than one cell."""
    for name, output in reversed(outputs.items()):
        if output.ndim == 4:
            height, width = _channels_first(output, size).shape[2:]
            if height * width > 1:
                return name
    raise RequestError(
        "no layer of the model returns a feature map (B, C, h, w) of more than one cell; "
        "name one with target_layer= and, for tokens, reshape="
    )


def _is_windowed(module: nn.Module) -> bool:
    return any("Swin" in type(sub).__name__ for sub in module.modules())


def middle_block(module: nn.Module) -> str | None:
    """The block halfway up a plain vision transformer, such as the 6th of 12; None for other networks."""
    names = block_names(module)
    return names[(len(names) + 1) // 2 - 1] if names else None


def block_names(module: nn.Module) -> list[str]:
    """The blocks of a plain vision transformer, first to last; none for other networks."""
    tokens = _token_layout(module)
    if tokens is None:
        return []
    blocks = tokens[0].rpartition(".")[0].rpartition(".")[0]
    return [f"{blocks}.{name}" for name, _ in module.get_submodule(blocks).named_children()]


def _token_layout(module: nn.Module) -> tuple[str, tuple[int, int]] | None:
    """Target layer and token grid of the plain vision transformers that are known by their shape."""
    blocks = getattr(module, "blocks", None)
    embed = getattr(module, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if (
        isinstance(blocks, nn.Sequential | nn.ModuleList)
        and grid is not None
        and hasattr(blocks[-1], "norm1")
    ):
        return f"blocks.{len(blocks) - 1}.norm1", (int(grid[0]), int(grid[1]))  # timm
    encoder = getattr(module, "encoder", None)
    if hasattr(module, "conv_proj") and hasattr(encoder, "layers"):
        side = int(module.image_size) // int(module.patch_size)  # type: ignore[arg-type]
        last = [name for name, _ in encoder.layers.named_children()][-1]  # type: ignore[union-attr]
        return f"encoder.layers.{last}.ln_1", (side, side)  # torchvision
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "patch_size") and hasattr(config, "image_size"):
        names = [name for name, _ in module.named_modules() if name.endswith("layernorm_before")]
        if names:
            side = int(config.image_size) // int(config.patch_size)
            return names[-1], (side, side)  # Hugging Face
    return None
