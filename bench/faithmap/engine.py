"""Where units run. `local` is this process: shard after shard, each unit written as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from faithmap import training
from faithmap.errors import RequestError
from faithmap.records import Row
from faithmap.store import RunStore
from faithmap.units import Group, UnitResult, run_shard

ENGINES = ("local",)
#: Images of each cell whose maps are kept for the figure of heat maps.
PREVIEWED = 4


class Observer(Protocol):
    """Is told how a run goes on."""

    def checked(self, plugin: str, failed: int, seconds: float) -> None:
        """A plugin that is not built in has been checked, and so many checks failed."""

    def fitting(self) -> training.Watcher:
        """An explainer is about to be fitted; what is returned is told how that goes on."""

    def fitted(self, explainer: str, model: str, counts: Sequence[str]) -> None:
        """That is done; `counts` says what was true of how many image passes, such as fallbacks."""

    def unfitted(self, explainer: str, model: str, reason: str) -> None:
        """That failed, and the run goes on without it."""

    def begin(self, units: int, done: int) -> None:
        """The run has so many units, of which some were stored by an earlier run."""

    def group(self, model: str, dataset: str) -> None:
        """Units of this model and dataset follow."""

    def unit(self, cell: str, images: int, seconds: float) -> None:
        """A unit is written."""

    def end(self) -> None:
        """The run is over, or was interrupted."""


class Silent:
    """An observer that says nothing."""

    def checked(self, plugin: str, failed: int, seconds: float) -> None:
        """Say nothing."""

    def fitting(self) -> training.Watcher:
        """Nobody is told."""
        return training.Silent()

    def fitted(self, explainer: str, model: str, counts: Sequence[str]) -> None:
        """Say nothing."""

    def unfitted(self, explainer: str, model: str, reason: str) -> None:
        """Say nothing."""

    def begin(self, units: int, done: int) -> None:
        """Say nothing."""

    def group(self, model: str, dataset: str) -> None:
        """Say nothing."""

    def unit(self, cell: str, images: int, seconds: float) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


def check_engine(name: str) -> None:
    """Refuse an engine that this version does not have.

    Raises:
        RequestError: names what there is.
    """
    if name not in ENGINES:
        raise RequestError(f"unknown engine '{name}'; this version has: {', '.join(ENGINES)}")


def run_local(
    groups: Sequence[Group],
    store: RunStore,
    observer: Observer,
    save_maps: bool = False,
    previews: bool = True,
) -> None:
    """Run every pending unit in this process and write its rows.

    Args:
        groups: what is to be run.
        store: where rows go.
        observer: is told how it goes on.
        save_maps: keep the maps as well.
        previews: keep the maps of the first images, for the figure of heat maps.
    """
    for group in groups:
        group.load_done(store)
    counts = [sum(len(group.pending(shard)) for shard in group.shards) for group in groups]
    total = sum(len(group.tasks) * len(group.shards) for group in groups)
    observer.begin(total, total - sum(counts))
    try:
        for group in groups:
            observer.group(group.model.name, ", ".join(filter(None, (group.dataset, group.said))))
            for shard in group.shards:
                pending = group.pending(shard)
                started = time.perf_counter()
                for result in run_shard(group, shard, pending) if pending else ():
                    if save_maps and result.maps is not None:
                        store.write_maps(result.cell.key, result.shard, result.ids, result.maps.maps)
                    if previews and shard.first and result.maps is not None:
                        store.write_preview(
                            result.cell.key, result.ids[:PREVIEWED], result.maps.maps[:PREVIEWED]
                        )
                    _write(store, group, result)
                    if result.cell.explainer:
                        seconds = time.perf_counter() - started
                        observer.unit(_title(result), result.images, seconds)
                    started = time.perf_counter()
            group.pool.release()
    finally:
        observer.end()


def _title(result: UnitResult) -> str:
    cell = result.cell
    extra = [str(part) for part in (cell.null, cell.draw) if part is not None]
    return f"{cell.label} ({' '.join(extra)})" if extra else cell.label


def _write(store: RunStore, group: Group, result: UnitResult) -> None:
    stored = group.done.get(result.cell.key, set())
    rows: list[Row] = [row for row in result.rows if (row.image_id, row.spec) not in stored]
    if rows:
        store.write(result.cell.key, result.shard, rows)
