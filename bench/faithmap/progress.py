"""How a run goes on, told on a terminal by a bar and elsewhere by plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds from which on the pace so far tells how much time is left.
TOO_EARLY = 2.0


def _progress(console: Console, noun: str) -> Progress:
    """A bar that counts, with what is said of it and the time gone and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(noun),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
    )


class Bar:
    """A bar with the cell, images per second and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = _progress(console, "units")
        self._clock = _Clock()
        self._place = ""

    def fitting(self) -> FitBar:
        """A bar for the fit that follows."""
        return FitBar(self._progress.console)

    def fitted(self, explainer: str, model: str, counts: Sequence[str]) -> None:
        """That is done; what it counted is told, a line each."""
        for count in counts:
            self._say(told_of_fit(explainer, model, count))

    def unfitted(self, explainer: str, model: str, reason: str) -> None:
        """That failed, and the run goes on without it."""
        self._say(told_unfitted(explainer, model, reason))

    def checked(self, plugin: str, failed: int, seconds: float) -> None:
        """A plugin that is not built in has been checked."""
        self._say(told_check(plugin, failed, seconds))

    def begin(self, units: int, done: int) -> None:
        """Show the bar, begun where an earlier run stopped."""
        self._clock = _Clock(units - done)
        self._task = self._progress.add_task("reading", total=units, completed=done, said="", left="")
        self._progress.start()

    def group(self, model: str, dataset: str) -> None:
        """Units of this model and dataset follow."""
        self._place = f"{model} · {dataset}"

    def unit(self, cell: str, images: int, seconds: float) -> None:
        """A unit is written."""
        self._clock.tick()
        self._progress.update(
            self._task,
            advance=1,
            description=f"{self._place} · {cell}",
            said=told_rate(images, seconds),
            left=self._clock.left(),
        )

    def end(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Lines:
    """Plain lines, at most one every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every: float = 5.0) -> None:
        self._stream = stream or sys.stderr
        self._every = every
        self._last = 0.0
        self._done = self._units = 0
        self._place = ""
        self._clock = _Clock()

    def fitting(self) -> FitLines:
        """Lines for the fit that follows."""
        return FitLines(self._stream)

    def fitted(self, explainer: str, model: str, counts: Sequence[str]) -> None:
        """That is done; what it counted is told, a line each."""
        for count in counts:
            self._say(told_of_fit(explainer, model, count))

    def unfitted(self, explainer: str, model: str, reason: str) -> None:
        """That failed, and the run goes on without it."""
        self._say(told_unfitted(explainer, model, reason))

    def checked(self, plugin: str, failed: int, seconds: float) -> None:
        """A plugin that is not built in has been checked."""
        self._say(told_check(plugin, failed, seconds))

    def begin(self, units: int, done: int) -> None:
        """Say how much there is to do."""
        self._units, self._done, self._clock = units, done, _Clock(units - done)
        self._say(f"{units} units, {done} of them done before" if done else f"{units} units")

    def group(self, model: str, dataset: str) -> None:
        """Units of this model and dataset follow."""
        self._place = f"{model}, {dataset}"

    def unit(self, cell: str, images: int, seconds: float) -> None:
        """A unit is written."""
        self._done += 1
        self._clock.tick()
        if time.monotonic() - self._last < self._every and self._done < self._units:
            return
        self._last = time.monotonic()
        told = f"{self._done}/{self._units} {self._place}, {cell}: {told_rate(images, seconds)}"
        self._say(_joined(told, self._clock.left()))

    def end(self) -> None:
        """Nothing to take away."""

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class FitBar:
    """A bar of a fit: what is fitted, the latest values, steps and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = _progress(console, "steps")
        self._clock = _Clock()

    def begin(self, title: str, steps: int, done: int) -> None:
        """Show the bar, begun where an earlier fit stopped."""
        self._clock = _Clock(steps - done)
        self._task = self._progress.add_task(title, total=steps, completed=done, said="", left="")
        self._progress.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done."""
        self._clock.tick()
        self._progress.update(self._task, completed=step, said=told_values(values), left=self._clock.left())

    def end(self) -> None:
        """Take the bar away."""
        self._progress.stop()


class FitLines:
    """Plain lines of a fit, at most one every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._every = every
        self._last = 0.0
        self._steps = 0
        self._clock = _Clock()

    def begin(self, title: str, steps: int, done: int) -> None:
        """Say how much there is to do."""
        self._steps, self._clock = steps, _Clock(steps - done)
        gone = f", {done} of them done before" if done else ""
        print(f"{title}: {steps} steps{gone}", file=self._stream, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done."""
        self._clock.tick()
        if time.monotonic() - self._last < self._every and step < self._steps:
            return
        self._last = time.monotonic()
        told = f"{step}/{self._steps} {told_values(values)}"
        print(_joined(told, self._clock.left()), file=self._stream, flush=True)

    def end(self) -> None:
        """Nothing to take away."""


class _Clock:
    """Estimates the time left from the pace so far."""

    def __init__(self, units: int = 0) -> None:
        self._units = units
        self._done = 0
        self._start = time.monotonic()

    def tick(self) -> None:
        """A unit is done."""
        self._done += 1

    def left(self) -> str:
        """The time left in words; nothing while too little is done to tell."""
        elapsed = time.monotonic() - self._start
        if elapsed < TOO_EARLY and self._done < self._units:
            return ""
        return f"{clock(elapsed / max(self._done, 1) * max(self._units - self._done, 0))} left"


def _joined(told: str, left: str) -> str:
    """A line, with the time left where that is known."""
    return f"{told}, {left}" if left else told


def told_check(plugin: str, failed: int, seconds: float) -> str:
    """What the checks of a plugin came to, in a line."""
    found = f"{failed} failed, so it is marked unreliable" if failed else "all passed"
    return f"checked {plugin}, which is not built in: {found} ({seconds:.1f} s)"


def told_unfitted(explainer: str, model: str, reason: str) -> str:
    """A fit that failed, in a line."""
    return f"{told_of_fit(explainer, model, reason)}; the run goes on without it"


def told_of_fit(explainer: str, model: str, what: str) -> str:
    """What is to say of a fit, in a line."""
    return f"{explainer} on {model}: {what}"


def told_rate(images: int, seconds: float) -> str:
    """Images a second; images a minute or an hour of methods so slow that these say more.

    >>> told_rate(160, 10), told_rate(16, 60), told_rate(1, 60)
    ('16 images/s', '16 images/min', '60 images/h')
    """
    rate = images / max(seconds, 1e-9)
    for unit, lasts in (("s", 1), ("min", 60), ("h", 3600)):
        if rate * lasts >= 10 or unit == "h":
            break
    return f"{rate * lasts:.0f} images/{unit}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def told_values(values: Mapping[str, float]) -> str:
    """Numbers by name, in a line.

    >>> told_values({"loss": 0.25, "area": 2.0})
    'loss 0.25, area 2'
    """
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def watcher(console: Console) -> FitBar | FitLines:
    """What shows a fit: a bar where there is a terminal, lines elsewhere."""
    return FitBar(console) if console.is_terminal else FitLines()


def observer(console: Console) -> Bar | Lines:
    """A bar where there is a terminal, lines elsewhere."""
    return Bar(console) if console.is_terminal else Lines()
