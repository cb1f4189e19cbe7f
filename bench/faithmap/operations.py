"""The operations that a network is made of, seen while it runs, whoever calls them.

Hooks on modules miss a `functional.relu`, and one on a module that fuses a normalisation with its
activation sees neither the normalisation's output nor its gradient. Here every torch function that
is called within a block is seen, with its arguments, so that a method can put a hook on exactly the
tensor that its paper speaks of. The network itself is never touched. Compiled and scripted networks
call no torch functions that could be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from faithmap.models import Model, accounted_for

#: Piecewise linear activations that pass a value on or set it to zero (ReLU6 also caps it, and is
#: called as a `hardtanh`).
RECTIFIERS = frozenset({"relu", "relu6", "hardtanh"})
#: Other activations, taken value by value.
SMOOTH = frozenset(
    {"celu", "elu", "gelu", "hardsigmoid", "hardswish", "mish", "selu", "sigmoid", "silu", "softplus", "tanh"}
)
#: Piecewise linear through the origin, but not zero for negative values.
LEAKY = frozenset({"leaky_relu", "prelu", "rrelu"})


class Operations(TorchFunctionMode):
    """Within its block, hands every torch operation to `see`, under its name without a final "_"."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.see(getattr(func, "__name__", "").rstrip("_"), func, args, kwargs or {})

    def see(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Do the operation and return its result; operations called from here are not seen.

        Args:
            name: the function's name, the same in place and out of place.
            call: the function.
            args: its positional arguments.
            kwargs: its keywords.
        """
        return call(*args, **kwargs)


class _Names(Operations):
    """Collects the names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def see(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        self.names.add(name)
        return call(*args, **kwargs)


def operations_of(model: Model) -> frozenset[str]:
    """The names of the operations that a model calls, by one uncounted pass of a blank image."""
    blank = model.normalise(torch.zeros(1, 3, *model.input_size, device=model.device, dtype=model.mean.dtype))
    with torch.no_grad(), accounted_for(), _Names() as seen:
        model.module(blank)
    return frozenset(seen.names)
