"""Image datasets of Hugging Face's hub, or on disk in its formats: the one module that asks its library.

`open_table` finds a split of a dataset and gives its rows, with images as they are stored. The network is
asked only where `download` says so.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from faithmap.errors import RequestError, nearest
from faithmap.pictures import file_size
from faithmap.records import digest

WHO = "dataset 'huggingface'"
INSTALL = 'pip install "datasets>=4.0"'
#: A commit of the hub in full.
COMMIT = re.compile(r"[0-9a-f]{40}")
#: Addresses in place of files.
REMOTE = re.compile(r"[a-z][a-z0-9+]*://")

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


class Rows(Protocol):
    """Rows of a table, by place and column."""

    def __len__(self) -> int: ...

    def cell(self, row: int, column: str) -> Any:
        """One value."""

    def column(self, name: str) -> list[Any]:
        """All values of a column."""


@dataclass(frozen=True)
class Table:
    """A split of a dataset."""

    rows: Rows
    columns: tuple[str, ...]
    #: Those that hold images; their cells are {"bytes": ..., "path": ...} or None.
    images: frozenset[str]
    #: Names of the classes, for columns whose type says so.
    class_names: Mapping[str, tuple[str, ...]]
    split: str
    #: The hub's commit, or a digest of the files on disk.
    revision: str

    def check_column(self, parameter: str, name: str, *, of_images: bool = False) -> None:
        """Refuse a column that is not there, or holds something else than images where these are wanted.

        Raises:
            RequestError: names the nearest columns.
        """
        known = self.images if of_images else self.columns
        if name not in known:
            kind = "column of images" if of_images else "column"
            raise RequestError(f"{WHO}, {parameter}: there is no {kind} '{name}'; {nearest(name, known)}")


def open_table(
    path: str | None,
    *,
    config: str | None,
    split: str | None,
    revision: str | None,
    root: Path | None,
    data_files: DataFiles | None,
    take: int | None,
    download: bool,
) -> Table:
    """Open one split.

    Args:
        path: a dataset's id on the hub, or with `root` the name of a format such as "imagefolder" or
            "parquet"; None lets the library tell the format of what lies in `root`.
        config: the configuration (subset) of the dataset.
        split: the split's name; None takes the only one there is.
        revision: branch, tag or commit on the hub.
        root: a folder on this machine.
        data_files: files below `root`, or in the dataset on the hub.
        take: stream the split and keep this many first rows; None prepares the whole split.
        download: the network may be asked.

    Raises:
        RequestError: the library is missing, or the dataset, configuration, split or revision is not to
            be had; the sentence says which and what to do.
    """
    library = _library()
    source = path or str(root)
    if not download:
        _refuse_addresses("path", path)
        _refuse_addresses("data_files", data_files)
    with _network(library, allowed=download), _quiet(library, not download):
        try:
            builder = _builder(library, path, config, revision, root, data_files)
            _check_revision(builder, path, revision, on_disk=root is not None)
            name, data = _open_split(builder, split, source, streaming=take is not None)
            return _table(library, builder, data, name, root, take)
        except RequestError:
            raise
        except Exception as error:
            raise _unavailable(source, root is not None, download, error) from error


def _library() -> Any:
    missing = RequestError(f"{WHO} needs Hugging Face's library datasets; run: {INSTALL}")
    try:
        import datasets  # noqa: TID251  (the library, not the room of plugins)
    except ImportError as error:
        raise missing from error
    # Without the library, a checkout on sys.path lends its folder of plugins to that name.
    if not hasattr(datasets, "load_dataset_builder"):
        raise missing
    return datasets


@contextlib.contextmanager
def _network(library: Any, *, allowed: bool) -> Iterator[None]:
    """Keep the library offline for a while, unless it may ask the network."""
    settings = library.config
    before = settings.HF_HUB_OFFLINE
    if allowed and before:
        raise RequestError(
            f"{WHO} was given download = true, but the network may not be asked (--offline, or "
            "HF_HUB_OFFLINE); leave out one of the two"
        )
    settings.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet(library: Any, quiet: bool) -> Iterator[None]:
    """Without the library's bars and its warnings that the hub was not asked: these are for downloads."""
    if not quiet:
        yield
        return
    bars, verbosity = not library.are_progress_bars_disabled(), library.logging.get_verbosity()
    library.disable_progress_bars()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bars()


def _refuse_addresses(parameter: str, given: DataFiles | None) -> None:
    if isinstance(given, Mapping):
        for part in given.values():
            _refuse_addresses(parameter, part)
        return
    for place in [given] if isinstance(given, str) else given or ():
        if REMOTE.search(str(place)) or str(place).startswith("buckets/"):
            raise RequestError(
                f"{WHO}, {parameter}: '{place}' is an address, and nothing is downloaded unasked; give "
                "download = true, or what lies on this machine"
            )


def _builder(
    library: Any,
    path: str | None,
    config: str | None,
    revision: str | None,
    root: Path | None,
    data_files: DataFiles | None,
) -> Any:
    given: dict[str, Any] = {"name": config, "data_files": data_files}
    if root is None and path in library.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise RequestError(f"{WHO}: '{path}' is a format of files; give root = the folder that they lie in")
    if root is None:
        return library.load_dataset_builder(path, revision=revision, **given)
    if not root.is_dir():
        raise RequestError(f"{WHO}: no such folder: {root}; give root = a folder of image data")
    if path is None:
        return library.load_dataset_builder(str(root), **given)
    return library.load_dataset_builder(path, data_dir=str(root), **given)


def _check_revision(builder: Any, path: str | None, revision: str | None, *, on_disk: bool) -> None:
    """A commit that was asked for must be the one that is used: the cache knows only its latest."""
    if revision is None or not COMMIT.fullmatch(revision) or on_disk:
        return
    if builder.hash != revision:
        raise RequestError(
            f"{WHO}: this machine holds '{path}' at revision {builder.hash}, not {revision}; "
            "give download = true to fetch that, or name the one that is here"
        )


def _open_split(builder: Any, split: str | None, source: str, *, streaming: bool) -> tuple[str, Any]:
    """The split's name and its rows."""
    if streaming:
        streams = builder.as_streaming_dataset()
        name = _which(split, [str(name) for name in streams], source)
        return name, streams[name]
    builder.download_and_prepare()
    name = _which(split, [str(name) for name in builder.info.splits], source)
    return name, builder.as_dataset(split=name)


def _which(split: str | None, known: Sequence[str], source: str) -> str:
    if split is None and len(known) == 1:
        return known[0]
    if split is None:
        raise RequestError(f"{WHO}: '{source}' has the splits {', '.join(known)}; give split = one of them")
    if split not in known:
        hint = " (a slice would change the ids; take fewer images by limit)" if "[" in split else ""
        raise RequestError(f"{WHO}: '{source}' has no split '{split}'{hint}; {nearest(split, known)}")
    return split


def _unavailable(source: str, on_disk: bool, download: bool, error: Exception) -> RequestError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    if on_disk:
        todo = "expected image data there that Hugging Face's library can read"
    elif download:
        todo = "check the dataset's id, its config and the network"
    else:
        todo = "what is not on this machine yet is fetched with download = true"
    return RequestError(f"{WHO} cannot open '{source}' ({type(error).__name__}: {said[0][:300]}); {todo}")


def _table(library: Any, builder: Any, data: Any, split: str, root: Path | None, take: int | None) -> Table:
    features = data.features
    if features is None:
        raise RequestError(f"{WHO}: the stream does not say what its columns are; leave out streaming")
    images = frozenset(name for name, kind in features.items() if isinstance(kind, library.Image))
    for name in sorted(images):
        data = data.cast_column(name, library.Image(decode=False))
    names = {
        name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, library.ClassLabel)
    }
    if take is None:
        rows: Rows = _Stored(data)
    else:
        rows = _Kept([_at_hand(row, images) for row in islice(data, take)])
    revision = str(builder.hash) if root is None else _digest_of_files(builder, split, root)
    return Table(rows, tuple(features), images, names, split, revision)


def _at_hand(row: dict[str, Any], images: frozenset[str]) -> dict[str, Any]:
    """A streamed row with the bytes of the images that it only points to."""
    import fsspec

    for name in images:
        cell = row[name]
        if cell is not None and cell["bytes"] is None and REMOTE.search(str(cell["path"])):
            with fsspec.open(cell["path"], "rb") as stream:
                row = {**row, name: {**cell, "bytes": stream.read()}}
    return row


def _digest_of_files(builder: Any, split: str, root: Path) -> str:
    """The names below the root and the sizes of the files that a split is read from."""
    base = root.resolve()
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, ())]
    named = [(Path(os.path.relpath(file, base)).as_posix(), file_size(file)) for file in files]
    return digest(sorted(named))


class _Stored:
    """Rows that lie prepared on disk; a cell reads its own column alone."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._data)

    def cell(self, row: int, column: str) -> Any:
        if column not in self._columns:
            self._columns[column] = self._data.select_columns([column])
        return self._columns[column][row][column]

    def column(self, name: str) -> list[Any]:
        return list(self._data.select_columns([name])[:][name])


class _Kept:
    """The first rows of a stream, kept in memory."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def cell(self, row: int, column: str) -> Any:
        return self._rows[row][column]

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self._rows]
