"""Run one explainer on one batch: evaluation mode, seeds, and the checks of what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faithmap.batch import Batch, Maps, seed_of
from faithmap.errors import FaithmapError, PluginError, RequestError
from faithmap.fitting import Fit
from faithmap.models import Model
from faithmap.parameters import keyword_only
from faithmap.plugin import FITTED, REDUCED, Plugin
from faithmap.records import Status, canonical_json
from faithmap.resize import reduce_to_grid

#: Needs of a metric that the core meets, whatever the dataset gives.
HANDED = frozenset({"explainer", "pool"})
#: All that can be known of an image: what it lacks is a matter of the dataset.
EVERYTHING = frozenset({"label", "mask", "box"})


@dataclass(frozen=True)
class MapSet:
    """The maps of a batch at the explainer's own resolution, and what became of each."""

    #: (B, h, w) float32; zeros where there is no map.
    maps: Tensor
    status: list[Status]
    #: Why there is no map; of a map that is sound, what its explainer noted of it, mostly nothing.
    reasons: list[str]

    @property
    def usable(self) -> list[int]:
        """Positions of the maps that can be scored."""
        return [i for i, status in enumerate(self.status) if status == "ok"]


def undefined(
    plugin: Plugin,
    model: Model,
    gives: frozenset[str] | set[str],
    params: Mapping[str, Any] | None = None,
) -> str:
    """Why an explainer is not defined for a model and what a dataset gives; empty where it is.

    One that cannot even say so is not defined: its mistake must not cost the maps of the others.

    Args:
        plugin: the explainer.
        model: the model.
        gives: what the images come with.
        params: all of the explainer's parameters; by default the defaults.
    """
    try:
        return why_undefined(plugin, model, gives, params)
    except Exception as error:
        return f"its defined_for raises {describe(error)}"


def why_undefined(
    plugin: Plugin,
    model: Model,
    gives: frozenset[str] | set[str],
    params: Mapping[str, Any] | None = None,
) -> str:
    """The same; what the plugin's own function raises is passed on."""
    facts = plugin.facts
    if facts.families and model.family not in facts.families:
        return f"defined for {', '.join(sorted(facts.families))}, not for {model.family}"
    with full_float32():  # some try whether a sum is exact
        return _reason(facts.defined_for, model, params or plugin.parameters) or lacking(facts.needs, gives)


def _reason(asked: Callable[..., str | None] | None, model: Model, params: Mapping[str, Any]) -> str | None:
    """What a plugin's own function says of a model, and of the parameters where it takes them."""
    if asked is None:
        return None
    taken = [
        each
        for each in inspect.signature(asked).parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default is each.empty
    ]
    return asked(model, dict(params)) if len(taken) == 2 else asked(model)


def lacking(needs: frozenset[str], gives: frozenset[str] | set[str]) -> str:
    """What a plugin needs of a dataset that the dataset does not give; empty if nothing."""
    for need in sorted(needs - HANDED):
        if need == "region" and not {"box", "mask"} & set(gives):
            return "needs boxes or masks, which the dataset does not give"
        if need != "region" and need not in gives:
            return f"needs each image's {need}, which the dataset does not give"
    return ""


def bind(
    plugin: Plugin, params: Mapping[str, Any], files: Mapping[str, str] | None = None, fit: Fit | None = None
) -> Bound:
    """Make `call(model, batch) -> maps` of an explainer, with its seeds and its random state.

    Args:
        plugin: the explainer.
        params: all of its parameters; they enter the seeds.
        files: parameters that name a file, with the place where it lies on this machine.
        fit: what an explainer that must be fitted has learnt of the model that it will be called with.
    """
    inner: Any = plugin.make({**params, **(files or {})})
    # How a fit is named is no part of the seeds, nor is what becomes of a map once it is made.
    core = {REDUCED, *([FITTED] if plugin.fits else ())} - keyword_only(plugin.target).keys()
    seeding = {name: value for name, value in params.items() if name not in core}
    side = params.get(REDUCED) if REDUCED in core else None
    key = canonical_json([plugin.name, seeding])
    return Bound(plugin, inner if fit is None else _Loading(inner, fit), key, side)


class Bound:
    """An explainer with its parameters, its fit and its seeds: what `bind` makes.

    Args:
        plugin: the explainer.
        inner: what its parameters are bound in.
        key: what its seeds depend on beside the run's seed and the image.
        side: the grid that its maps are reduced to; None leaves them.
    """

    def __init__(self, plugin: Plugin, inner: Any, key: str, side: int | str | None) -> None:
        self.plugin = plugin
        self._inner, self._key, self._side = inner, key, side

    # Whoever asks may have switched gradients off: a method need not think of it.
    @torch.enable_grad()
    def __call__(self, model: Model, batch: Batch) -> Maps:
        """The maps of a batch."""
        return _reduced(self._each(self._inner, as_maps, model, batch), self._side, model)

    @torch.enable_grad()
    def reconstruct(self, model: Model, batch: Batch) -> Tensor:
        """The images (B, 3, H, W) in [0, 1] as the explainer reconstructs them; see `reconstructs`."""
        return self._each(self._inner.reconstruct, as_images, model, replace(batch, notes={}))

    def _each(
        self,
        method: Callable[[Model, Batch], Any],
        checked: Callable[[str, Any, Batch], Tensor],
        model: Model,
        batch: Batch,
    ) -> Tensor:
        """What a method returns for a batch, checked: at once, or image by image."""
        name, facts = self.plugin.name, self.plugin.facts
        # What a map is scored against is not shown to what makes it.
        seeded = batch.with_seed_key(self._key).showing(facts.needs)
        if not facts.per_image:
            return checked(name, method(model, seeded), seeded)
        found = []
        for i in range(len(seeded)):
            single = seeded.select([i])
            with forked_random_state(seed_of(batch.seed, self._key, batch.ids[i]), model.device):
                found.append(checked(name, method(model, single), single))
            if single.notes:
                seeded.notes[i] = single.notes[0]
        return torch.cat(found)


def reconstructs(plugin: Plugin) -> bool:
    """Whether an explainer gives a reconstruction beside its maps: a class with a `reconstruct`."""
    return inspect.isclass(plugin.target) and callable(getattr(plugin.target, "reconstruct", None))


def _reduced(maps: Maps, side: int | str | None, model: Model) -> Maps:
    """Maps by area mean at the model's grid, or at one of so many cells a side; None leaves them."""
    if side is None:
        return maps
    return reduce_to_grid(maps, model.grid if isinstance(side, str) else (side, side))


class _Loading:
    """A fitted explainer that is handed its fit when it first meets a model."""

    def __init__(self, inner: Any, fit: Fit) -> None:
        self._inner, self._fit = inner, fit
        self._model: Model | None = None
        self._device: torch.device | None = None

    def __call__(self, model: Model, batch: Batch) -> Any:
        return self._ready(model)(model, batch)

    def reconstruct(self, model: Model, batch: Batch) -> Any:
        return self._ready(model).reconstruct(model, batch)

    def _ready(self, model: Model) -> Any:
        if self._model is not model or self._device != model.device:
            self._inner.load(model, self._fit.tensors())
            self._model, self._device = model, model.device
        return self._inner


@contextmanager
def forked_random_state(seed: int, device: torch.device) -> Any:
    """Seed torch's and numpy's global random states within a block and restore them behind it."""
    numpy_state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def as_maps(name: str, maps: Any, batch: Batch) -> Tensor:
    """Check the shape of what an explainer returned and bring it to float32 on the batch's device."""
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(maps)
    expected = f"expected a tensor ({len(batch)}, H, W) with H, W > 1"
    if not isinstance(maps, Tensor):
        raise PluginError(f"explainer '{name}' returned a {type(maps).__name__}; {expected}")
    if maps.ndim != 3 or len(maps) != len(batch) or min(maps.shape[1:]) < 2:
        raise PluginError(
            f"explainer '{name}' returned {tuple(maps.shape)} for images {tuple(batch.images.shape)}; "
            f"{expected}"
        )
    return maps.detach().to(batch.images.device, torch.float32)


def as_images(name: str, images: Any, batch: Batch) -> Tensor:
    """Check what an explainer's `reconstruct` returned and bring it to float32 on the batch's device."""
    expected = f"expected a tensor ({len(batch)}, 3, H, W) with values in [0, 1]"
    if not isinstance(images, Tensor):
        raise PluginError(
            f"explainer '{name}': its reconstruct returned a {type(images).__name__}; {expected}"
        )
    if images.ndim != 4 or images.shape[:2] != (len(batch), 3) or min(images.shape[2:]) < 2:
        raise PluginError(
            f"explainer '{name}': its reconstruct returned {tuple(images.shape)} for images "
            f"{tuple(batch.images.shape)}; {expected}"
        )
    found = images.detach().to(batch.images.device, torch.float32)
    if not bool(((found >= 0) & (found <= 1)).all()):  # which NaN is not either
        raise PluginError(
            f"explainer '{name}': its reconstruct returned values from {float(found.min()):g} to "
            f"{float(found.max()):g}; {expected}"
        )
    return found


def reconstruct_batch(call: Bound, model: Model, batch: Batch) -> Tensor:
    """The images (B, 3, H, W) in [0, 1] as a bound explainer reconstructs them.

    Shown and seeded as for its maps. Where these were made of the same batch, the passes that they share
    with it are not made again.

    Raises:
        FaithmapError: it gives no reconstruction, or fails on it.
    """
    name = call.plugin.name
    if not reconstructs(call.plugin):
        raise RequestError(f"explainer '{name}' gives no reconstruction; name one that has a `reconstruct`")
    try:
        with guarded(model):
            return call.reconstruct(model, batch)
    except FaithmapError:
        raise
    except Exception as error:
        raise PluginError(f"explainer '{name}': its reconstruct raises {describe(error)}") from error


def explain_batch(call: Callable[[Model, Batch], Maps], model: Model, batch: Batch) -> MapSet:
    """Run a bound explainer; an exception costs only the images that raise it.

    The model is in evaluation mode and every hook left on it is removed. A batch that raises is
    tried again image by image.
    """
    own = replace(batch, notes={})
    try:
        with guarded(model):
            found = judge(call(model, own))
        # A map that came to nothing may have a note too: which of its reasons it was.
        reasons = ["; ".join(filter(None, [said, own.notes.get(i)])) for i, said in enumerate(found.reasons)]
        return replace(found, reasons=reasons)
    except RequestError:
        raise
    except Exception as error:
        reason = describe(error)
        if len(batch) == 1:
            return MapSet(torch.zeros(1, 2, 2, device=batch.images.device), ["failed"], [reason])
    return _merge([explain_batch(call, model, batch.select([i])) for i in range(len(batch))])


def describe(error: BaseException) -> str:
    """One line that names an exception, for a row's reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def judge(maps: Tensor) -> MapSet:
    """Tell usable maps from constant ones and from those with NaN or infinity."""
    status: list[Status] = []
    reasons: list[str] = []
    finite = torch.isfinite(maps).flatten(1).all(1).tolist()
    flat = maps.nan_to_num(0.0, 0.0, 0.0).flatten(1)
    constant = (flat.amax(1) == flat.amin(1)).tolist()
    for is_finite, is_constant in zip(finite, constant, strict=True):
        if not is_finite:
            status.append("failed")
            reasons.append("the map holds NaN or infinity")
        elif is_constant:
            status.append("empty")
            reasons.append("the map is constant")
        else:
            status.append("ok")
            reasons.append("")
    return MapSet(maps.nan_to_num(0.0, 0.0, 0.0), status, reasons)


def _merge(parts: list[MapSet]) -> MapSet:
    """Join maps of single images; those that failed have no resolution of their own."""
    shapes = [part.maps.shape[1:] for part in parts if part.status[0] != "failed"]
    shape = shapes[0] if shapes else parts[0].maps.shape[1:]
    maps = [part.maps if part.maps.shape[1:] == shape else part.maps.new_zeros(1, *shape) for part in parts]
    return MapSet(torch.cat(maps), [p.status[0] for p in parts], [p.reasons[0] for p in parts])


@contextmanager
def full_float32() -> Any:
    """Within a block, convolutions of float32 numbers are in float32 on CUDA too.

    PyTorch's own default there is TF32, which keeps ten bits of each factor: maps would not be those that a
    CPU makes, and sums that are exact would not look it.
    """
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # a user has set convolutions alone, after which PyTorch refuses to read this switch
        before = None
        alone, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
    else:
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if before is None:
            cudnn.conv.fp32_precision = alone
        else:
            cudnn.allow_tf32 = before


@contextmanager
def guarded(model: Model) -> Any:
    """Keep a model as it was: evaluation flags, `requires_grad`, gradients, and its hooks.

    What is computed meanwhile is in the precision that is said, as in `full_float32`.
    """
    flags = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    hooks = {module: _hook_keys(module) for module in model.modules()}
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with full_float32():
            yield
    finally:
        for module, before in hooks.items():
            for kind, keys in before.items():
                held = getattr(module, kind)
                for key in [key for key in held if key not in keys]:
                    del held[key]
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.eval()
        for module, training in flags:
            module.training = training


HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hook_keys(module: torch.nn.Module) -> dict[str, set[int]]:
    return {kind: set(getattr(module, kind)) for kind in HOOK_KINDS}
