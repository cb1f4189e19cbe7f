"""Compute the units of one shard: every explainer's maps, scored by every metric that lacks rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from faithmap.batch import Batch, seed_of
from faithmap.config import Config
from faithmap.data import Shard, make_batch, read_shard
from faithmap.explaining import MapSet, explain_batch
from faithmap.map_library import MapLibrary
from faithmap.models import Model
from faithmap.plan import Task, map_grid
from faithmap.pool import Pool
from faithmap.records import Cell, Row, Sample, Status, digest
from faithmap.resize import reduce_to_grid
from faithmap.scoring import UNREADABLE, Heading, MetricUse, rows_of, score_maps, skip_rows, unreadable_row
from faithmap.store import Done, RunStore

NO_PARTNER = "no other image of the shard has another predicted class"


@dataclass
class Group:
    """One model on one dataset: the tasks, the shards, and what is stored already."""

    model: Model
    config: Config
    tasks: list[Task]
    shards: list[Shard]
    #: Key of the rows that record unreadable images.
    read_key: str
    dataset: str
    #: All images of the dataset, for metrics that set an image among others.
    pool: Pool
    done: dict[str, Done] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    #: What the dataset's images come with, some or all of them.
    gives: frozenset[str] = frozenset()
    #: What tells the group from another one of its model and dataset; mostly nothing.
    said: str = ""
    #: Where maps are kept that other groups of the request score as well; None keeps none.
    library: MapLibrary | None = None

    def explain(self, task: Task, batch: Batch) -> MapSet:
        """The maps of a batch, from the library where it has them; those of methods alone are kept."""
        if self.library is None or task.cell.role != "method" or task.cell.null is not None:
            return explain_batch(task.call, self.model, batch)
        return self.library.get(task.maps_key, batch, lambda: explain_batch(task.call, self.model, batch))

    def load_done(self, store: RunStore) -> None:
        """Read from the rows what need not be computed again."""
        for task in self.tasks:
            if task.skip:
                store.drop_other_skips(task.cell.key, task.skip)
        self.find_done(store)

    def find_done(self, store: RunStore) -> None:
        """The same, with the store left as it is."""
        self.done = store.done([task.cell.key for task in self.tasks] + [self.read_key])
        self.unreadable = {image for image, spec in self.done.pop(self.read_key) if spec == UNREADABLE}

    def lacking(self, task: Task, use: MetricUse, shard: Shard) -> bool:
        """Whether a shard still lacks rows of a metric."""
        stored = self.done.get(task.cell.key, set())
        if use.facts.sample is not None:
            return shard.first and not any(spec == use.spec for _, spec in stored)
        return any((name, use.spec) not in stored for name in shard.ids if name not in self.unreadable)

    def pending(self, shard: Shard) -> list[Task]:
        """The tasks of a shard with the metrics that lack rows."""
        reduced = [
            replace(task, metrics=tuple(use for use in task.metrics if self.lacking(task, use, shard)))
            for task in self.tasks
        ]
        return [task for task in reduced if task.metrics]


@dataclass(frozen=True)
class UnitResult:
    """The rows of one cell on one shard."""

    cell: Cell
    shard: str
    rows: list[Row]
    images: int
    #: The maps at the explainer's own resolution, where they were made for this unit, and their ids.
    maps: MapSet | None = None
    ids: tuple[str, ...] = ()


def run_shard(group: Group, shard: Shard, pending: Sequence[Task]) -> Iterator[UnitResult]:
    """Compute the pending units of a shard, one by one.

    The images are read and the model's clean pass is made once; each explainer's maps are made
    once and serve its own cell and the cells of its moved maps.
    """
    seed = group.config.run.seed
    missing = missing_images(group, shard, pending)
    read, unreadable = read_shard(missing, group.model)
    if unreadable:
        group.unreadable |= unreadable.keys()
        yield _unreadable(group, missing, unreadable)
    if not read:
        return
    batch = make_batch(
        read, group.model, group.config.run.target, map_grid(group.config, group.model), seed, group.gives
    )
    batch = replace(batch, pool=group.pool)
    maps: dict[str, MapSet] = {}
    for task in pending:
        heading = task.heading(seed)
        name = unit_name(batch.ids, task.metrics)
        if task.skip:
            samples = [sample for sample, _ in read]
            skips = [row for use in task.metrics for row in skip_rows(heading, use, samples, task.skip)]
            yield UnitResult(task.cell, name, skips, len(batch))
            continue
        own = replace(batch, explainer=task.call)
        source = f"{task.cell.label}:{task.cell.draw if task.cell.null is None else ''}"
        if task.cell.null is not None:
            source = f"{task.cell.label}:None"
        if source not in maps:
            maps.clear()  # tasks come explainer by explainer: no earlier map is asked for again
            maps[source] = group.explain(task, own)
        found = maps[source] if task.cell.null is None else moved(maps[source], task.cell, batch)
        rows = [
            row
            for use in task.metrics
            for row in rows_of(heading, use, batch, score_maps(use, group.model, own, found))
        ]
        own_maps = found if task.cell.null is None else None
        yield UnitResult(task.cell, name, rows, len(batch), own_maps, batch.ids)
    batch.context.release()


def missing_images(group: Group, shard: Shard, pending: Sequence[Task]) -> Shard:
    """The images of a shard that lack rows: all, but for those a smaller limit has scored already."""
    if any(use.facts.sample is not None for task in pending for use in task.metrics):
        return replace(shard, samples=tuple(s for s in shard.samples if s.id not in group.unreadable))
    wanted = {(task.cell.key, use.spec) for task in pending for use in task.metrics}

    def lacks(sample: Sample) -> bool:
        return any((sample.id, spec) not in group.done.get(key, set()) for key, spec in wanted)

    kept = tuple(s for s in shard.samples if s.id not in group.unreadable and lacks(s))
    return replace(shard, samples=kept)


def unit_name(ids: Sequence[str], metrics: Sequence[MetricUse]) -> str:
    """The name of a unit's file: a hash of its images and of what scored them."""
    return digest(list(ids), [use.spec for use in metrics])


def _unreadable(group: Group, shard: Shard, reasons: dict[str, str]) -> UnitResult:
    run = group.config.run
    heading = Heading(group.model.name, group.dataset, "", "{}", str(run.map_grid), run.seed)
    rows = [unreadable_row(heading, s, reasons[s.id]) for s in shard.samples if s.id in reasons]
    cell = Cell(group.model.name, group.dataset, "", {}, str(run.map_grid), group.read_key, "")
    return UnitResult(cell, digest(sorted(reasons)), rows, len(rows))


def moved(found: MapSet, cell: Cell, batch: Batch) -> MapSet:
    """A method's own maps as nulls: of other images, or rolled on the torus, on the run's grid."""
    maps = reduce_to_grid(found.maps, batch.grid)
    seed = seed_of(batch.seed, f"{cell.null}-{cell.draw}", *batch.ids)
    if cell.null == "rolled":
        return MapSet(_rolled(maps, batch, cell), list(found.status), list(found.reasons))
    partners = derangement(batch.predicted.tolist(), torch.Generator().manual_seed(seed))
    status: list[Status] = []
    reasons = []
    for partner in partners:
        status.append("skipped" if partner is None else found.status[partner])
        reasons.append(NO_PARTNER if partner is None else found.reasons[partner])
    order = torch.tensor([0 if partner is None else partner for partner in partners], device=maps.device)
    return MapSet(maps[order], status, reasons)


def _rolled(maps: torch.Tensor, batch: Batch, cell: Cell) -> torch.Tensor:
    height, width = maps.shape[1:]
    rolled = []
    for one, name in zip(maps, batch.ids, strict=True):
        generator = torch.Generator().manual_seed(seed_of(batch.seed, f"rolled-{cell.draw}", name))
        # Every shift but none at all is equally likely.
        shift = int(torch.randint(1, height * width, (1,), generator=generator))
        rolled.append(one.roll((shift // width, shift % width), (0, 1)))
    return torch.stack(rolled)


def derangement(classes: Sequence[int], generator: torch.Generator, tries: int = 200) -> list[int | None]:
    """For each image another one of another class, no image twice where that can be had.

    None stands where no image has another class.
    """
    count = len(classes)
    for _ in range(tries):
        order = torch.randperm(count, generator=generator).tolist()
        if all(classes[i] != classes[partner] for i, partner in enumerate(order)):
            return list(order)
    partners: list[int | None] = []
    for own in classes:
        others = [i for i, other in enumerate(classes) if other != own]
        pick = int(torch.randint(len(others), (1,), generator=generator)) if others else 0
        partners.append(others[pick] if others else None)
    return partners
