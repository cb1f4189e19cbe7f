"""Datasets as their authors lay them out: where they lie, the tables that list them, what identifies them."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from faithmap.errors import RequestError
from faithmap.pictures import Picture, file_size
from faithmap.records import Sample, SampleList, digest

#: Set by `--offline`, and by whoever wants no traffic at all.
OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
#: How archives end. They are not fetched twice; what was unpacked of them is.
ENDINGS = (".tar", ".tgz", ".gz", ".zip")


@dataclass(frozen=True, slots=True)
class Home:
    """How a dataset is found: its folder as unpacked, and what to do where it is not there."""

    #: Registry name of the dataset.
    name: str
    #: The folder that its archive unpacks to.
    folder: str
    #: What must lie in that folder.
    holds: Sequence[str]
    #: Where the data are had and what to unpack, as the end of a sentence.
    advice: str
    #: What is said behind it to those who have not asked for a download, where there is one.
    download: str = ""

    def find(self, root: str | Path | None) -> Path:
        """The dataset's folder: `root` itself, or the folder of that name in it.

        Without a root it is looked for where `fetch` puts what it downloads.

        Raises:
            RequestError: it is not there; the sentence says where to get it and where to put it.
        """
        base = base_of(root)
        if root is None and not (base / self.folder).is_dir():
            raise RequestError(f"dataset '{self.name}' needs root; {self.advice}{self.download}")
        if not base.is_dir():
            raise RequestError(f"dataset '{self.name}': no such folder: {base}; {self.advice}{self.download}")
        for place in (base / self.folder, base):
            if place.is_dir() and all((place / name).exists() for name in self.holds):
                return place
        place = base / self.folder if (base / self.folder).is_dir() else base
        missing = next(name for name in self.holds if not (place / name).exists())
        raise RequestError(
            f"dataset '{self.name}': {place} holds no '{missing}'; {self.advice}{self.download}"
        )

    def is_in(self, base: Path) -> bool:
        """Whether a folder holds the dataset."""
        try:
            self.find(base)
        except RequestError:
            return False
        return True

    def fetch(
        self,
        root: str | Path | None,
        download: Callable[[Path], None],
        complete: Callable[[Path], bool] = Path.is_dir,
    ) -> None:
        """Download it below `root`, unless it lies there already.

        Args:
            root: the folder to download to; by default `data` in the user's folder of faithmap.
            download: does so, into the folder that it is given.
            complete: whether the dataset's folder holds, or has beside it, what else is wanted.

        Raises:
            RequestError: the network may not be asked, or the download fails, as it does where a checksum
                is wrong.
        """
        base = base_of(root)
        if self.is_in(base) and complete(self.find(base)):
            return
        if os.environ.get(OFFLINE_VARIABLE, "").lower() in ("1", "true", "yes", "on"):
            raise RequestError(
                f"dataset '{self.name}' is not in {base}, and the network may not be asked "
                f"(--offline, or {OFFLINE_VARIABLE}); {self.advice}"
            )
        if not self.is_in(base) and (base / self.folder).exists():
            raise RequestError(
                f"dataset '{self.name}': {base / self.folder} is not complete, as an unpacking that was cut "
                "off leaves it; delete it and run again"
            )
        try:
            with kept_inside():
                _unpacked_elsewhere(base, self.name, download)
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise RequestError(
                f"dataset '{self.name}' cannot be downloaded: {said[0].rstrip('.')}; {self.advice}"
            ) from error


@contextmanager
def kept_inside() -> Iterator[None]:
    """Let no archive write outside the folder that it is unpacked in.

    torchvision unpacks without a filter, and before Python 3.14 that lets members lead anywhere.
    """
    if not hasattr(tarfile, "data_filter"):  # before 3.11.4
        yield
        return
    before = vars(tarfile.TarFile)["extraction_filter"]  # as it is held: a look through the class unwraps it
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _unpacked_elsewhere(base: Path, name: str, download: Callable[[Path], None]) -> None:
    """Download into a folder beside, and move what is there when it is complete: a folder that is in place
    was unpacked to its end. Archives are kept until then, so that they are not fetched twice."""
    scratch = base / f".{name}.unfinished"
    for folder, _, files in os.walk(scratch, topdown=False):
        for file in files:
            if not file.endswith(ENDINGS):
                Path(folder, file).unlink()
        with suppress(OSError):  # an archive is in it
            Path(folder).rmdir()
    scratch.mkdir(parents=True, exist_ok=True)
    download(scratch)
    for entry in list(scratch.iterdir()):
        if entry.is_dir():
            shutil.copytree(entry, base / entry.name, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(scratch)


def base_of(root: str | Path | None) -> Path:
    """The folder that is meant: `root`, or where datasets lie that were downloaded without one."""
    from faithmap.fitting import home

    return Path(root).expanduser() if root is not None else home() / "data"


def download_archives(base: Path, archives: Iterable[tuple[str, str, str]]) -> None:
    """Download and unpack archives (address, file name, MD5) with torchvision, which checks the sums."""
    from torchvision.datasets.utils import download_and_extract_archive

    for address, name, md5 in archives:
        download_and_extract_archive(address, download_root=str(base), filename=name, md5=md5)


def one_of(dataset: str, parameter: str, given: object, known: Sequence[str]) -> str:
    """The word given, if it is known.

    Raises:
        RequestError: it is not.
    """
    if given not in known:
        words = ", ".join(f"'{word}'" for word in known)
        raise RequestError(f"dataset '{dataset}', {parameter}: got {given!r}, expected one of {words}")
    return str(given)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: its values, and where it stands, for errors."""

    where: str
    values: tuple[str, ...]


def lines(file: Path, form: str, comment: str | None = None) -> Iterator[Line]:
    """The lines of a table, split at blanks; the last value may hold blanks.

    Args:
        file: a UTF-8 text file.
        form: its columns by name, as in "image x y"; an error quotes it.
        comment: lines that begin with it are passed over, as empty ones are.

    Raises:
        RequestError: the file is missing or no text, or a line has too few values.
    """
    count = len(form.split())
    for number, text in enumerate(text_of(file).splitlines(), 1):
        values = text.split(None, count - 1)
        if not values or (comment is not None and text.lstrip().startswith(comment)):
            continue
        where = f"{file}, line {number}"
        if len(values) < count:
            raise RequestError(f"{where}: expected '{form}', got '{text.strip()}'; is the file complete?")
        yield Line(where, tuple(value.strip() for value in values))


def by_first(file: Path, form: str) -> dict[str, Line]:
    """The lines of a table by their first value, which is left out of their values.

    Raises:
        RequestError: as `lines` does, or a first value occurs twice, or there are no lines.
    """
    found: dict[str, Line] = {}
    for line in lines(file, form):
        key = line.values[0]
        if key in found:
            raise RequestError(f"{line.where}: '{key}' occurs twice; expected one line for each")
        found[key] = Line(line.where, line.values[1:])
    if not found:
        raise RequestError(f"{file} is empty; expected lines of '{form}'")
    return found


def text_of(file: Path) -> str:
    """The text of a file.

    Raises:
        RequestError: it is missing or not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text: {error}; fetch it anew") from error
    except OSError as error:
        raise RequestError(
            f"{file} cannot be read: {error.strerror or error}; is it all unpacked?"
        ) from error


def whole(line: Line, place: int, what: str, least: int = 0, most: int | None = None) -> int:
    """A value of a line as a whole number within bounds.

    Raises:
        RequestError: it is none.
    """
    text = line.values[place]
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least or (most is not None and value > most):
        span = f"from {least} on" if most is None else f"from {least} to {most}"
        raise RequestError(f"{line.where}: the {what} is '{text}', expected a whole number {span}")
    return value


def real(line: Line, place: int, what: str) -> float:
    """A value of a line as a finite number.

    Raises:
        RequestError: it is none.
    """
    try:
        value = float(line.values[place])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{line.where}: the {what} is '{line.values[place]}', expected a number")
    return value


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a dataset on disk."""

    #: Path below the dataset's folder of images, with forward slashes.
    id: str
    picture: Picture
    label: int
    name: str


def sample_list(base: Path, entries: Sequence[Entry], class_names: Sequence[str]) -> SampleList:
    """Entries as samples, with a revision that changes with what lies there.

    The revision is a digest of the ids, labels and boxes, and of the sizes in bytes of images and masks.

    Raises:
        RequestError: not one of the images is there.
    """
    content = [
        (
            entry.id,
            entry.label,
            entry.picture.boxes,
            file_size(entry.picture.path),
            None if entry.picture.mask_path is None else file_size(entry.picture.mask_path),
        )
        for entry in entries
    ]
    if all(size is None for _, _, _, size, _ in content):
        raise RequestError(
            f"none of the {len(entries)} images that {base} lists is there, {entries[0].picture.path} for "
            "one; unpack the images too"
        )
    return SampleList(
        (sample_of(entry) for entry in entries), revision=digest(sorted(content)), class_names=class_names
    )


def sample_of(entry: Entry) -> Sample:
    """An entry as a sample: its image, boxes and mask are read when they are due."""
    picture = entry.picture
    return Sample(
        id=entry.id,
        image=picture.image,
        label=entry.label,
        boxes=picture.upright_boxes if picture.boxes else None,
        mask=picture.upright_mask if picture.mask_path is not None else None,
        name=entry.name,
        void=picture.upright_void if picture.is_void is not None else None,
    )
