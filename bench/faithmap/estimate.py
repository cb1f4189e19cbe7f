"""`--dry-run`: what a run has still to compute, from two images run for real and thrown away."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from faithmap import multiverse
from faithmap.config import Config
from faithmap.data import check_labels
from faithmap.map_library import MapLibrary
from faithmap.plan import Grid, Task, default_folder, identity, make_grid
from faithmap.records import VARIANTS
from faithmap.report._format import count
from faithmap.runner import apply_settings, make_groups, refuse_other_identity, resolve_settings
from faithmap.store import RunStore
from faithmap.units import Group, missing_images, run_shard

SAMPLE = 2
#: Lines that are named with their shares of the time.
DEAREST = 5


@dataclass(frozen=True)
class Estimate:
    """What a whole run takes that finds some units stored, and a line for each model and dataset."""

    lines: list[str]
    #: Units in all, and how many of them the run's folder holds.
    units: int
    stored: int
    #: Images forwarded and seconds for the others.
    forwards: float
    seconds: float


def estimate(config: Config, out: str | Path | None = None, *, fresh: bool = False) -> Estimate:
    """Measure two images of every cell that lacks rows, and extrapolate; nothing is written.

    Metrics that time a fixed number of images, however many are scored, are left out, which a line says.

    Args:
        config: the request.
        out: the run's folder, whose rows would not be computed again; by default that of `run`.
        fresh: they would be dropped.

    Raises:
        RequestError: the request is wrong, or the folder holds a run that it does not go with, or no run
            at all but other files.
    """
    grid = make_grid(config)
    multiverse.check(grid)
    timed = [use.plugin.name for use in grid.metrics if use.facts.sample is not None]
    grid = replace(grid, metrics=tuple(use for use in grid.metrics if use.facts.sample is None))
    for model in grid.models:
        for dataset, samples in grid.datasets:
            check_labels(dataset, samples, model)
    store = RunStore(out or default_folder(grid))
    variants = RunStore(store.path / VARIANTS)
    store.refuse_foreign()
    held = None if fresh else store.manifest()
    if held is not None:
        refuse_other_identity(held["identity"], identity(grid), store.path)
    settings = resolve_settings(grid, held)
    apply_settings(grid, settings)
    total = Estimate([*_timings(timed), *_fits(grid)], 0, 0, 0.0, 0.0)
    with TemporaryDirectory() as folder:
        library = MapLibrary(Path(folder)) if config.variants else None
        for group in make_groups(grid, settings, library):
            if held is not None:
                group.find_done(store)
            _warm_up(group)
            total = _added(total, group)
        if library is not None:
            for universe, groups in multiverse.planned(grid, settings, library):
                at_most = "at most " if universe.target == "label" else ""
                for group in groups:
                    if held is not None:
                        group.find_done(variants)
                    total = _added(total, group, at_most) if group.shards else total
    return total


def _added(total: Estimate, group: Group, at_most: str = "") -> Estimate:
    images = sum(len(shard.samples) for shard in group.shards)
    units = len(group.tasks) * len(group.shards)
    lacking = [(shard, task) for shard in group.shards for task in group.pending(shard)]
    stored = len([task for task in group.tasks if task.metrics]) * len(group.shards) - len(lacking)
    due: Counter[str] = Counter()
    for shard, task in lacking:
        due[task.cell.key] += len(missing_images(group, shard, [task]).samples)
    costs = _measure(group, [task for task in group.tasks if due[task.cell.key]])
    forwards, seconds = (sum(due[key] * cost[i] for key, cost in costs.items()) for i in (0, 1))
    by_label: dict[str, float] = {}
    for cell in (task.cell for task in group.tasks if task.cell.key in costs):
        by_label[cell.label] = by_label.get(cell.label, 0.0) + due[cell.key] * costs[cell.key][1]
    said = f" ({group.said})" if group.said else ""
    already = f", {stored} of them stored" if stored else ""
    line = (
        f"{group.model.name} x {group.dataset}{said}: {at_most}{images} images, {len(group.tasks)} cells, "
        f"{units} units{already}, {forwards / images:,.0f} forwards and "
        f"{1000 * seconds / images:,.0f} ms an image{_dearest(by_label)}"
    )
    return Estimate(
        [*total.lines, line],
        total.units + units,
        total.stored + stored,
        total.forwards + forwards,
        total.seconds + seconds,
    )


def _dearest(by_label: Mapping[str, float]) -> str:
    """Where most of the time goes, of what has a choice of lines."""
    if len(by_label) <= DEAREST or not (whole := sum(by_label.values())):
        return ""
    dearest = sorted(by_label.items(), key=lambda item: -item[1])[:DEAREST]
    shares = [f"{label} {seconds / whole:.0%}" for label, seconds in dearest]
    return f" (dearest: {', '.join(shares)})"


def _timings(names: Sequence[str]) -> list[str]:
    """What the run times, which two images would not tell."""
    timed = "times a few images of each cell, again and again; that is not in the figures below"
    return [f"{' and '.join(dict.fromkeys(names))} {timed}"] if names else []


def _fits(grid: Grid) -> list[str]:
    """What the run fits before it begins, whose cells are not measured here."""
    lines = []
    for model in grid.models:
        asked = [(use.label, use.wanted[model.name]) for use in grid.explainers if model.name in use.wanted]
        # Variants that differ in explaining alone share a fit.
        names = {training.key: label for label, training in reversed(asked)}
        for dataset in dict.fromkeys(training.dataset.label for _, training in asked):
            fits = [training for _, training in asked if training.dataset.label == dataset]
            labels = [names[key] for key in dict.fromkeys(training.key for training in fits)]
            lines.append(
                f"{model.name}: {count(len(labels), 'fit')} first, on {len(fits[0].samples)} images of "
                f"{dataset} ({', '.join(labels)}); neither these nor their maps are in the figures below"
            )
    return lines


def _warm_up(group: Group) -> None:
    """Do what is done once in a process, such as importing what a metric needs: it is no image's time."""
    shard = replace(group.shards[0], samples=group.shards[0].samples[:1])
    due = [task for each in group.shards for task in group.pending(each)]
    # Without the library, from which the map would be had for nothing when it is measured.
    alone = replace(group, done={}, unreadable=set(), library=None)
    for _ in run_shard(alone, shard, due[:1]):
        pass


def _measure(group: Group, tasks: Sequence[Task]) -> dict[str, tuple[float, float]]:
    """Forwards and seconds an image of some tasks, by the keys of their cells, as if nothing were stored.

    What tasks share, such as reading an image, counts for the first of them.
    """
    if not tasks:
        return {}
    shard = replace(group.shards[0], samples=group.shards[0].samples[:SAMPLE])
    costs: dict[str, tuple[float, float]] = {}
    with group.model.counting() as meter:
        forwards, started = meter.forwards, time.perf_counter()
        for unit in run_shard(replace(group, done={}, unreadable=set()), shard, tasks):
            now = time.perf_counter()
            spent, taken = meter.forwards - forwards, now - started
            costs[unit.cell.key] = (spent / len(shard.samples), taken / len(shard.samples))
            forwards, started = meter.forwards, now
    return {task.cell.key: costs.get(task.cell.key, (0.0, 0.0)) for task in tasks}
