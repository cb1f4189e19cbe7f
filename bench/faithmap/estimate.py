"""`--dry-run`: what a run would compute, from two images run for real and thrown away."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from faithmap import multiverse
from faithmap.config import Config
from faithmap.data import check_labels
from faithmap.map_library import MapLibrary
from faithmap.plan import Grid, make_grid
from faithmap.report._format import count
from faithmap.runner import apply_settings, make_groups, resolve_settings
from faithmap.units import Group, run_shard

SAMPLE = 2


@dataclass(frozen=True)
class Estimate:
    """Units, images forwarded and seconds of a whole run, and a line for each model and dataset."""

    lines: list[str]
    units: int
    forwards: float
    seconds: float


def estimate(config: Config) -> Estimate:
    """Measure two images of every cell and extrapolate; nothing is written.

    The cost metric, which times a fixed number of images however many are scored, is left out.
    """
    grid = make_grid(config)
    multiverse.check(grid)
    grid = replace(grid, metrics=tuple(use for use in grid.metrics if use.facts.sample is None))
    for model in grid.models:
        for dataset, samples in grid.datasets:
            check_labels(dataset, samples, model)
    settings = resolve_settings(grid, None)
    apply_settings(grid, settings)
    total = Estimate(_fits(grid), 0, 0.0, 0.0)
    with TemporaryDirectory() as folder:
        library = MapLibrary(Path(folder)) if config.variants else None
        for group in make_groups(grid, settings, library):
            total = _added(total, group)
        if library is not None:
            for universe, groups in multiverse.planned(grid, settings, library):
                at_most = "at most " if universe.target == "label" else ""
                for group in groups:
                    total = _added(total, group, at_most) if group.shards else total
    return total


def _added(total: Estimate, group: Group, at_most: str = "") -> Estimate:
    images = sum(len(shard.samples) for shard in group.shards)
    units = len(group.tasks) * len(group.shards)
    forwards, seconds = _measure(group)
    said = f" ({group.said})" if group.said else ""
    line = (
        f"{group.model.name} x {group.dataset}{said}: {at_most}{images} images, {len(group.tasks)} cells, "
        f"{units} units, {forwards:,.0f} forwards and {1000 * seconds:,.0f} ms an image"
    )
    return Estimate(
        [*total.lines, line],
        total.units + units,
        total.forwards + images * forwards,
        total.seconds + images * seconds,
    )


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


def _measure(group: Group) -> tuple[float, float]:
    shard = replace(group.shards[0], samples=group.shards[0].samples[:SAMPLE])
    with group.model.counting() as meter:
        started = time.perf_counter()
        for _ in run_shard(group, shard, group.tasks):
            pass
        seconds = time.perf_counter() - started
    return meter.forwards / len(shard.samples), seconds / len(shard.samples)
