"""`faithmap train`: fit an explainer to a model, with checkpoints, and keep the fit by content key."""

from __future__ import annotations

import inspect
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader

from faithmap import fitting
from faithmap.data import LoadedDataset
from faithmap.errors import FaithmapError, RequestError, nearest
from faithmap.explaining import describe, guarded
from faithmap.fitting import Fit
from faithmap.learning_record import circumstances, counted, curve_csv, data_entry, device_name
from faithmap.models import Model
from faithmap.parameters import annotated_types, check_type, with_defaults
from faithmap.plugin import Plugin
from faithmap.records import Sample, digest
from faithmap.store import write_bytes
from faithmap.training_images import Images, Seen, collate, epoch_order

#: Seconds between two checkpoints.
EVERY = 60.0


class Watcher(Protocol):
    """Is told how a fit goes on."""

    def begin(self, title: str, steps: int, done: int) -> None:
        """The first step is known: so many in all, so many done before."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done."""

    def end(self) -> None:
        """The last step is done."""


class Silent:
    """Nobody watches."""

    def begin(self, title: str, steps: int, done: int) -> None:
        """Nothing is shown."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is shown."""

    def end(self) -> None:
        """Nothing is shown."""


class TrainingData:
    """The images that an explainer is fitted to, in an order that the seed and the epoch alone decide.

    Args:
        samples: the images.
        model: whose evaluation transform they pass, and on whose device they come.
        seed: of the order.
        workers: processes that read images; 0 reads them here and keeps them while they fit in 2 GiB.
    """

    def __init__(self, samples: Sequence[Sample], model: Model, seed: int, workers: int = 0) -> None:
        self._images = Images(samples, model, keep=workers == 0)
        self._ids = [sample.id for sample in samples]
        self._device, self._seed, self._workers = model.device, seed, workers
        #: Ids of the images that could not be read, with the reason.
        self.unreadable: dict[str, str] = {}
        #: Which images were learnt from.
        self.seen = Seen(len(samples))

    def __len__(self) -> int:
        return len(self._images)

    def steps(self, batch_size: int, *, drop_last: bool = False) -> int:
        """Batches in an epoch."""
        count = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        return max(1, count) if len(self) else 0

    def batches(
        self, batch_size: int, epoch: int, *, shuffle: bool = True, drop_last: bool = False, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) in [0, 1] and labels (B,), -1 where unknown, of one epoch.

        Images that cannot be read are left out of their batch, which may leave a batch of none.

        Args:
            batch_size: images in a batch.
            epoch: from 0; with the seed it decides the order.
            shuffle: False keeps the order of the dataset.
            drop_last: leave out a last batch that is smaller than the others, unless it is the only one.
            start: leave out so many batches, when a fit goes on within an epoch.
        """
        order = epoch_order(len(self), self._seed, epoch) if shuffle else list(range(len(self)))
        count = self.steps(batch_size, drop_last=drop_last)
        chosen = [order[i * batch_size : (i + 1) * batch_size] for i in range(start, count)]
        loader: Any = DataLoader(
            self._images, batch_sampler=chosen, num_workers=self._workers, collate_fn=collate
        )
        for positions, (images, labels, faults) in zip(chosen, loader, strict=True):
            self.unreadable.update(faults)
            self.seen.hand([i for i in positions if self._ids[i] not in faults])
            yield images.to(self._device, non_blocking=True), labels.to(self._device)
            self.seen.count()


@dataclass
class Session:
    """One fit: its seed, its checkpoints and its curve.

    `seed` and `precision` ("fp32" or "bf16") are what `fit` must follow.
    """

    seed: int = 0
    precision: str = "fp32"
    #: Where checkpoints are written; None for none.
    file: Path | None = None
    watcher: Watcher = field(default_factory=Silent)
    every: float = EVERY
    title: str = ""
    #: What was reported, a step a line.
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    #: Set to stop at the next checkpoint that is offered.
    stopping: bool = False
    #: Counts the images that are learnt from; None counts none.
    seen: Seen | None = None
    #: Ids of the images that could not be read, with the reason: those of the data that are learnt from.
    unreadable: dict[str, str] = field(default_factory=dict)
    #: What it runs on, in words.
    device: str = ""
    #: What it ran on before it was interrupted, in the order of use.
    before: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._begun = False

    def resume(self) -> dict[str, Any] | None:
        """What the last checkpoint of this very fit holds; None at the first start.

        Raises:
            FaithmapError: the checkpoint is damaged.
        """
        if self.file is None or not self.file.is_file():
            return None
        with self.restoring():
            held = torch.load(self.file, map_location="cpu", weights_only=True)
            self.curve, self.seconds = list(held["curve"]), float(held["seconds"])
            self.before = list(held.get("devices", ()))
            state: dict[str, Any] = held["state"]
            if self.seen is not None:
                self.seen.restore(held.get("seen"))
            self.unreadable.update(held.get("unreadable", {}))
        self._started = time.monotonic()
        return state

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Take up what a checkpoint holds; what goes wrong in this is said of the checkpoint.

        Raises:
            FaithmapError: it cannot be read, or does not fit what is to go on from it.
        """
        try:
            yield
        except Exception as error:
            raise FaithmapError(
                f"the checkpoint {self.file} is damaged ({type(error).__name__}); delete it, or run again "
                "with --fresh"
            ) from error

    def checkpoint(self, make_state: Callable[[], dict[str, Any]]) -> None:
        """Offer the state after a step: it is asked for and written when the last one is a minute old.

        The state must be enough to go on to the same result: parameters, optimiser, schedule, step.

        Raises:
            KeyboardInterrupt: the user has asked to stop; the state is written.
        """
        if self.file is None:
            if self.stopping:
                raise KeyboardInterrupt
            return
        if time.monotonic() - self._last < self.every and not self.stopping:
            return
        buffer = io.BytesIO()
        held = {
            "state": make_state(),
            "curve": self.curve,
            "seconds": self.elapsed(),
            "devices": self.devices,
            "unreadable": dict(self.unreadable),
        }
        if self.seen is not None:
            held["seen"] = self.seen.state()
        torch.save(held, buffer)
        write_bytes(self.file, buffer.getvalue())
        self._last = time.monotonic()
        if self.stopping:
            raise KeyboardInterrupt

    def report(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Say what a step came to: losses and whatever tells how it goes.

        Args:
            step: steps done, from 1.
            steps: steps in all.
            values: names and numbers, the same names at every step.
        """
        if not self._begun:
            self.watcher.begin(self.title, steps, step - 1)
            self._begun = True
        if self.seen is not None:
            self.seen.count()
        self.curve.append({"step": float(step), **{key: float(value) for key, value in values.items()}})
        self.watcher.step(step, values)

    @property
    def devices(self) -> list[str]:
        """All that it has run on, those before an interruption included."""
        return list(dict.fromkeys(name for name in (*self.before, self.device) if name))

    def elapsed(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self.seconds + time.monotonic() - self._started


@dataclass(frozen=True)
class Training:
    """A checked request to fit one explainer to one model."""

    plugin: Plugin
    params: Mapping[str, Any]
    model: Model
    dataset: LoadedDataset
    samples: tuple[Sample, ...]
    options: Mapping[str, Any]
    part: str = "all"
    limit: int | None = None
    seed: int = 0
    precision: str = "fp32"
    workers: int = 0

    @property
    def served(self) -> str:
        """The key of what the fit serves."""
        return fitting.served_key(self.plugin, self.params, self.model)

    @property
    def file_name(self) -> str:
        """The file of the fit, in whatever folder."""
        return fitting.file_name(self.served, self.key)

    @property
    def key(self) -> str:
        """The key of how the fit comes about."""
        ids = [sample.id for sample in self.samples]
        found = digest(
            self.served, self.plugin.file_sha256(), self.dataset.key, ids, repr(self.model.transform),
            dict(self.options), self.seed, self.precision, length=11,
        )  # fmt: skip
        return f"f{found}"  # a letter first: on the command line it is no number


def fit_options(plugin: Plugin, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an explainer's `fit`, with `given` over the defaults, less those without an effect.

    Raises:
        RequestError: the explainer is not fitted, or an option is unknown or of another type.
    """
    if not plugin.fits:
        raise RequestError(f"explainer '{plugin.name}' is not fitted: it explains any model as it is")
    known, annotated = plugin.fit_options, annotated_types(plugin.target.fit)  # type: ignore[attr-defined]
    for key, value in given.items():
        if key not in known:
            raise RequestError(
                f"the fit of '{plugin.name}' has no option '{key}'; "
                + (nearest(key, known) if known else "it has none")
            )
        where = f"the fit of '{plugin.name}', option '{key}'"
        check_type(where, value, known[key], annotated.get(key, ()))
    options = with_defaults(known, given)
    missing = [key for key, value in options.items() if value is inspect.Parameter.empty]
    if missing:
        raise RequestError(
            f"the fit of '{plugin.name}' needs the option '{missing[0]}'; give --set {missing[0]}=VALUE"
        )
    idle = getattr(plugin.target, "idle_options", lambda _: ())(options)
    return {key: value for key, value in options.items() if key not in idle}


def train(
    request: Training,
    watcher: Watcher | None = None,
    *,
    out: Path | None = None,
    fresh: bool = False,
    half: bool = False,
    every: float = EVERY,
) -> Fit:
    """Fit, keep the fit, and return it; a fit that is there already is not made again.

    A killed fit goes on from its last checkpoint when the same request is made again.

    Args:
        request: what is fitted to what.
        watcher: is told how it goes on.
        out: a folder that takes the place of the user's folder of fits.
        fresh: begin anew, whatever there is.
        half: keep the fit in half precision.
        every: seconds between two checkpoints.

    Raises:
        RequestError: the explainer needs no fit with these parameters, or another process makes it.
    """
    if not fitting.wants_fit(request.plugin, request.params):
        raise RequestError(fitting.needless(request.plugin, request.params))
    folder = fitting.folders(request.plugin.name)[0] if out is None else out
    file = folder / request.file_name
    if out is None and not fresh:
        fitting.adopt(request.plugin.name, file.name)
    if file.is_file() and not fresh:
        made = fitting.read(file)
        if half and not made.record.get("half"):
            made = fitting.write(file, made.tensors(), made.record, half)
        return made
    checkpoint = file.with_suffix(".checkpoint")
    with making(file, "name one with --out"):
        if fresh:
            checkpoint.unlink(missing_ok=True)
        spec = fitting.spec_text(request.plugin, request.params)
        session = Session(
            request.seed, request.precision, checkpoint, watcher or Silent(), every,
            title=f"{spec} · {request.model.name} · {request.dataset.label}",
            device=device_name(request.model),
        )  # fmt: skip
        with stoppable(session):
            tensors, data = _fit(request, session)
        made = fitting.write(file, tensors, _record(request, session, tensors, data), half)
        write_bytes(file.with_suffix(".csv"), curve_csv(session.curve).encode())
        checkpoint.unlink(missing_ok=True)
        return made


@contextmanager
def making(file: Path, instead: str) -> Iterator[None]:
    """Hold a file that is being made; the lock is the operating system's and dies with the process.

    Args:
        file: what will be written; its folder is made.
        instead: what else one may do where the folder cannot be written to.

    Raises:
        RequestError: another process makes it, or the folder cannot be written to.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"), timeout=0)
        lock.acquire()
    except Timeout:
        raise RequestError(f"another process is making {file}; wait for it") from None
    except OSError as error:
        raise RequestError(
            f"cannot write to {file.parent} ({error.strerror or error}); set {fitting.HOME_VARIABLE} to "
            f"another folder, or {instead}"
        ) from error
    try:
        yield
    finally:
        # Unlinked while it is held: whoever waits for it sees that the file is gone, and makes another. Where
        # a file that is open cannot be removed, it stays.
        with suppress(OSError):
            file.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


@contextmanager
def stoppable(session: Session) -> Iterator[None]:
    """Ctrl-C stops at the end of the step, with a checkpoint; a second one at once."""

    def stop(_number: int, _frame: Any) -> None:
        if session.stopping:
            raise KeyboardInterrupt
        session.stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fit_in_memory(plugin: Plugin, params: Mapping[str, Any], model: Model, data: Any, **options: Any) -> Fit:
    """Fit to images that are at hand, without a file: for tests and for the conformance kit."""
    session = Session()
    tensors = plugin.make(params).fit(model, data, session, **fit_options(plugin, options))  # type: ignore[attr-defined]
    return fitting.in_memory(tensors, {"key": "memory", "explainer": plugin.name})


def _fit(request: Training, session: Session) -> tuple[dict[str, Tensor], TrainingData]:
    data = TrainingData(request.samples, request.model, request.seed, request.workers)
    session.seen, session.unreadable = data.seen, data.unreadable
    explainer: Any = request.plugin.make(request.params)
    try:
        with guarded(request.model), torch.enable_grad():
            tensors = explainer.fit(request.model, data, session, **request.options)
    except FaithmapError:
        raise
    except Exception as error:
        raise FaithmapError(f"the fit of '{request.plugin.name}' failed: {describe(error)}") from error
    finally:
        session.watcher.end()
    check_readable(data)
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise FaithmapError(
            f"the fit of '{request.plugin.name}' returned {type(tensors).__name__}; expected tensors by name"
        )
    check_finite(tensors, f"the fit of '{request.plugin.name}'")
    return tensors, data


def check_readable(data: TrainingData) -> None:
    """Refuse to have learnt from nothing.

    Raises:
        RequestError: none of the images could be read.
    """
    if data.unreadable and len(data.unreadable) == len(data):
        name, reason = next(iter(data.unreadable.items()))
        raise RequestError(f"none of the {len(data)} images could be read; '{name}': {reason}")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse to keep what is broken; `what` has learnt it.

    Raises:
        FaithmapError: a tensor holds NaN or infinity.
    """
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        raise FaithmapError(
            f"{what} ended with NaN or infinity in '{broken[0]}'; nothing was kept. Lower its learning rate, "
            "or fit in fp32"
        )


def _record(
    request: Training, session: Session, tensors: Mapping[str, Tensor], data: TrainingData
) -> dict[str, Any]:
    return {
        "key": request.key,
        "served": request.served,
        "explainer": request.plugin.name,
        "version": request.plugin.facts.version,
        "params": fitting.fit_params(request.plugin, request.params),
        "options": dict(request.options),
        "model": {"name": request.model.name, "weights": request.model.weights_digest()},
        "data": {
            **data_entry(
                request.dataset, request.samples, data.unreadable, part=request.part, limit=request.limit
            ),
            **data.seen.entry(),
        },
        "transform": repr(request.model.transform),
        "params_added": fitting.numbers_used(request.plugin, request.params, tensors),
        "counts": counted(session.curve, fitting.counts(request.plugin)),
        **circumstances(session, request.model),
    }
