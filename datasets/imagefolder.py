"""Images of one's own: a folder for each class, or a CSV that lists the files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from faithmap import dataset
from faithmap.class_map import ClassMap, names_by_label, read_label, read_rows
from faithmap.errors import RequestError, nearest
from faithmap.pictures import SUFFIXES, Box, Picture, file_size
from faithmap.records import Sample, SampleList, digest

BOX_FORM = "'x0,y0,x1,y1' in pixels of the stored image with x0 <= x1 and y0 <= y1, several joined by ';'"


@dataset(
    version=1,
    source="image files on this machine",
    license="that of the files",
    gives={"label", "box"},
)
def imagefolder(
    *,
    root: str | Path | None = None,
    index: str | Path | None = None,
    class_map: str | Path | None = None,
    unmapped: str = "refuse",
    split: str | None = None,
) -> Iterable[Sample]:
    """Images in class folders, or listed in a CSV, with boxes where the CSV has them.

    Without `index`, each folder in `root` is a class, its label the folder's place in the sorted
    names, its images all that lie in it at any depth. The revision is a digest of the paths, sizes,
    labels and boxes; ids are the paths below `root`.

    Args:
        root: the folder of the class folders, or that the paths of `index` start from; by default
            the folder of `index`.
        index: a CSV with the columns `path, label` and optionally `name`, `boxes` (`x0,y0,x1,y1` in
            pixels of the stored image, before any EXIF rotation; several joined by `;`) and `split`.
        class_map: a JSON object `{name: class}` or a CSV whose column `label` is the model's class
            and whose other columns are names; it says which of the model's classes a folder, or what
            stands in the column `label` of `index`, stands for. Several may stand for one class.
        unmapped: what becomes of images whose class the class map does not know: "refuse" takes it for
            a mistake, "drop" leaves them out.
        split: a folder below `root` that holds the class folders; with `index`, the value of its
            column `split` that is wanted.

    Raises:
        RequestError: a folder, file, column or class is missing, a label or box is malformed, or a
            path occurs twice. A file that cannot be read raises `DataError`, only when it is loaded.
    """
    classes = ClassMap.read(Path(class_map).expanduser()) if class_map is not None else None
    if unmapped not in ("refuse", "drop"):
        raise RequestError(f"dataset 'imagefolder', unmapped: got {unmapped!r}, expected refuse or drop")
    if unmapped == "drop" and classes is None:
        raise RequestError(
            "dataset 'imagefolder': unmapped = \"drop\" needs class_map, which says what is kept"
        )
    drop = unmapped == "drop"
    if index is not None:
        file = Path(index).expanduser()
        base = Path(root).expanduser() if root is not None else file.parent
        entries = _listed(file, base, classes, split, drop)
    elif root is not None:
        base = Path(root).expanduser()
        entries = _in_folders(base, classes, split, drop)
    else:
        raise RequestError(
            "dataset 'imagefolder' was given neither root nor index; give root = a folder of class folders, "
            "or index = a CSV with the columns path and label"
        )
    return _samples(base, entries, classes)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as folders or CSV describe it."""

    id: str
    path: Path
    label: int
    name: str
    boxes: tuple[Box, ...]


def _in_folders(root: Path, classes: ClassMap | None, split: str | None, drop: bool) -> list[Entry]:
    top = root / split if split else root
    if not root.is_dir() or not top.is_dir():
        beside = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        hint = f"; {nearest(split or '', beside)}" if beside else ""
        raise RequestError(
            f"no such folder: {top}{hint}; give root = a folder that holds a folder for each class"
        )
    folders = sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise RequestError(
            f"{top} holds no class folders; put the images of each class into a folder of its own"
        )
    entries = []
    for place, folder in enumerate(folders):
        if drop and classes is not None and folder.name not in classes:
            continue
        files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        # A folder without images needs no class, but keeps its place among the labels.
        label = classes[folder.name] if classes is not None and files else place
        entries += [Entry(file.relative_to(root).as_posix(), file, label, folder.name, ()) for file in files]
    if not entries and drop:
        raise _nothing_mapped(str(top), classes)
    if not entries:
        endings = ", ".join(sorted(SUFFIXES))
        raise RequestError(
            f"the {len(folders)} class folders of {top} hold no images; expected files in {endings}"
        )
    return entries


def _nothing_mapped(where: str, classes: ClassMap | None) -> RequestError:
    known = f"class map {classes.file}" if classes is not None else "the class map"
    return RequestError(
        f"{where}: {known} knows the class of none of the images; give its names as they stand"
    )


def _listed(file: Path, root: Path, classes: ClassMap | None, split: str | None, drop: bool) -> list[Entry]:
    needed = ("path", "label", "split") if split else ("path", "label")
    if not root.is_dir():
        raise RequestError(
            f"no such folder: {root}; give root = the folder that the paths of {file} start from"
        )
    entries: dict[str, Entry] = {}
    listed = 0
    for line, row in read_rows(file, "index", needed):
        if split and row["split"] != split:
            continue
        listed += 1
        if drop and classes is not None and row["label"] not in classes:
            continue
        where = f"index {file}, line {line}"
        path = _path_id(row["path"], root, where)
        if path in entries:
            raise RequestError(f"{where}: the path '{path}' occurs twice; list every image once")
        label = classes[row["label"]] if classes is not None else read_label(row["label"], where)
        name = row.get("name", "") or (row["label"] if classes is not None else "")
        entries[path] = Entry(path, root / path, label, name, _boxes(row.get("boxes", ""), where))
    if not entries and listed:
        raise _nothing_mapped(f"index {file}", classes)
    if not entries:
        wanted = f" of split '{split}'" if split else ""
        raise RequestError(f"index {file} lists no images{wanted}; expected a line for each image")
    return list(entries.values())


def _path_id(text: str, root: Path, where: str) -> str:
    """A path of the index as an id: below the root, with forward slashes."""
    if not text:
        raise RequestError(f"{where}: the path is blank; give each image's path below {root}")
    path = PurePath(os.path.normpath(text))
    if path.is_absolute():
        try:
            path = path.relative_to(root.absolute())
        except ValueError:
            raise RequestError(
                f"{where}: the path '{text}' does not lie in {root}; give paths relative to root"
            ) from None
    return path.as_posix()


def _boxes(text: str, where: str) -> tuple[Box, ...]:
    boxes = []
    for part in text.split(";") if text else ():
        try:
            x0, y0, x1, y1 = (float(number) for number in part.split(","))
        except ValueError:
            raise RequestError(f"{where}: malformed box '{part}'; expected {BOX_FORM}") from None
        # Boxes without an area occur in published data (Tiny-ImageNet's at the border); they hold nothing.
        if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 <= x1 and y0 <= y1):
            raise RequestError(f"{where}: malformed box '{part}'; expected {BOX_FORM}")
        boxes.append((x0, y0, x1, y1))
    return tuple(boxes)


def _samples(root: Path, entries: list[Entry], classes: ClassMap | None) -> SampleList:
    sizes = {entry.id: file_size(entry.path) for entry in entries}
    if all(size is None for size in sizes.values()):
        below = [folder for folder in root.iterdir() if (folder / entries[0].id).is_file()]
        raise RequestError(
            f"none of the {len(entries)} listed images lies in {root}, '{entries[0].id}' for one; "
            f"give root = {below[0] if below else 'the folder that the paths start from'}"
        )
    content = sorted((entry.id, sizes[entry.id], entry.label, entry.boxes) for entry in entries)
    return SampleList(
        (_sample(entry) for entry in entries),
        revision=digest(content),
        class_names=names_by_label(_class_names(entries, classes)),
    )


def _class_names(entries: list[Entry], classes: ClassMap | None) -> dict[int, str]:
    """The name of each label; the class map's own, if it has one, where several names stand for a class."""
    names: dict[int, set[str]] = {}
    for entry in entries:
        if entry.name:
            names.setdefault(entry.label, set()).add(entry.name)
    mapped = classes.titles if classes is not None else {}
    return {label: min(given) if len(given) == 1 else mapped.get(label, "") for label, given in names.items()}


def _sample(entry: Entry) -> Sample:
    picture = Picture(entry.path, entry.boxes)
    return Sample(
        id=entry.id,
        image=picture.image,
        label=entry.label,
        boxes=picture.upright_boxes if entry.boxes else None,
        name=entry.name,
    )
