"""Read run folders back: rows and manifest of the current request, without loading any model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from faithmap._curves import CURVE_SCORES
from faithmap.columns import is_time
from faithmap.errors import FaithmapError, RequestError
from faithmap.sources import COST, joined, refuse_other_meanings
from faithmap.store import KEY_COLUMNS, MANIFEST, SCHEMA, RunStore, write_table

if TYPE_CHECKING:
    import pandas as pd

IMAGES = "images.json"
#: The one folder of rows in a published board.
PUBLISHED = "published"
#: Published rows are written once and passed on many times: zstd's level that takes longest.
SMALLEST = 19


def read_run(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and manifest of a run folder: the cells and the images of its latest request.

    Raises:
        RequestError: the folder holds no run.
        FaithmapError: a file in it is damaged.
    """
    store = RunStore(path)
    manifest = store.manifest()
    if manifest is None:
        raise RequestError(f"{path} holds no run (no {MANIFEST}); give the folder that `faithmap run` wrote")
    rows = store.rows(manifest["cells"])
    chosen = read_images(store.path)
    if chosen is not None:
        kept = [
            name in chosen.get(dataset, ())
            for dataset, name in zip(rows["dataset"], rows["image_id"], strict=True)
        ]
        rows = rows[np.array(kept, bool)].reset_index(drop=True)
    return rows, manifest


def read_images(path: Path) -> dict[str, set[str]] | None:
    """The ids of the images asked for, by dataset; None where the folder does not list them."""
    file = path / IMAGES
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FaithmapError(f"{file} is damaged ({error}); run again to have it written anew") from error
    return {dataset: set(ids) for dataset, ids in content.items()}


def read_runs(paths: Sequence[str | Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and one manifest of several runs that may stand on one board.

    Where several runs hold a row, the one named first counts.

    Raises:
        RequestError: two of them differ in seed, precision, map grid, target or weights, hold other images
            of one dataset, or mean different things by one explainer's label.
    """
    import pandas as pd

    read = [read_run(path) for path in paths]
    first = read[0][1]
    merged: dict[str, Any] = {**first}
    for path, (_, other) in zip(paths[1:], read[1:], strict=True):
        _refuse_mixture(merged, other, path)
        refuse_other_meanings(merged, other, path)
        weights = {**merged["identity"]["weights"], **other["identity"]["weights"]}
        merged["identity"] = {**merged["identity"], "weights": weights}
        for key in ("models", "datasets", "explainers"):
            merged[key] = {**merged[key], **{k: v for k, v in other[key].items() if k not in merged[key]}}
        merged["explainers"] = {
            label: _with_fits(label, entry, other["explainers"].get(label, {}), path)
            for label, entry in merged["explainers"].items()
        }
        specs = [entry["spec"] for entry in merged["metrics"]]
        merged["metrics"] = merged["metrics"] + [m for m in other["metrics"] if m["spec"] not in specs]
        merged["request"] = {
            key: list(dict.fromkeys([*merged["request"][key], *other["request"][key]]))
            for key in merged["request"]
        }
        merged["verdicts"] = {**merged.get("verdicts", {}), **other.get("verdicts", {})}
        merged["cells"] = list(dict.fromkeys([*merged["cells"], *other["cells"]]))
    if len(read) > 1:
        merged["sources"] = joined([manifest for _, manifest in read])
    timings = [entry["spec"] for entry in merged["metrics"] if entry.get("name") == COST]
    _refuse_other_images(paths, [rows[~rows["spec"].isin(timings)] for rows, _ in read])
    rows = pd.concat([rows for rows, _ in read], ignore_index=True)
    return rows.drop_duplicates(KEY_COLUMNS).sort_values(
        KEY_COLUMNS, kind="stable", ignore_index=True
    ), merged


def _with_fits(
    label: str, entry: Mapping[str, Any], other: Mapping[str, Any], path: str | Path
) -> dict[str, Any]:
    """An explainer's entry with the fits of both folders."""
    one, two = entry.get("fits", {}), other.get("fits", {})
    for model in set(one) & set(two):
        if one[model]["digest"] != two[model]["digest"]:
            raise RequestError(
                f"{path} was run with another fit of '{label}' for model '{model}' than the first folder "
                f"({two[model]['key']} and {one[model]['key']}); give them labels of their own, or write a "
                "board for each"
            )
    return {**entry, "fits": {**two, **one}} if one or two else dict(entry)


def _refuse_mixture(first: Mapping[str, Any], other: Mapping[str, Any], path: str | Path) -> None:
    for key in ("seed", "precision", "map_grid", "target"):
        if first["identity"][key] != other["identity"][key]:
            raise RequestError(
                f"{path} was run with {key} = {other['identity'][key]!r}, the first folder with "
                f"{first['identity'][key]!r}; such rows are not compared: write a board for each"
            )
    for name, weights in other["identity"]["weights"].items():
        if first["identity"]["weights"].get(name, weights) != weights:
            raise RequestError(f"{path} was run with other weights of model '{name}'; write a board for each")


def _refuse_other_images(paths: Sequence[str | Path], tables: Sequence[pd.DataFrame]) -> None:
    """Methods are compared on the same images: another limit, part or folder makes another board.

    Times, which are taken on a few of the images only, are not among the rows.
    """
    seen: dict[str, tuple[str | Path, set[str]]] = {}
    for path, rows in zip(paths, tables, strict=True):
        for dataset, ids in rows.groupby("dataset", observed=True)["image_id"]:
            first, known = seen.setdefault(str(dataset), (path, set(ids)))
            if known != set(ids):
                raise RequestError(
                    f"{path} holds {len(set(ids))} images of '{dataset}', {first} {len(known)}, of which "
                    f"{len(known & set(ids))} are the same; run both with one limit and part, or write a "
                    "board for each"
                )


def publish(rows: pd.DataFrame, manifest: Mapping[str, Any], out: Path) -> None:
    """Write rows and manifest into a folder of their own, from which the board can be rebuilt.

    Of the curves only those are kept that a board is made of, which are drawn, and times one by one: those of
    probabilities alone would be half of the file.

    Raises:
        RequestError: the folder holds a run, or something else than a published board.
    """
    store = RunStore(out)
    store.create()
    held = store.manifest()
    if held is not None and held["cells"] != [PUBLISHED]:
        raise RequestError(f"{out} holds a run of its own, which the board would damage; name another folder")
    read = [score for score in rows["metric"].unique() if score in CURVE_SCORES or is_time(score)]
    rows = rows.assign(curve=rows["curve"].where(rows["metric"].isin(read), None))
    table = pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False)
    write_table(store.rows_path / PUBLISHED / "rows.parquet", table, level=SMALLEST)
    kept = {key: value for key, value in manifest.items() if key != "plan"}
    store.write_manifest({**kept, "cells": [PUBLISHED]})
