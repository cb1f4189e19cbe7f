"""What the checks of the conformance kit share: outcomes, models, images, a witness of side effects."""

from __future__ import annotations

import copy
import gc
import random
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faithmap.batch import Batch, box_mask
from faithmap.context import Context
from faithmap.errors import FaithmapError, RequestError
from faithmap.explaining import HOOK_KINDS, describe
from faithmap.models import PASSING, Model, load_model
from faithmap.plugin import Plugin

#: A model of the kit: its name on reports, and what makes it.
ModelSource = str | Model | Callable[[], Model]
#: A CNN and a vision transformer, both embedded.
DEFAULT_MODELS = ("shapes/resnet", "shapes/vit")
#: Largest difference between maps that should be equal, as a share of the map's range.
TOLERANCE = 1e-4
#: What rounding may part two equal calls by, as a share of the map's range.
ROUNDING = 1e-5
#: What rounding may part two maps by that agree in double precision, likewise: at a kink it turns a sign.
ROUNDING_LIMIT = 1e-2
#: Least rank correlation between maps of an iterative method that should be equal.
CORRELATION = 0.999
#: Megabytes that a process may grow by in the calls that are watched.
GROWTH_MB = 20
WARM_UP, CALLS = 10, 100
#: Calls after which nothing more is asked of a plugin that has left next to nothing behind by then.
FIRST_CALLS = 25


class CheckError(FaithmapError, AssertionError):
    """A plugin broke a promise; the message says what was seen, what was expected, what to do."""


class CheckSkipped(unittest.SkipTest):
    """A check that does not apply to a plugin; test runners take it for a skipped test."""


def fail(seen: str, expected: str, advice: str) -> CheckError:
    """Make the failure of a check, its message in three parts."""
    return CheckError(f"{seen}; expected {expected}. {advice}")


@contextmanager
def isolated() -> Iterator[None]:
    """Keep what a badly behaved plugin may change in the process away from the next check."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    enabled, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        # Warnings have a check of their own; in the others they must not turn into errors.
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_grad_enabled(enabled)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def named_sources(models: Sequence[ModelSource] | Mapping[str, ModelSource] | None) -> dict[str, ModelSource]:
    """The models of a kit by name: registry names, `Model`s, or functions that make one."""
    given = DEFAULT_MODELS if models is None else models
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str | Model) or not isinstance(given, Sequence):
        raise RequestError(f"models is {given!r}; expected a list of them, or a dictionary by name")
    named: dict[str, ModelSource] = {}
    for source in given:
        name = source if isinstance(source, str) else getattr(source, "name", "")
        name = str(name or getattr(source, "__name__", "") or "model")
        if name in named:
            raise RequestError(f"two models of the kit are named '{name}'; give a dictionary by name")
        named[name] = source
    return named


def build(source: ModelSource) -> Model:
    """Make a model of the kit; without touching the global random state of the process."""
    with isolated():
        if isinstance(source, Model):
            return copy.deepcopy(source).eval()
        made = load_model(source) if isinstance(source, str) else source()
    if not isinstance(made, Model):
        raise RequestError(f"a model of the kit is a {type(made).__name__}; expected a faithmap.Model")
    return made.eval()


def make_batch(model: Model, count: int = 3, *, region: bool = True, seed: int = 0) -> Batch:
    """Noisy clouds with a bright rectangle each, known by mask and box; the predictions are explained.

    Args:
        model: the model, at whose input size the images are.
        count: how many.
        region: give masks, boxes and labels too.
        seed: of the images and of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = model.input_size
    clouds = torch.rand(count, 3, 6, 6, generator=generator)
    images = nn.functional.interpolate(clouds, size=(height, width), mode="bicubic", align_corners=False)
    images = 0.6 * images + 0.2 * torch.rand(count, 3, height, width, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * 0.5 + 0.1
    boxes = []
    for i, (top, left) in enumerate(corners.tolist()):
        box = [round(left * width), round(top * height), round((left + 0.35) * width),
               round((top + 0.3) * height)]  # fmt: skip
        boxes.append(torch.tensor([box], dtype=torch.float32))
        colour = torch.rand(3, 1, 1, generator=generator).round()
        images[i, :, box[1] : box[3], box[0] : box[2]] = 0.2 + 0.75 * colour
    images = images.clamp(0, 1).to(model.device)
    context = Context(model, images)
    targets = context.logits.argmax(1)
    masks = torch.stack([box_mask(box, (height, width)) for box in boxes]).to(model.device)
    return Batch(
        images=images,
        targets=targets,
        ids=tuple(f"image-{i}" for i in range(count)),
        context=Context(model, images),
        labels=targets.clone() if region else None,
        masks=masks if region else None,
        boxes=boxes if region else None,
        grid=_grid(model),
        seed=seed,
    )


def _grid(model: Model) -> tuple[int, int] | None:
    try:
        return model.grid
    except RequestError:  # a network without spatial features
        return None


# --- what a call changes ---------------------------------------------------------------------------


@dataclass
class Witness:
    """Remembers a model, a batch and the process, and tells afterwards what is no longer the same."""

    model: Model
    batch: Batch
    before: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._look()

    def changes(self) -> dict[str, list[str]]:
        """What differs, by kind: "inputs", "weights", "gradients", "flags", "hooks", "random state", ..."""
        after = self._look()
        return {
            kind: [
                name
                for name in {**held, **after[kind]}
                if not _same(held.get(name, _ABSENT), after[kind].get(name, _ABSENT))
            ]
            for kind, held in self.before.items()
        }

    def _look(self) -> dict[str, dict[str, Any]]:
        modules = dict(self.model.named_modules())
        parameters = dict(self.model.named_parameters())
        return {
            "inputs": _inputs(self.batch),
            "weights": {
                name: value.detach().clone()
                for name, value in (*parameters.items(), *self.model.named_buffers())
            },
            "gradients": {
                name: p.grad if p.grad is None else p.grad.clone() for name, p in parameters.items()
            },
            "flags": _flags(modules, parameters),
            "hooks": _hooks(modules, parameters),
            "random state": random_states(),
            "settings": {
                "torch.is_grad_enabled()": torch.is_grad_enabled(),
                "torch.get_default_dtype()": torch.get_default_dtype(),
                "torch.get_num_threads()": torch.get_num_threads(),
                "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
            },
        }


_ABSENT = object()


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool(torch.equal(one, two))
    return type(one) is type(two) and bool(one == two)


def _inputs(batch: Batch) -> dict[str, Any]:
    held = {"images": batch.images, "targets": batch.targets, "labels": batch.labels, "masks": batch.masks}
    seen: dict[str, Any] = {name: _copied(tensor) for name, tensor in held.items()}
    seen |= {f"boxes[{i}]": box.clone() for i, box in enumerate(batch.boxes or ())}
    seen["images.requires_grad"] = batch.images.requires_grad
    seen["images.grad"] = _copied(batch.images.grad)
    return seen


def _flags(modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Training flags, `requires_grad`, and every plain attribute: a switch, an eps, a patched method."""
    flags: dict[str, Any] = {}
    for name, module in modules.items():
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if not key.startswith("_") and (plain or callable(value)):
                flags[f"{name or 'model'}.{key}"] = value if plain else id(value)
        flags[f"{name or 'model'}, children"] = [id(child) for child in module.children()]
    flags |= {f"{name}.requires_grad": parameter.requires_grad for name, parameter in parameters.items()}
    return flags


def _hooks(modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    hooks: dict[str, Any] = {}
    for name, module in modules.items():
        for kind in HOOK_KINDS:
            hooks[f"{name or 'model'}, {kind}"] = sorted(getattr(module, kind))
    for name, parameter in parameters.items():
        hooks[f"{name}, _backward_hooks"] = sorted(parameter._backward_hooks or ())
    for kind, held in vars(torch.nn.modules.module).items():
        if kind.startswith("_global_") and kind.endswith("_hooks"):
            hooks[f"torch.nn.modules.module.{kind}"] = sorted(held)
    return hooks


def random_states() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators."""
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(legacy["state"]["pos"]) + np.asarray(legacy["state"]["key"]).tobytes().hex(),
        "python": random.getstate(),
    }


def listed(names: Sequence[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- one watched call ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One call of a plugin: what it returned or raised, and what it did beside."""

    result: Any = None
    error: Exception | None = None
    warnings: tuple[str, ...] = ()
    changes: Mapping[str, list[str]] = field(default_factory=dict)
    forwards: int = 0
    backwards: int = 0
    #: Images given to the network past the model, which no meter sees.
    beside: int = 0
    #: Type of the numbers that came back, where they are a tensor.
    dtype: torch.dtype | None = None

    @property
    def said(self) -> str:
        """The error in one line."""
        return "" if self.error is None else describe(self.error)


def watch(call: Callable[[], Any], model: Model, batch: Batch, *, gradients: bool = True) -> Seen:
    """Make one call of a plugin and note everything that a check may ask about."""
    result, error = None, None
    with isolated(), torch.set_grad_enabled(gradients):
        witness = Witness(model, batch)
        with (
            warnings.catch_warnings(record=True) as caught,
            model.counting() as meter,
            _beside(model) as passes,
        ):
            warnings.simplefilter("always")
            try:
                result = call()
            except Exception as raised:
                error = raised
        changes = witness.changes()
    said = tuple(
        f"{w.category.__name__}: {str(w.message).splitlines()[0][:160]}" for w in caught if str(w.message)
    )
    return Seen(result, error, said, changes, meter.forwards, meter.backwards, sum(passes))


@contextmanager
def _beside(model: Model) -> Iterator[list[int]]:
    """How many images go through the network without the model, which counts them; copies included."""
    passes: list[int] = []

    def note(_module: nn.Module, inputs: Any) -> None:
        if not PASSING.depth:
            passes.append(len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else 1)

    handle = model.module.register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


class InterruptionError(RuntimeError):
    """Raised inside a model on purpose."""


@contextmanager
def tripwire(model: Model, passes: int) -> Iterator[list[int]]:
    """Make a model raise in its n-th forward pass, in its last layer; yields how often it was passed.

    Raises:
        CheckSkipped: the model has no layer that could hold the wire.
    """
    order: list[nn.Module] = []
    leaves = [module for module in model.module.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(lambda module, _in, _out: order.append(module)) for leaf in leaves]
    try:
        with torch.no_grad(), isolated():
            model.module(model.normalise(torch.zeros(1, 3, *model.input_size, device=model.device)))
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise CheckSkipped("the model has no layers that can be watched")
    passed: list[int] = []

    def trip(_module: nn.Module, _inputs: Any) -> None:
        passed.append(len(passed) + 1)
        if len(passed) == passes:
            raise InterruptionError(f"the model fails in forward pass {passes}, on purpose")

    handle = order[-1].register_forward_pre_hook(trip)
    try:
        yield passed
    finally:
        handle.remove()


# --- memory ----------------------------------------------------------------------------------------


def resident_mb() -> float | None:
    """Megabytes of this process in memory, after tidying up; None where the system does not say."""
    gc.collect()
    if sys.platform.startswith("linux"):
        import ctypes
        import resource

        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    return None


@dataclass(frozen=True)
class Growth:
    """What calls have left behind."""

    #: Tensors that are alive and were not, and their megabytes. One call in two that leaves one is a leak.
    tensors: int
    tensors_mb: float
    #: Megabytes that the process has grown by; None where the system does not say.
    process_mb: float | None

    @property
    def leaks(self) -> str:
        """What is too much, in words; empty where nothing is."""
        if self.tensors >= CALLS // 2 or self.tensors_mb >= GROWTH_MB:
            return f"leave {self.tensors} tensors of {self.tensors_mb:.1f} MB behind"
        if self.process_mb is not None and self.process_mb >= GROWTH_MB:
            return f"grow the process by {self.process_mb:.0f} MB"
        return ""

    def within(self, share: float) -> bool:
        """Whether it is no more than a share of what would be a leak."""
        process = 0.0 if self.process_mb is None else self.process_mb
        most = share * GROWTH_MB
        return self.tensors <= share * CALLS / 2 and self.tensors_mb <= most and process <= most


def growth(call: Callable[[], Any]) -> Growth:
    """What the watched calls leave behind, the warm-up not counted.

    Tensors are counted beside the process: what is small on a small image is large on a large one. After
    the first calls, what leaks would have left a quarter of it; where there is a twentieth, that is all.
    """
    for _ in range(WARM_UP):
        call()
    before, held = resident_mb(), live_tensors()
    done = 0
    for calls in (FIRST_CALLS, CALLS):
        for _ in range(calls - done):
            call()
        done = calls
        after, kept = resident_mb(), live_tensors()
        process = None if before is None or after is None else after - before
        grown = Growth(kept[0] - held[0], kept[1] - held[1], process)
        if grown.within(0.05):
            break
    return grown


def live_tensors() -> tuple[int, float]:
    """How many tensors Python holds, and their megabytes; views share theirs."""
    gc.collect()
    count, storages = 0, {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # its own word, as isinstance asks stand-ins for theirs
            count += 1
            with suppress(Exception):  # such as tensors without storage
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return count, sum(storages.values()) / 1e6


# --- facts -----------------------------------------------------------------------------------------


def check_common_facts(plugin: Plugin) -> None:
    """Fail where a plugin does not say what every plugin must."""
    facts = plugin.facts
    if isinstance(facts.version, bool) or not isinstance(facts.version, int) or facts.version < 1:
        raise fail(
            f"version={facts.version!r}", "a whole number from 1 on", "Raise it whenever the values change."
        )
    if not str(facts.source).strip():
        raise fail(
            "source is empty", "where the method comes from", "Name the paper and the equation, or the file."
        )
    if not plugin.summary.endswith((".", "!", "?")):
        raise fail(
            f"the docstring begins {plugin.summary[:60]!r}",
            "a first paragraph that ends in a full stop",
            "Say in one sentence what it does: `faithmap list` prints it.",
        )
    try:
        plugin.check(facts.check_params)
    except RequestError as error:
        raise CheckError(f"check_params do not fit the signature: {error}. Mend check_params=.") from error
