"""Tiny ImageNet: 200 of ImageNet's classes at 64 x 64 pixels, with a box in every image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faithmap import dataset
from faithmap.annotations import pixel_edges
from faithmap.errors import RequestError
from faithmap.imagenet_classes import imagenet_classes
from faithmap.on_disk import Home, one_of, text_of
from faithmap.pictures import Box, Picture, file_size
from faithmap.records import Sample, SampleList, digest

FOLDER = "tiny-imagenet-200"
WNIDS, WORDS, VAL_BOXES = "wnids.txt", "words.txt", "val_annotations.txt"
SPLITS = ("val", "train")
LABELS = ("imagenet", "tiny", "wnids")
HOME = Home(
    name="tiny-imagenet",
    folder=FOLDER,
    holds=(WNIDS,),
    advice=(
        f"get {FOLDER}.zip from the course CS231n of Stanford University (cs231n.stanford.edu), unpack it, "
        f"and give root = the folder {FOLDER}"
    ),
)


@dataset(
    version=1,
    source="Le and Yang 2015: Tiny ImageNet Visual Recognition Challenge (CS231n, Stanford)",
    license="none of its own; ImageNet's terms of access: non-commercial research and education",
    revision="tiny-imagenet-200",
    citation="Y. Le, X. Yang. Tiny ImageNet Visual Recognition Challenge. CS231n, Stanford University, 2015.",
    gives={"label", "box"},
)
def tiny_imagenet(
    *, root: str | Path | None = None, split: str = "val", labels: str = "imagenet"
) -> Iterable[Sample]:
    """Tiny ImageNet: photographs of 200 of ImageNet's classes at 64 x 64 pixels, with a box each.

    Boxes name pixels: columns and rows from 0 to 63, both ends part of the box; they become pixel
    edges. Ids are the files' names, `val_0` or `n01443537_0`. The revision is a digest of ids, sizes
    in bytes, labels and boxes. The test images have no published labels and are not offered.

    Args:
        root: the folder `tiny-imagenet-200`, or the one that holds it.
        split: "val" (10,000 images) or "train" (100,000).
        labels: "imagenet" for models of ImageNet's 1000 classes; "tiny" for models of the 200,
            numbered by sorted WordNet id as image folders are; "wnids" for models that number them
            in the order of `wnids.txt`.

    Raises:
        RequestError: a folder or file is missing or malformed, or the split or the labels are
            unknown. An image that cannot be read raises `DataError`, only when it is loaded.
    """
    one_of(HOME.name, "split", split, SPLITS)
    one_of(HOME.name, "labels", labels, LABELS)
    top = HOME.find(root)
    wnids = text_of(top / WNIDS).split()
    numbers, names = _classes(top, wnids, labels)
    lines = list(_val(top) if split == "val" else _train(top, wnids))
    entries = []
    for line in lines:
        if line.wnid not in numbers:
            raise RequestError(f"{line.where}: the class '{line.wnid}' does not stand in {top / WNIDS}")
        entries.append((line.path.stem, file_size(line.path), numbers[line.wnid], line))
    if all(size is None for _, size, _, _ in entries):
        raise RequestError(f"no images are there, {lines[0].path} for one; unpack {FOLDER}.zip anew")
    return SampleList(
        (_sample(name, label, names[label], line) for name, _, label, line in entries),
        revision=digest([(name, size, label, line.box) for name, size, label, line in entries]),
        class_names=names,
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One image as a table of boxes lists it."""

    path: Path
    wnid: str
    #: As pixel edges.
    box: Box
    #: File and line, for errors.
    where: str


def _classes(top: Path, wnids: list[str], labels: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Labels by WordNet id, and the words of each label."""
    known = imagenet_classes()
    if labels == "imagenet":
        return {wnid: known.label(wnid, f"{top / WNIDS}") for wnid in wnids}, known.names
    order = sorted(wnids) if labels == "tiny" else wnids
    words = _words(top / WORDS)
    return {wnid: label for label, wnid in enumerate(order)}, tuple(words.get(wnid, wnid) for wnid in order)


def _words(file: Path) -> dict[str, str]:
    """Words by WordNet id; the file lists many more than the 200."""
    pairs = (line.partition("\t") for line in text_of(file).splitlines())
    return {wnid.strip(): words.strip() for wnid, _, words in pairs}


def _val(top: Path) -> Iterator[Line]:
    file = top / "val" / VAL_BOXES
    for words, where in _table(file, 6):
        yield Line(top / "val" / "images" / words[0], words[1], _box(words[2:], where), where)


def _train(top: Path, wnids: list[str]) -> Iterator[Line]:
    for wnid in sorted(wnids):
        folder = top / "train" / wnid
        for words, where in _table(folder / f"{wnid}_boxes.txt", 5):
            yield Line(folder / "images" / words[0], wnid, _box(words[1:], where), where)


def _table(file: Path, columns: int) -> Iterator[tuple[list[str], str]]:
    """The lines of a table without a heading, with the place of each."""
    lines = text_of(file).splitlines()
    if not lines:
        raise RequestError(f"{file} lists no images; unpack {FOLDER}.zip anew")
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != columns:
            raise RequestError(f"{file}, line {number}: got '{line.strip()}', expected {columns} values")
        yield words, f"{file}, line {number}"


def _box(words: list[str], where: str) -> Box:
    if not all(word.isascii() and word.isdigit() for word in words):
        raise RequestError(f"{where}: malformed box '{' '.join(words)}'; expected four numbers of pixels")
    x0, y0, x1, y1 = (float(word) for word in words)
    if x0 > x1 or y0 > y1:
        raise RequestError(f"{where}: malformed box '{' '.join(words)}'; expected x0 <= x1 and y0 <= y1")
    return pixel_edges((x0, y0, x1, y1), 0)


def _sample(name: str, label: int, words: str, line: Line) -> Sample:
    picture = Picture(line.path, (line.box,))
    return Sample(id=name, image=picture.image, label=label, boxes=picture.upright_boxes, name=words)
