"""Where a network can be cut in two, and its second part run on features that never were an image's.

A layer is a cut where every path from the image to the logits passes what it returns. Then the logits
are a function of that tensor alone, the network's tail. A layer inside a residual branch is no cut:
what goes round it reaches the logits, whatever is done to its features.

The tail of any network is had by running it whole with the layer's output exchanged. What lies before
the layer need not be computed for that: modules that are done before it are replaced by others that
return blanks of the same shape, in a copy of the module tree that shares all weights. Whether the copy
still computes the same is tried, not assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap.errors import RequestError
from faithmap.models import Model, accounted_for

#: Logits that differ by less than this share of their size are the same, computed in another order.
ROUNDING = 1e-4
#: Two images whose logits differ by less than this, behind equal features, are told apart by nothing.
LEAK = 1e-6


@dataclass(frozen=True)
class Layout:
    """Where a layer's features lie in what it returns: K channels at each of N places."""

    #: "first" for maps (B, K, h, w), "last" for maps (B, h, w, K), "tokens" for (B, N, K).
    order: str
    channels: int
    #: (h, w) of the places that lie on the image.
    grid: tuple[int, int]
    #: The places that lie on the image, row by row; of a transformer's tokens, the patches.
    patches: tuple[int, ...]
    #: All other places: class, distillation and register tokens.
    prefix: tuple[int, ...] = ()

    def units(self, output: Tensor) -> Tensor:
        """(B, K, N) from a layer's output."""
        if self.order == "first":
            return output.flatten(2)
        tokens = output if self.order == "tokens" else output.flatten(1, 2)
        return tokens.transpose(1, 2)

    def output(self, units: Tensor) -> Tensor:
        """A layer's output from (B, K, N)."""
        count, channels, _ = units.shape
        if self.order == "first":
            return units.reshape(count, channels, *self.grid)
        tokens = units.transpose(1, 2)
        return tokens if self.order == "tokens" else tokens.reshape(count, *self.grid, channels)


def find_layout(model: Model, output: Tensor, name: str, size: tuple[int, int]) -> Layout:
    """The layout of a layer's output (B, ...) for images of a size (H, W).

    Raises:
        RequestError: it is neither maps nor tokens, or `reshape` does more than to move values.
    """
    index = feature_places(model, output, name, size)
    channels, grid = len(index), (int(index.shape[1]), int(index.shape[2]))
    index, cells = index.flatten(1).cpu(), grid[0] * grid[1]
    channel = torch.arange(channels).unsqueeze(1)
    whole = channels * cells == output[0].numel()
    if output.ndim == 4 and whole and torch.equal(index, channel * cells + torch.arange(cells)):
        return Layout("first", channels, grid, tuple(range(cells)))
    places = index[0] // channels
    if torch.equal(index, places * channels + channel) and output.shape[-1] == channels:
        patches = tuple(places.tolist())
        if output.ndim == 4 and whole and patches == tuple(range(cells)):
            return Layout("last", channels, grid, patches)
        if output.ndim == 3:
            rest = set(range(output.shape[1])) - set(patches)
            return Layout("tokens", channels, grid, patches, tuple(sorted(rest)))
    raise RequestError(
        f"layer '{name}' returns a tensor {tuple(output.shape)} of which features ({channels}, {grid[0]}, "
        f"{grid[1]}) are a part; expected maps (B, C, h, w) or (B, h, w, C), or tokens (B, N, C)"
    )


def feature_places(model: Model, output: Tensor, name: str, size: tuple[int, int]) -> Tensor:
    """Where each feature (C, h, w) lies in a layer's flattened output (B, ...), for images of a size (H, W).

    Found by sending the positions themselves the way of the values.

    Raises:
        RequestError: the model's `reshape` does more than to pick and move values.
    """
    places = torch.arange(output[0].numel(), device=output.device).view(1, *output.shape[1:])
    index = model.features(places, name, size)[0]
    current = model.features(output, name, size)
    inside = index.dtype == torch.int64 and 0 <= int(index.min()) and int(index.max()) < output[0].numel()
    if not inside or not torch.equal(output.flatten(1)[:, index.flatten()], current.flatten(1)):
        raise RequestError(
            f"the features of layer '{name}' are computed from its output, not picked from it; "
            "name a layer, or give a reshape=, that only moves values"
        )
    return index


@dataclass(frozen=True)
class Cut:
    """What is known of a layer at which a network can be cut, for images of one size."""

    layer: str
    #: (H, W) of the images.
    size: tuple[int, int]
    layout: Layout
    #: Whether features are negative too, by more than the dip that smooth rectifiers have.
    signed: bool
    #: The linear layer that reads the mean over all places, where that is all of the tail.
    head: str | None
    #: Modules that need not run, with blanks in place of what they return.
    blanks: tuple[tuple[str, Any], ...]
    #: What the layer returns, with `_Features` in place of the features.
    returned: Any


_known: WeakKeyDictionary[Model, dict[tuple[str | None, tuple[int, int]], Cut | str]] = WeakKeyDictionary()


def cut_at(model: Model, layer: str | None = None, size: tuple[int, int] | None = None) -> Cut:
    """Find out whether a layer is a cut, by a few passes of two images of noise that nobody counts.

    Done once for each model, layer and image size.

    Args:
        model: the model.
        layer: dotted name of the layer. By default the model's target layer or, where that is no cut,
            as with transformers, the output of the block before the one that holds it.
        size: (H, W) of the images; the model's input size by default.

    Raises:
        RequestError: it is none; layers that are cuts are named.
    """
    size = size or model.input_size
    found = _known.setdefault(model, {})
    if (layer, size) not in found:
        try:
            found[layer, size] = _default(model, size) if layer is None else _examine(model, layer, size)
        except RequestError as error:
            found[layer, size] = str(error) + ("" if layer is None else _advice(model, layer, size))
    answer = found[layer, size]
    if isinstance(answer, str):
        raise RequestError(answer)
    return answer


def _default(model: Model, size: tuple[int, int]) -> Cut:
    """The model's target layer, else the block before its own, whose patches still speak to the head."""
    target = model.target_layer
    try:
        return _examine(model, target, size)
    except RequestError as error:
        before = _block_before(model, target)
        if before is None:
            raise
        try:
            return _examine(model, before, size)
        except RequestError:
            raise error from None


def _block_before(model: Model, layer: str) -> str | None:
    """The block that runs before the one that holds a layer; None if there is none."""
    path = layer.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.module.get_submodule(".".join(path[: depth - 1]))
        names = [name for name, _ in parent.named_children()]
        place = names.index(path[depth - 1])
        if isinstance(parent, nn.Sequential | nn.ModuleList) and place:
            return ".".join([*path[: depth - 1], names[place - 1]])
    return None


def _advice(model: Model, layer: str, size: tuple[int, int]) -> str:
    """Layers that are cuts: the nearest around the one given, and the default."""
    path, names = layer.split("."), []
    for depth in range(len(path) - 1, 0, -1):
        with suppress(RequestError):
            names.append(_examine(model, ".".join(path[:depth]), size).layer)
            break
    with suppress(RequestError):
        names.append(cut_at(model, None, size).layer)
    return "; these layers are cuts: " + ", ".join(dict.fromkeys(names)) if names else ""


def _examine(model: Model, name: str, size: tuple[int, int]) -> Cut:
    """See `cut_at`."""
    drawn = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    images = drawn.to(model.device, model.mean.dtype)
    with torch.no_grad():
        seen = _trace(model, images, name)
        layout = find_layout(model, seen.output, name, size)
        units = layout.units(seen.output).float()
        low = float(units.clamp_max(0).abs().sum()) > 0.1 * float(units.abs().sum())
        cut = Cut(name, size, layout, low, None, (), seen.returned)
        tail = NetworkTail(model, cut)
        scale = float(seen.logits.abs().max())
        own = tail.raw(units, images)
        if not _close(own, seen.logits, ROUNDING * scale):
            raise RequestError(f"exchanging the output of layer '{name}' does not reach the logits")
        strange = torch.randn(4, *units.shape[1:], generator=torch.Generator().manual_seed(1))
        # As large as features are and far beyond, so that a tail that bends anywhere near shows it.
        reach = torch.tensor([1.0, 1.0, 8.0, 8.0]).view(4, 1, 1)
        strange = units.mean() + units.std() * (reach * strange).to(units)
        leaked = tail.raw(strange[:1].expand(2, -1, -1), images)
        if not _close(leaked[:1], leaked[1:], LEAK * float(leaked.abs().max())):
            raise RequestError(
                f"layer '{name}' is no cut of model '{model.name}': two images whose features there are the "
                "same have other logits, by a way round it; name a layer that all passes through, such as "
                "the output of a stage or of a block"
            )
        logits = tail.raw(strange)
        blanks = _usable_blanks(model, cut, seen.before, strange, logits)
        head = _pooled_head(model, seen.linear, strange, logits)
    return replace(cut, head=head, blanks=blanks)


def _close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return bool(torch.isfinite(one).all()) and float((one - two).abs().max()) <= tolerance


def _usable_blanks(
    model: Model, cut: Cut, before: tuple[tuple[str, Any], ...], units: Tensor, logits: Tensor
) -> tuple[tuple[str, Any], ...]:
    """The modules before the layer, if the network gives the same logits without them."""
    try:
        found = NetworkTail(model, replace(cut, blanks=before)).raw(units)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
        return ()  # the network looks at what it computed before: all of it has to run
    return before if _close(found, logits, ROUNDING * float(logits.abs().max())) else ()


def _pooled_head(model: Model, linear: str | None, units: Tensor, logits: Tensor) -> str | None:
    """The linear layer whose answer to the mean of strange features (n, K, N) are the logits."""
    if linear is None:
        return None
    layer = model.module.get_submodule(linear)
    if type(layer) is not nn.Linear or layer.in_features != units.shape[1]:
        return None
    found = layer(units.mean(2).to(layer.weight.dtype)).float()
    fits = found.shape == logits.shape and _close(found, logits, ROUNDING * float(logits.abs().max()))
    return linear if fits else None


# --- what runs when ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blank:
    """The shape of a tensor that is returned, but for its first axis where that is the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool

    def make(self, count: int, device: torch.device) -> Tensor:
        shape = (count, *self.shape[1:]) if self.batched else self.shape
        return torch.zeros(shape, dtype=self.dtype, device=device)


class _Features:
    """Stands where the features lie in what a layer returns."""


@dataclass(frozen=True)
class _Seen:
    """What one pass of two images shows of a network."""

    logits: Tensor
    #: The layer's output, and all that it returns with `_Features` in its place.
    output: Tensor
    returned: Any
    #: The largest modules that ran once, and were done when the layer was; the layer is not among them.
    before: tuple[tuple[str, Any], ...]
    #: The linear layer that ran last.
    linear: str | None


def _trace(model: Model, images: Tensor, layer: str) -> _Seen:
    """Run once and see which modules are done before a layer."""
    order: list[tuple[str, Any]] = []
    held: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            order.append((name, _blank(output)))
            if name == layer:
                held.append(output)

        return hook

    model.layer(layer)  # says so if there is none
    handles = [sub.register_forward_hook(note(name)) for name, sub in model.module.named_modules() if name]
    try:
        with accounted_for():
            logits: Tensor = model.module(model.normalise(images))
    finally:
        for handle in handles:
            handle.remove()
    if len(held) != 1:
        how = "more than once in a pass" if held else "in no pass"
        raise RequestError(f"layer '{layer}' runs {how}; name one that runs once")
    first = held[0][0] if isinstance(held[0], tuple | list) else held[0]
    if not isinstance(first, Tensor):
        raise RequestError(
            f"layer '{layer}' returns a {type(first).__name__}; name one that returns a tensor"
        )
    names = [name for name, _ in order]
    done = dict(order[: names.index(layer)])
    once = [name for name in done if names.count(name) == 1 and done[name] is not NotImplemented]
    outer = tuple(f"{name}." for name in (*once, layer))
    largest = [name for name in once if not name.startswith(outer)]
    linear = [name for name in names if isinstance(model.module.get_submodule(name), nn.Linear)]
    returned = _blank(held[0], first)
    before = tuple((name, done[name]) for name in largest)
    return _Seen(logits.float(), first, returned, before, linear[-1] if linear else None)


def _blank(value: Any, features: Tensor | None = None) -> Any:
    """What a module returned, with a blank for each tensor; NotImplemented where that cannot be told."""
    if features is not None and value is features:
        return _Features()
    if isinstance(value, Tensor):
        return _Blank(tuple(value.shape), value.dtype, value.ndim > 0 and len(value) == 2)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, list):
        parts = [_blank(part, features) for part in value]
        return NotImplemented if NotImplemented in parts else type(value)(parts)
    return NotImplemented


def _filled(blank: Any, features: Tensor | None, count: int, device: torch.device) -> Any:
    """The tensors that blanks stand for."""
    if isinstance(blank, _Features):
        return features
    if isinstance(blank, _Blank):
        return blank.make(count, device)
    if isinstance(blank, tuple | list):
        return type(blank)(_filled(part, features, count, device) for part in blank)
    return blank


# --- tails ------------------------------------------------------------------------------------------


class NetworkTail:
    """The logits of a network as a function of a layer's features, by passes that the meter counts.

    A pass of the tail is counted as one of the whole network, whatever of it need not be computed.

    Args:
        model: the model; nothing is changed in it.
        cut: the layer.
    """

    def __init__(self, model: Model, cut: Cut) -> None:
        self._cut = cut
        self._features: Tensor | None = None
        self._count = 1
        stand_ins = {cut.layer: self._exchange(model.layer(cut.layer))}
        for name, blank in cut.blanks:
            stand_ins[name] = self._skip(model.layer(name), blank)
        self._model = _grafted(model, {f"module.{name}": module for name, module in stand_ins.items()})

    def summarise(self, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, ...) of what the tail reads of noisy features (n, K, N): all."""
        return centre, spread

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the tail reads of one image."""
        layout = self._cut.layout
        return (layout.channels, len(layout.patches) + len(layout.prefix))

    def logits(self, units: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, K, N); the graph starts at them."""
        return self._pass(units, None, self._model)

    def raw(self, units: Tensor, images: Tensor | None = None) -> Tensor:
        """The same in single precision and without being counted; for the real images (n, 3, H, W)."""
        inner: nn.Module = self._model.module
        with accounted_for():
            return self._pass(units, images, lambda batch: inner(self._model.normalise(batch)).float())

    def _pass(self, units: Tensor, images: Tensor | None, run: Callable[[Tensor], Tensor]) -> Tensor:
        mean = self._model.mean
        if images is None:
            images = torch.zeros(len(units), 3, *self._cut.size, device=mean.device, dtype=mean.dtype)
        self._features, self._count = self._cut.layout.output(units), len(units)
        grad_before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)  # until the layer is reached
            return run(images)
        finally:
            torch.set_grad_enabled(grad_before)
            self._features = None

    def _exchange(self, module: nn.Module) -> nn.Module:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            features = self._features
            assert features is not None
            torch.set_grad_enabled(features.requires_grad)
            onward = features.to(self._model.mean.dtype)
            return _filled(self._cut.returned, onward, self._count, features.device)

        return _stand_in(module, forward)

    def _skip(self, module: nn.Module, blank: Any) -> nn.Module:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return _filled(blank, None, self._count, self._model.device)

        return _stand_in(module, forward)


def _stand_in(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A copy of a module that has its attributes, and computes something else."""
    other = copy.copy(module)
    other.__dict__.update(_forward_hooks={}, _forward_pre_hooks={}, forward=forward)
    return other


def _grafted(module: Any, stand_ins: dict[str, nn.Module]) -> Any:
    """A copy of a module, its weights shared, in which modules of some dotted names are others."""
    other = copy.copy(module)
    children: dict[str, nn.Module | None] = dict(module._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for name, stand_in in stand_ins.items():
        first, _, rest = name.partition(".")
        below.setdefault(first, {})[rest] = stand_in
    for child, inner in below.items():
        children[child] = inner[""] if "" in inner else _grafted(children[child], inner)
    other.__dict__["_modules"] = children
    return other


class PooledTail:
    """Logits of a network whose tail is one linear layer on the mean of the features: exact, without a pass.

    The mean of independent normal features is normal itself, so that noise is drawn for the mean.

    Args:
        model: the model.
        cut: a cut with a `head`.
    """

    def __init__(self, model: Model, cut: Cut) -> None:
        assert cut.head is not None
        head = model.layer(cut.head)
        assert isinstance(head, nn.Linear)
        self._head = head

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the tail reads of one image."""
        return (self._head.in_features,)

    def summarise(self, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, K) of the mean of independent normal features (n, K, N)."""
        variance = spread.square().mean(2) / spread.shape[2]
        # Where there is no spread the root has no slope: the floor keeps it out of the gradient.
        return centre.mean(2), variance.clamp_min(1e-20).sqrt()

    def logits(self, pooled: Tensor) -> Tensor:
        """Logits (n, classes) of means (n, K)."""
        weight, bias = self._head.weight.detach(), self._head.bias
        kept = None if bias is None else bias.detach().to(pooled.dtype)
        return F.linear(pooled, weight.to(pooled.dtype), kept)


Tail = NetworkTail | PooledTail


def tail_of(model: Model, cut: Cut) -> Tail:
    """The cheapest exact way from a cut's features to the logits."""
    return NetworkTail(model, cut) if cut.head is None else PooledTail(model, cut)
