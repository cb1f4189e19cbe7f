"""Copies of a model whose weights say less and less: the cascade of Adebayo et al. 2018 (arXiv:1810.03292).

Layers lose their weights from the logits down to the pixels, each stage on top of the last one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from faithmap.batch import seed_of
from faithmap.errors import RequestError, nearest
from faithmap.layers import watched
from faithmap.models import Model

#: What becomes of a weight: the tensor's entries change places, or the layer's own initialisation is drawn.
WAYS = ("shuffled", "reinitialised")


def cascade(model: Model, stages: int, how: str = "shuffled", seed: int = 0) -> Iterator[Model]:
    """Copies of a model without the weights of its last 1/stages, 2/stages, ..., of all its layers.

    "shuffled" lets the entries of every tensor change places: a layer keeps its scale, so that what comes out
    of the network, and its gradients, stay of the usual size. "reinitialised" draws each layer's own
    initialisation, as the paper does; running statistics of batch norms then start at 0 and 1, which leaves
    little of the signal in a deep network.

    Each copy is the last one, changed further: use it before asking for the next. What is drawn depends on
    the seed and the layer's name alone.

    Args:
        model: the model, which stays as it is.
        stages: steps of the cascade, 1 or more; the last one leaves no weight in place.
        how: one of `WAYS`.
        seed: of the draws.

    Raises:
        RequestError: there is no such way, or no stage.
    """
    if how not in WAYS:
        raise RequestError(f"weights cannot be '{how}'; {nearest(how, WAYS)}")
    if stages < 1:
        raise RequestError(f"stages: got {stages}, expected at least 1")
    changed = copy.deepcopy(model)
    names = layers_from_the_top(changed)
    done = 0
    for stage in range(1, stages + 1):
        upto = math.ceil(len(names) * stage / stages)
        for name in names[done:upto]:
            _forget(changed.module.get_submodule(name), how, seed_of(seed, "randomised", name))
        done = upto
        changed.forget_digests()
        changed.meter = model.meter  # passes on a copy are passes of the metric
        yield changed


def layers_from_the_top(model: Model) -> list[str]:
    """Modules that hold weights of their own, in the reverse of the order in which they finish."""
    order: dict[str, None] = {}
    holders = {
        name: module
        for name, module in model.module.named_modules()
        if list(module.parameters(recurse=False))
    }

    def note(name: str, *_: object) -> None:
        order.pop(name, None)
        order[name] = None

    # What holds others that hold weights has its own, such as positions, where it begins.
    outer = {name for name in holders if any(other.startswith(f"{name}.") for other in holders)}
    inner = [(name, module) for name, module in holders.items() if name not in outer]
    hooks = [holders[name].register_forward_pre_hook(partial(note, name)) for name in outer if name]
    try:
        with watched(inner, note), model.counting() as meter, torch.no_grad():
            model(torch.zeros(1, 3, *model.input_size, device=model.device))
            meter.forwards = 0
    finally:
        for hook in hooks:
            hook.remove()
    # What is never called, as the output layer of an attention whose weights its parent reads, goes with
    # its parent, the rest of it last but for a root with tokens or positions of its own.
    idle = [name for name in holders if name and name not in order]
    found: list[str] = []
    for name in (name for name in reversed(order) if name):
        found += [*(child for child in idle if child.rpartition(".")[0] == name), name]
    rest = [name for name in idle if name not in found]
    return [*found, *rest, *([""] if "" in holders else [])]


def _forget(module: nn.Module, how: str, seed: int) -> None:
    """Take the sense out of a module's own weights."""
    generator = torch.Generator().manual_seed(seed)
    if how == "reinitialised" and callable(reset := getattr(module, "reset_parameters", None)):
        cards = {tensor.device for tensor in module.parameters(recurse=False) if tensor.is_cuda}
        with torch.random.fork_rng(devices=list(cards)), torch.no_grad():
            torch.manual_seed(seed)
            reset()
        return
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
