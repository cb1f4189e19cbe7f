"""The main job: run a grid, score it, and write its leaderboards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from faithmap import multiverse, reliability
from faithmap import store as storage
from faithmap.comparing import chosen_figures
from faithmap.config import Config, load_config
from faithmap.data import check_labels, check_target, shards
from faithmap.engine import Observer, Silent, check_engine, run_local
from faithmap.errors import RequestError
from faithmap.explaining import full_float32
from faithmap.fitting import counts
from faithmap.folders import IMAGES, read_run
from faithmap.learning_record import told_counts
from faithmap.map_library import MapLibrary
from faithmap.models import Model
from faithmap.perturb import chunk_size
from faithmap.plan import Grid, default_folder, identity, make_grid, plan_tasks
from faithmap.pool import Pool
from faithmap.previews import draw_previews
from faithmap.provenance import manifest
from faithmap.records import VARIANTS, digest
from faithmap.requested_fits import fit_or_reason
from faithmap.store import RunStore
from faithmap.units import Group

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its rows, its boards."""

    path: Path
    manifest: Mapping[str, Any]
    #: Files that were written besides the rows.
    written: tuple[Path, ...] = ()
    #: Fits of the request that were tried and failed, with the reasons.
    failed_fits: tuple[str, ...] = ()

    def rows(self) -> pd.DataFrame:
        """The per-image rows of the request's cells."""
        return read_run(self.path)[0]

    def leaderboard(self, model: str | None = None, dataset: str | None = None) -> pd.DataFrame:
        """The board, one line a model, dataset and explainer, or the part of one model or dataset."""
        from faithmap.leaderboard import build_board

        board = build_board(*read_run(self.path))
        for column, wanted in (("model", model), ("dataset", dataset)):
            if wanted is not None:
                if wanted not in set(board[column]):
                    raise RequestError(
                        f"the board has no {column} '{wanted}'; it has: {sorted(set(board[column]))}"
                    )
                board = board[board[column] == wanted]
        return board.reset_index(drop=True)

    def failures(self) -> pd.DataFrame:
        """The rows that failed, with their reasons."""
        rows = self.rows()
        return rows[rows["status"] == "failed"].reset_index(drop=True)


def run(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    models: Sequence[Model] = (),
    out: str | Path | None = None,
    observer: Observer | None = None,
    fresh: bool = False,
    engine: str = "local",
    figures: bool = True,
    save_maps: bool = False,
) -> Run:
    """Run a grid and write its leaderboards; rows that are stored already are not computed again.

    Args:
        config: a `Config`, a preset's name, the path of a TOML file, a dictionary of the same form,
            or None for the default preset.
        models: `Model`s that take the place of the request's models.
        out: the run's folder; by default `runs/<preset>-<hash>`.
        observer: is told how the run goes on.
        fresh: drop what the folder holds of an earlier run.
        engine: where units run; "local" is this process.
        figures: draw the figures too.
        save_maps: keep the maps, at the explainers' own resolutions, under `maps/`.

    Raises:
        RequestError: the request is wrong; nothing has been computed then.
    """
    check_engine(engine)
    grid = make_grid(load_config(config), models)
    if grid.config.run.device == "mps":
        raise RequestError(
            "device 'mps' has no double precision, in which scores are computed; use --device cpu"
        )
    chosen_figures(grid.config.published)  # raises where there is no such table
    multiverse.check(grid)
    for model in grid.models:
        for dataset, samples in grid.datasets:
            check_labels(dataset, samples, model)
            check_target(grid.config.run.target, dataset, samples)
    store = RunStore(out or default_folder(grid))
    store.create()
    with store.locked(), full_float32():
        told = observer or Silent()
        grid, failed_fits = fit_wanted(grid, told)
        done = _run_locked(grid, store, told, fresh, figures, save_maps)
        return replace(done, failed_fits=failed_fits)


def fit_wanted(grid: Grid, observer: Observer) -> tuple[Grid, tuple[str, ...]]:
    """Fit what the request itself fits and what is not fitted yet.

    Each fit is kept as `faithmap train` keeps it, and goes on after a kill likewise. One that fails is a
    reason on the board, and the others go on.

    Returns:
        The same grid with these fits, and which failed, with the reasons.
    """
    if not any(use.wanted for use in grid.explainers):
        return grid, ()
    run_settings = grid.config.run
    torch.set_num_threads(run_settings.threads or usable_cores())
    device = resolve_device(run_settings.device)
    explainers, told = [], []
    failed: dict[str, str] = {}
    for use in grid.explainers:
        fits, unfitted = dict(use.fits), dict(use.unfitted)
        for name, asked in use.wanted.items():
            asked.model.to(device).eval()
            found = fit_or_reason(asked, failed, observer.fitting())
            if isinstance(found, str):
                unfitted[name] = found
                observer.unfitted(use.label, name, found)
                told.append(f"{use.label} on {name}: {found}")
            else:
                fits[name] = found
                del unfitted[name]
                observer.fitted(use.label, name, told_counts(found.record, counts(asked.plugin)))
        explainers.append(replace(use, fits=fits, unfitted=unfitted, wanted={}))
    return replace(grid, explainers=tuple(explainers)), tuple(told)


def _run_locked(
    grid: Grid, store: RunStore, observer: Observer, fresh: bool, figures: bool, save_maps: bool
) -> Run:
    from faithmap.leaderboard import write_boards
    from faithmap.report.variants import clear_variants, write_variants

    store.clean()
    if fresh:
        store.clear()
        clear_variants(store.path)
    held = store.manifest()
    grid_identity = identity(grid)
    if held is not None:
        refuse_other_identity(held["identity"], grid_identity, store.path)
    settings = resolve_settings(grid, held)
    apply_settings(grid, settings)
    variants, library = RunStore(store.path / VARIANTS), None
    if grid.config.variants:
        variants.create()
        library = MapLibrary(variants.path / "maps")
    groups = make_groups(grid, settings, library)
    cells = [task.cell.key for group in groups for task in group.tasks] + [group.read_key for group in groups]
    if held is not None:
        merged = {**held["identity"]["weights"], **grid_identity["weights"]}
        grid_identity = {**grid_identity, "weights": merged}
    content = {**manifest(grid, grid_identity, settings, cells), "plan": planned(groups)}
    reliability.record(content, reliability.judge(grid, held, observer))
    store.write_manifest(content)
    images = {dataset.label: [sample.id for sample in samples] for dataset, samples in grid.datasets}
    storage.write_bytes(store.path / IMAGES, (json.dumps(images, indent=0) + "\n").encode())
    run_local(groups, store, observer, save_maps)
    for group in groups:
        entry = content["datasets"][group.dataset]
        entry["unreadable"] = max(entry["unreadable"], len(group.unreadable & set(images[group.dataset])))
    store.write_manifest(content)
    drawn = draw_previews(groups, store) if figures else []
    written = write_boards(*read_run(store.path), store.path, figures=figures)
    if library is not None:
        multiverse.run_variants(grid, settings, variants, library, observer, content["verdicts"])
        library.drop()
        written += write_variants(store.path, figures=figures)
    return Run(store.path, content, (*written, *drawn))


def planned(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """What each cell of the request holds once it is complete, by cell key."""
    return {
        task.cell.key: {
            "model": task.cell.model,
            "dataset": task.cell.dataset,
            "explainer": task.cell.label,
            "specs": [use.spec for use in task.metrics if use.facts.sample is None],
        }
        for group in groups
        for task in group.tasks
    }


def refuse_other_identity(held: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse to mix rows that must not stand beside each other.

    Raises:
        RequestError: names the setting, what the folder holds, and what was asked for.
    """
    advice = "name another folder with --out, or drop what it holds with --fresh"
    for key in ("seed", "precision", "map_grid", "target"):
        if held.get(key) != asked[key]:
            raise RequestError(
                f"{path} holds a run of {key} = {held.get(key)!r}, asked for {asked[key]!r}; {advice}"
            )
    for name, digest_asked in asked["weights"].items():
        digest_held = held.get("weights", {}).get(name, digest_asked)
        if digest_held != digest_asked:
            raise RequestError(
                f"{path} holds a run of other weights for model '{name}' (digest {digest_held}, asked for "
                f"{digest_asked}); {advice}"
            )


def resolve_settings(grid: Grid, held: Mapping[str, Any] | None) -> dict[str, Any]:
    """Decide once what the composition of batches depends on; a resumed run keeps what it started with.

    Raises:
        RequestError: another batch size or number of threads is asked for than the folder holds.
    """
    run_settings = grid.config.run
    device = resolve_device(run_settings.device)
    batch_size = run_settings.batch_size
    if batch_size == "auto":
        batch_size = 16 if device == "cpu" else 32
    resolved: dict[str, Any] = {
        **run_settings.model_dump(mode="json"),
        "device": device,
        "batch_size": batch_size,
        "threads": run_settings.threads or usable_cores(),
        "chunks": {model.name: chunk_size(model) for model in grid.models},
    }
    if held is None:
        return resolved
    for key, asked in (("batch_size", run_settings.batch_size), ("threads", run_settings.threads)):
        if asked not in ("auto", None) and asked != held["settings"][key]:
            raise RequestError(
                f"the folder holds a run of {key} = {held['settings'][key]}, asked for {asked}, which would "
                "change rows by rounding; leave it out, name another folder with --out, or use --fresh"
            )
        resolved[key] = held["settings"][key]
    return resolved


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_device(name: str) -> str:
    """The device to use: "auto" takes CUDA where it is, else the CPU.

    Apple's devices must be named, as they have no double precision, in which scores are computed.

    Raises:
        RequestError: the device asked for is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise RequestError(f"device '{name}' is not there; use --device cpu, or see `faithmap doctor`")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device 'mps' is not there; use --device cpu, or see `faithmap doctor`")
    return name


def apply_settings(grid: Grid, settings: Mapping[str, Any]) -> None:
    """Put models on the device and fix threads and precision."""
    torch.set_num_threads(int(settings["threads"]))
    for model in grid.models:
        model.to(settings["device"])
        model.eval()
        model.precision = settings["precision"]


def make_groups(grid: Grid, settings: Mapping[str, Any], library: MapLibrary | None = None) -> list[Group]:
    """One group for each model and dataset, with its tasks and shards; maps go into the library, if any."""
    groups = []
    for model in grid.models:
        for dataset, samples in grid.datasets:
            read_key = f"read-{digest(dataset.key, model.digest(), grid.config.run.map_grid)}"
            groups.append(
                Group(
                    model=model,
                    config=grid.config,
                    tasks=plan_tasks(grid, model, dataset),
                    shards=shards(samples, int(settings["batch_size"])),
                    read_key=read_key,
                    dataset=dataset.label,
                    pool=Pool(dataset.samples, model),
                    gives=dataset.gives,
                    library=library,
                )
            )
    return groups
