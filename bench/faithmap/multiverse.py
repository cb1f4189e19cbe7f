"""`faithmap run --variants`: the perturbation test of a run once more, in all its published variants.

Papers run this test in many ways and rarely say what another way would have shown. A variant is one
choice of each: the class explained, the grid that maps are reduced to, the fill of removed pixels,
the span of shares, and how the curve is read. What can be shared is shared: three readings come from
one pass, both spans from one curve, all grids and fills from one map, and images on which two targets
name the same class are computed once. `faithmap.orders` says what becomes of the order of methods.

Rows lie in `variants/rows` of the run's folder, in cells of their own, and a second run goes on where
the first was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from faithmap import reliability
from faithmap.config import MapGrid, Target, VariantSettings
from faithmap.data import Shard, shards
from faithmap.engine import Observer, run_local
from faithmap.errors import RequestError
from faithmap.map_library import MapLibrary
from faithmap.models import Model
from faithmap.orders import DEFAULT_TARGET, SPANS, STEPS
from faithmap.perturb import FILL_NAMES
from faithmap.plan import Grid, identity, map_grid
from faithmap.provenance import manifest
from faithmap.records import REFERENCE_NULL, Spec
from faithmap.scoring import use_metric
from faithmap.store import RunStore
from faithmap.units import Group

METRIC = "perturbation"


@dataclass(frozen=True)
class Universe:
    """A class explained and a grid: what a map and its place in the image depend on."""

    target: Target
    map_grid: MapGrid

    @property
    def title(self) -> str:
        """A few words for progress bars."""
        return f"{self.target} class, {self.map_grid} grid"


def _by_target(grid: Grid) -> dict[Target, list[Universe]]:
    """What is to be computed, by target: the run's own grid first, then in the order of the request.

    Predictions come first: another target needs only the images on which it differs from them.
    """
    run, wanted = grid.config.run, _wanted(grid)
    targets = sorted(
        dict.fromkeys([run.target, *wanted.targets]), key=lambda target: target != DEFAULT_TARGET
    )
    grids = dict.fromkeys([run.map_grid, *wanted.map_grids])
    return {target: [Universe(target, each) for each in grids] for target in targets}


def check(grid: Grid) -> None:
    """Refuse variants that cannot be had, before anything is computed.

    Raises:
        RequestError: a fill does not exist, or nothing would be compared.
    """
    wanted = grid.config.variants
    if wanted is None:
        return
    for fill in wanted.fills:
        if fill not in FILL_NAMES:
            raise RequestError(f"variants: unknown fill '{fill}'; there are: {', '.join(FILL_NAMES)}")
    methods = [use.label for use in grid.explainers if use.plugin.facts.role == "method"]
    if len(methods) < 2:
        raise RequestError(
            f"variants show how the order of methods moves, and the request has {len(methods)}; name "
            "at least two methods that are no controls"
        )


def run_variants(
    grid: Grid,
    settings: Mapping[str, Any],
    store: RunStore,
    library: MapLibrary,
    observer: Observer,
    verdicts: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Compute what lacks rows, and write and return the manifest of the variants.

    The manifest names the images, so that what is read back is what was completed, whatever the run's own
    list has become since.

    Args:
        grid: the request of the run.
        settings: the run's settings, as they were resolved.
        store: the folder of the variants.
        library: maps that the run has made already, and those made here.
        observer: is told how it goes on.
        verdicts: of the kit on the plugins that are not built in.
    """
    store.clean()
    own = _methods_alone(grid)
    described = []
    predicted: dict[tuple[str, str], dict[str, int]] = {}
    for target, same in _by_target(grid).items():
        groups = {universe: _groups(own, settings, universe, same, library, predicted) for universe in same}
        due = [group for made in groups.values() for group in made if group.shards]
        if due:
            run_local(due, store, observer, previews=False)
        for universe, made in groups.items():
            described.append(_described(universe, made))
            if target == DEFAULT_TARGET:
                predicted |= {
                    (group.model.name, group.dataset): _predicted(store, group)
                    for group in made
                    if (group.model.name, group.dataset) not in predicted
                }
    cells = [key for entry in described for key in entry["cells"]]
    content = {
        **manifest(own, identity(own), dict(settings), cells),
        "universes": described,
        "images": {dataset.label: [sample.id for sample in samples] for dataset, samples in grid.datasets},
        "own": own_way(grid),
    }
    reliability.record(content, verdicts)
    store.write_manifest(content)
    return content


def planned(
    grid: Grid, settings: Mapping[str, Any], library: MapLibrary
) -> list[tuple[Universe, list[Group]]]:
    """All that may have to be computed: of another target, each image that has a label."""
    own = _methods_alone(grid)
    return [
        (universe, _groups(own, settings, universe, same, library, {}))
        for same in _by_target(grid).values()
        for universe in same
    ]


def own_way(grid: Grid) -> dict[str, Any]:
    """The fill and the span that the run itself scores, and whether that is among the variants at all."""
    uses = [use for use in grid.metrics if use.plugin.name == METRIC]
    if not uses:
        return {"fill": _wanted(grid).fills[0], "span": SPANS[0], "scored": False}
    plain = next((use for use in uses if not use.variant), uses[0])
    fill, span, steps = (plain.params[key] for key in ("fill", "span", "steps"))
    spans = {share for share in SPANS if (span, steps) == (share, round(share * STEPS))}
    return {"fill": fill, "span": next(iter(spans), SPANS[0]), "scored": bool(spans)}


def _wanted(grid: Grid) -> VariantSettings:
    assert grid.config.variants is not None
    return grid.config.variants


def _methods_alone(grid: Grid) -> Grid:
    """The request with its methods, the null that stands in for failed maps, and all fills."""
    kept = tuple(
        use
        for use in grid.explainers
        if use.plugin.facts.role == "method" or use.plugin.name == REFERENCE_NULL
    )
    metrics = tuple(
        use_metric(Spec(METRIC, {"fill": fill, "span": 1.0, "steps": STEPS}, fill))
        for fill in dict.fromkeys([own_way(grid)["fill"], *_wanted(grid).fills])
    )
    config = grid.config.with_run(own_nulls=())
    return replace(grid, config=config, explainers=kept, metrics=metrics)


def _groups(
    grid: Grid,
    settings: Mapping[str, Any],
    universe: Universe,
    same_target: Sequence[Universe],
    library: MapLibrary,
    predicted: Mapping[tuple[str, str], Mapping[str, int]],
) -> list[Group]:
    """The groups of a universe, without models to which an earlier grid is the same grid."""
    from faithmap.runner import make_groups

    earlier = same_target[: same_target.index(universe)]
    models = tuple(
        model
        for model in grid.models
        if all(_shape(grid, model, other) != _shape(grid, model, universe) for other in earlier)
    )
    config = grid.config.with_run(target=universe.target, map_grid=universe.map_grid)
    made = make_groups(replace(grid, config=config, models=models), settings, library)
    for group in made:
        known = predicted.get((group.model.name, group.dataset))
        group.shards = _shards(group, universe, known, settings)
        group.said = universe.title
    return made


def _shape(grid: Grid, model: Model, universe: Universe) -> tuple[int, int] | None:
    """Cells of the grid that a universe gives a model; None for native resolution."""
    return map_grid(grid.config.with_run(map_grid=universe.map_grid), model)


def _shards(
    group: Group, universe: Universe, predicted: Mapping[str, int] | None, settings: Mapping[str, Any]
) -> list[Shard]:
    """The images of a group that another universe does not answer for."""
    if universe.target != "label":
        return group.shards
    samples = [
        sample
        for shard in group.shards
        for sample in shard.samples
        if sample.label is not None and (predicted is None or sample.label != predicted.get(sample.id))
    ]
    return shards(samples, int(settings["batch_size"]))


def _predicted(store: RunStore, group: Group) -> dict[str, int]:
    """The class predicted for each image, from the rows of a group."""
    rows = store.rows([task.cell.key for task in group.tasks if not task.skip])
    known = rows.dropna(subset="predicted").drop_duplicates("image_id")
    return dict(zip(known["image_id"], known["predicted"].astype(int), strict=True))


def _described(universe: Universe, groups: Sequence[Group]) -> dict[str, Any]:
    """A universe in the manifest: its cells, and the models that it is a universe of its own for."""
    return {
        "target": universe.target,
        "map_grid": universe.map_grid,
        "models": list(dict.fromkeys(group.model.name for group in groups)),
        "cells": [key for group in groups for key in (*(t.cell.key for t in group.tasks), group.read_key)],
    }
