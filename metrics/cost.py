"""What a map costs: time, passes through the model, memory; on a cold context."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored
from faithmap.errors import RequestError
from faithmap.explaining import guarded

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model

SAMPLE = 8


@metric(
    version=1,
    source="faithmap, docs/protocols.md: cost",
    scores={
        "ms_per_image": "lower",
        "ms_per_image_batch": "lower",
        "forwards": "none",
        "backwards": "none",
        "peak_mb": "lower",
    },
    needs={"explainer"},
    sample=SAMPLE,
)
def cost(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    images: int = SAMPLE,
    repetitions: int = 7,
    batch_repetitions: int = 3,
) -> dict[str, Values]:
    """Time, passes and memory of the explainer itself, apart from all scoring.

    Every call starts from a cold context: no logits, activations or gradients of the image are
    there yet. The class to explain is given, so a method need not find it. The clock runs around
    the explainer alone; loading, copying and checking lie outside, and the device has finished
    before either reading.

    - `ms_per_image`: milliseconds for one image alone (batch 1), the median of its repetitions,
      after a warm-up call; all images together have at least `repetitions` timings. The curve
      holds the repetitions.
    - `ms_per_image_batch`: milliseconds for the whole batch divided by its images, the median of
      `batch_repetitions` calls after a warm-up; the curve holds them. The same for every image.
    - `forwards`, `backwards`: images passed through the model per explained image, counted.
    - `peak_mb`: the device's memory above what was in use before the call, in units of 10^6 bytes,
      for one image; only on a CUDA device, where the allocator keeps count.

    A method of thousands of passes takes its time here as well: `batch_repetitions` + 1 whole batches.
    The repetitions are fixed beforehand, never shortened by the clock; give fewer to such a method.

    Args:
        model: the model.
        batch: images with targets, and the explainer that made the maps.
        maps: not looked at.
        images: how many images of the batch are timed and get rows, from the first on.
        repetitions: timings at batch 1, in all and at least.
        batch_repetitions: timings of the whole batch.
    """
    if batch.explainer is None:
        raise RequestError("metric 'cost' times an explainer, but only maps were given; name the explainer")
    if not 1 <= images <= SAMPLE:
        raise RequestError(f"metric 'cost', parameter 'images': got {images}, expected 1 to {SAMPLE}")
    for name, value in (("repetitions", repetitions), ("batch_repetitions", batch_repetitions)):
        if value < 1:
            raise RequestError(f"metric 'cost', parameter '{name}': got {value}, expected at least 1")
    only = range(min(images, len(batch)))
    each = math.ceil(repetitions / len(only))
    _call(model, batch, [0])
    singles = [[_call(model, batch, [i]) for _ in range(each)] for i in only]
    everything = range(len(batch))
    _call(model, batch, everything)
    whole = [_call(model, batch, everything).milliseconds / len(batch) for _ in range(batch_repetitions)]
    return _scores(singles, whole, len(batch), only)


@dataclass(frozen=True)
class _Call:
    """One call of an explainer."""

    milliseconds: float
    forwards: int
    backwards: int
    #: None where the device does not say.
    peak_mb: float | None


def _call(model: Model, batch: Batch, positions: list[int] | range) -> _Call:
    """Explain some images of the batch on a cold context."""
    assert batch.explainer is not None
    cold = batch.select(list(positions))
    device = batch.images.device
    on_cuda = device.type == "cuda"
    with guarded(model), model.counting() as meter, _no_collection():
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        resident = torch.cuda.memory_allocated(device) if on_cuda else 0
        synchronise(device)
        start = time.perf_counter()
        found = batch.explainer(model, cold)
        synchronise(device)
        seconds = time.perf_counter() - start
        peak = (torch.cuda.max_memory_allocated(device) - resident) / 1e6 if on_cuda else None
    del found
    cold.context.release()
    return _Call(1000 * seconds, meter.forwards, meter.backwards, peak)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of a timing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _scores(singles: list[list[_Call]], whole: list[float], size: int, only: range) -> dict[str, Values]:
    """Bring the readings to one row an image; images that were not timed hold NaN and get no row."""

    def spread(values: list[float]) -> Tensor:
        return torch.tensor(values + [math.nan] * (size - len(values)), dtype=torch.float64)

    times = torch.full((size, len(singles[0])), math.nan, dtype=torch.float64)
    times[: len(singles)] = torch.tensor([[call.milliseconds for call in calls] for calls in singles])
    repeated = torch.tensor(whole, dtype=torch.float64)
    scores: dict[str, Values] = {
        # The mean of the two middle timings where their number is even.
        "ms_per_image": Scored(times.quantile(0.5, dim=1), times, only=only),
        "ms_per_image_batch": Scored(
            spread([float(repeated.quantile(0.5))] * len(only)), repeated.expand(size, -1), only=only
        ),
        "forwards": Scored(spread([float(calls[0].forwards) for calls in singles]), only=only),
        "backwards": Scored(spread([float(calls[0].backwards) for calls in singles]), only=only),
    }
    peaks = [[call.peak_mb for call in calls if call.peak_mb is not None] for calls in singles]
    if all(peaks):
        scores["peak_mb"] = Scored(spread([max(peak) for peak in peaks]), only=only)
    return scores
