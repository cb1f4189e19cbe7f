"""A run folder: Parquet files of rows written atomically, a manifest, and a lock.

`rows/<cell key>/<shard>.parquet` holds the rows of one unit. A file is written under another name,
flushed to the disk and renamed, so a killed run leaves whole units or nothing. What is done is read
from the rows themselves.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from faithmap.errors import FaithmapError, RequestError
from faithmap.records import Row

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = pa.schema(
    [
        ("model", pa.string()), ("dataset", pa.string()), ("explainer", pa.string()), ("params", pa.string()),
        ("map_grid", pa.string()), ("seed", pa.int64()), ("spec", pa.string()), ("image_id", pa.string()),
        ("label", pa.int64()), ("predicted", pa.int64()), ("target", pa.int64()), ("metric", pa.string()),
        ("value", pa.float64()), ("status", pa.string()), ("reason", pa.string()),
        ("curve", pa.list_(pa.float64())),
    ]
)  # fmt: skip
KEY_COLUMNS = [
    "model", "dataset", "explainer", "params", "map_grid", "seed", "spec", "image_id", "metric",
]  # fmt: skip
MANIFEST = "manifest.json"
#: What every manifest holds, and boards are made of.
ESSENTIAL = {
    "identity": dict, "settings": dict, "request": dict, "models": dict, "datasets": dict,
    "explainers": dict, "metrics": list, "cells": list,
}  # fmt: skip
UNFINISHED = ".unfinished"
PREVIEWS = "previews"
LOCK = ".lock"

#: (image id, metric spec): what a cell has rows of.
Done = set[tuple[str, str]]


class RunStore:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def rows_path(self) -> Path:
        """Where the rows lie."""
        return self.path / "rows"

    def refuse_foreign(self) -> None:
        """Refuse a folder of something else, or a file.

        Raises:
            RequestError: it holds files, other than requests, and no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"cannot write to {self.path} (it is a file); name another folder with --out")
        held = [self.path / name for name in (MANIFEST, LOCK) if (self.path / name).exists()]
        if held or self.rows_path.is_dir() or not self.path.is_dir():
            return
        # A request may lie beside what it makes.
        try:
            foreign = any(entry.suffix != ".toml" for entry in self.path.iterdir())
        except OSError as error:
            raise _unusable(self.path, error) from error
        if foreign:
            raise RequestError(
                f"{self.path} is not empty and holds no run; name another folder with --out, or empty it"
            )

    def create(self) -> None:
        """Make the folder.

        Raises:
            RequestError: it cannot be made or written to, or is a folder of something else.
        """
        self.refuse_foreign()
        try:
            self.rows_path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe{UNFINISHED}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise _unusable(self.path, error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock is the operating system's and dies with the process.

        Raises:
            RequestError: another process holds it.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RequestError(
                f"another process is writing to {self.path}; wait for it, or name another folder with --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in self.path.rglob(f"*{UNFINISHED}"):
            leftover.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the rows and the manifest (`--fresh`)."""
        for file in self.rows_path.rglob("*.parquet"):
            file.unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)

    def done(self, keys: Iterable[str]) -> dict[str, Done]:
        """What is stored already, by cell key.

        Raises:
            FaithmapError: a file of rows is damaged; it is named.
        """
        found: dict[str, Done] = {}
        for key in keys:
            units: Done = set()
            for file in sorted((self.rows_path / key).glob("*.parquet")):
                table = _read(file, ["image_id", "spec"])
                units |= set(zip(table["image_id"].to_pylist(), table["spec"].to_pylist(), strict=True))
            found[key] = units
        return found

    def drop_other_skips(self, key: str, reason: str) -> None:
        """Remove rows that say why a cell is skipped, where that is no longer the reason."""
        for file in sorted((self.rows_path / key).glob("*.parquet")):
            table = _read(file, ["status", "reason"])
            said = set(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True))
            if {status for status, _ in said} == {"skipped"} and said != {("skipped", reason)}:
                file.unlink()

    def write(self, key: str, shard: str, rows: Sequence[Row]) -> None:
        """Write the rows of one unit, whole or not at all."""
        names = [field.name for field in fields(Row)]
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        write_table(self.rows_path / key / f"{shard}.parquet", pa.table(columns, schema=SCHEMA))

    def write_maps(self, key: str, shard: str, ids: Sequence[str], maps: Any) -> None:
        """Write the maps (B, h, w) of one unit as `maps/<cell key>/<shard>.npz`, with the images' ids."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, ids=np.array(ids), maps=maps.cpu().numpy())
        write_bytes(self.path / "maps" / key / f"{shard}.npz", buffer.getvalue())

    def write_preview(self, key: str, ids: Sequence[str], maps: Any) -> None:
        """Keep the maps (B, h, w) of a cell's first images, for the figure of heat maps."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, ids=np.array(ids), maps=maps.half().cpu().numpy())
        write_bytes(self.path / PREVIEWS / f"{key}.npz", buffer.getvalue())

    def preview(self, key: str) -> dict[str, Any]:
        """Maps (h, w) of a cell's first images by image id; empty where none are kept."""
        import numpy as np

        file = self.path / PREVIEWS / f"{key}.npz"
        if not file.is_file():
            return {}
        with np.load(file) as kept:
            return dict(zip(kept["ids"].tolist(), kept["maps"].astype("float32"), strict=True))

    def rows(self, keys: Iterable[str] | None = None) -> pd.DataFrame:
        """All rows, or those of some cells, as a frame sorted by their unique key."""
        folders = [self.rows_path] if keys is None else [self.rows_path / key for key in keys]
        files = [file for folder in folders for file in sorted(folder.rglob("*.parquet"))]
        return frame(files)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None before the first run.

        Raises:
            FaithmapError: it cannot be read.
        """
        file = self.path / MANIFEST
        if not file.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FaithmapError(
                f"{file} is damaged ({error}); restore it, or run again with --fresh"
            ) from error
        held = content if isinstance(content, dict) else {}
        missing = [key for key, kind in ESSENTIAL.items() if not isinstance(held.get(key), kind)]
        if missing:
            raise FaithmapError(
                f"{file} is no manifest of a run (it has no '{missing[0]}'); restore it, or run again with "
                "--fresh"
            )
        return content

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        """Replace the manifest, atomically."""
        text = json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n"
        write_bytes(self.path / MANIFEST, text.encode())


def _unusable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"cannot write to {path} ({error.strerror or error}); name another folder with --out")


def frame(files: Sequence[Path]) -> pd.DataFrame:
    """Read files of rows into one frame, sorted by the unique key, each key once."""
    tables = [_read(file) for file in files]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    rows: pd.DataFrame = table.to_pandas()
    return rows.drop_duplicates(KEY_COLUMNS).sort_values(KEY_COLUMNS, kind="stable", ignore_index=True)


def write_table(file: Path, table: pa.Table, level: int | None = None) -> None:
    """Write a Parquet file atomically, at a level of compression where it matters more than time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}{UNFINISHED}")
    pq.write_table(table, temporary, compression="zstd", compression_level=level)
    _publish(temporary, file)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}{UNFINISHED}")
    temporary.write_bytes(content)
    _publish(temporary, file)


def _publish(temporary: Path, file: Path) -> None:
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise FaithmapError(
            f"{file} is damaged ({type(error).__name__}); delete it and run again: "
            "only its rows are computed anew"
        ) from error
