"""The classification head of any network: found by one forward pass, put in anew, fed with kept features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from faithmap.errors import RequestError
from faithmap.layers import watched

#: Standard deviation of a new head's weights; its biases are 0.
SPREAD = 0.01


@dataclass(frozen=True)
class Head:
    """Where a network's logits are made."""

    #: Dotted names of the layers: one, or two where a distilled transformer averages two.
    layers: tuple[str, ...]
    #: Whether the logits are the mean of these layers' outputs and nothing else, so that the head can
    #: learn on its kept inputs without the network.
    direct: bool


def find_head(module: nn.Module, example: Tensor) -> Head:
    """Find the layers that make a network's logits.

    They are linear layers, or convolutions of one pixel, with an output for each class: the last one that
    runs, where it gives the logits by itself; the last two, where their mean does; or the last one, where
    no layer with parameters runs behind it (SqueezeNet's, which is pooled afterwards).

    Args:
        module: the network, in evaluation mode.
        example: images (B, 3, H, W) as the network takes them; random ones, so that layers differ.

    Raises:
        RequestError: the network ends in something else.
    """
    ran: list[tuple[str, Tensor]] = []
    last_with_parameters = ""

    def note(name: str, layer: nn.Module, _inputs: object, output: object) -> None:
        nonlocal last_with_parameters
        last_with_parameters = name
        if _is_affine(layer) and isinstance(output, Tensor):
            ran.append((name, output))

    leaves = [
        (name, layer) for name, layer in module.named_modules()
        if name and next(layer.parameters(recurse=False), None) is not None
    ]  # fmt: skip
    with watched(leaves, note), torch.no_grad():
        logits = module(example)
    made = [(name, output.flatten(1)) for name, output in ran if output.shape[1] == logits.shape[1]]
    for count in (1, 2):
        names = tuple(name for name, _ in made[-count:])
        outputs = [output for _, output in made[-count:]]
        if len(set(names)) == count and all(output.shape == logits.shape for output in outputs):
            mean = torch.stack(outputs).mean(0)
            if torch.allclose(mean, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max() + 1e-12)):
                return Head(names, True)
    if made and made[-1][0] == last_with_parameters:
        return Head((made[-1][0],), False)
    raise RequestError(
        "no layer of the network gives its logits: expected a linear layer, or a convolution of one pixel, "
        "at its end; put one there, or fine-tune another network"
    )


def _is_affine(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def put_head(module: nn.Module, layers: Sequence[str], classes: int, seed: int = 0) -> None:
    """Put new layers, with an output for each of so many classes, in the place of a network's head.

    Args:
        module: the network, which is changed.
        layers: dotted names, as `find_head` gives them.
        classes: the number of logits from now on.
        seed: of the new weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in layers:
        holder_name, _, leaf = name.rpartition(".")
        old = module.get_submodule(name)
        new: nn.Linear | nn.Conv2d
        if isinstance(old, nn.Conv2d):
            new = nn.Conv2d(old.in_channels, classes, 1)
        elif isinstance(old, nn.Linear):
            new = nn.Linear(old.in_features, classes)
        else:
            raise RequestError(
                f"layer '{name}' is a {type(old).__name__}; expected a linear layer at the end"
            )
        weight = torch.randn(new.weight.shape, generator=generator) * SPREAD
        with torch.no_grad():
            new.weight.copy_(weight)
            new.bias.zero_()  # type: ignore[union-attr]
        setattr(module.get_submodule(holder_name), leaf, new.to(next(old.parameters()).device))
        holders = name.split(".")
        for depth in range(len(holders)):
            holder = module.get_submodule(".".join(holders[:depth]))
            for counter in ("num_classes", "num_labels"):
                if isinstance(vars(holder).get(counter), int):
                    setattr(holder, counter, classes)


class Taps:
    """Reads what goes into the layers of a head while a network runs; use it as a context."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self._layers = [module.get_submodule(name) for name in layers]

    def __enter__(self) -> Taps:
        self.inputs: list[Tensor] = [torch.empty(0)] * len(self._layers)

        def keep(place: int) -> object:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self.inputs[place] = inputs[0].detach()

            return hook

        self._handles = [
            layer.register_forward_pre_hook(keep(place))  # type: ignore[arg-type]
            for place, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def logits_of(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    """The logits (B, classes) of a direct head whose layers get these inputs."""
    outputs = [layer(given).flatten(1) for layer, given in zip(layers, inputs, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
