"""Caltech-UCSD Birds 200-2011: two hundred species with boxes, segmentations and the places of parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faithmap import dataset
from faithmap.errors import RequestError, nearest
from faithmap.on_disk import (
    Entry,
    Home,
    Line,
    base_of,
    by_first,
    download_archives,
    lines,
    one_of,
    real,
    sample_list,
    whole,
)
from faithmap.pictures import Box, Picture
from faithmap.records import Sample, SampleList

if TYPE_CHECKING:
    import numpy as np
    import torch

NAME = "cub-200-2011"
#: Addresses and MD5 sums of the two archives, as CaltechDATA publishes them.
ARCHIVES = (
    (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
        "CUB_200_2011.tgz",
        "97eceeb196236b17998738112f37df78",
    ),
    (
        "https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz?download=1",
        "segmentations.tgz",
        "4d47ba1228eae64f2fa547c47bc65255",
    ),
)
HOME = Home(
    NAME,
    "CUB_200_2011",
    ("images.txt", "images"),
    "fetch CUB_200_2011.tgz, and segmentations.tgz for the masks, from "
    "https://www.vision.caltech.edu/datasets/cub_200_2011/, unpack both in one folder and give root = that "
    "folder",
    ", or give download = true to have it done (1.2 GB)",
)
SPLITS = ("test", "train", "all")
TRUTHS = ("auto", "box", "mask")


@dataset(
    version=1,
    source="Wah et al. 2011 (Caltech technical report CNS-TR-2011-001)",
    license=(
        "the archives state none; the photographs were collected on Flickr, belong to their owners, and are "
        "used for non-commercial research"
    ),
    citation=(
        "C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie. The Caltech-UCSD Birds-200-2011 Dataset. "
        "California Institute of Technology, CNS-TR-2011-001, 2011."
    ),
    gives={"label", "box", "mask"},
)
def cub_200_2011(
    *,
    root: str | Path | None = None,
    split: str = "test",
    truth: str = "auto",
    agreement: float = 0.5,
    part: str | None = None,
    part_radius: float = 0.1,
    download: bool = False,
) -> Iterable[Sample]:
    """Photographs of 200 species of birds, with a box, a segmentation and 15 parts.

    Labels are 0 to 199, the class ids of `classes.txt` less one. Ids are the paths of `images.txt`.
    The revision is a digest of ids, labels and boxes and of the files' sizes.

    Boxes are `x, y, x + width, y + height` of `bounding_boxes.txt` as they stand. They count pixels
    from 0: over all 11,788 images the least x is 0, and x + width is at most the image's width less one.

    Masks are the grey values of `segmentations/`, the share of the annotators who marked a pixel,
    above `agreement` of 255. Where both are given, energies and pointing games take the mask.

    Args:
        root: the folder that holds `CUB_200_2011/` and `segmentations/`, or `CUB_200_2011/` itself,
            with `segmentations/` in it or beside it.
        split: "test" (5,794 images), "train" (5,994) or "all", as `train_test_split.txt` has it.
        truth: "auto" gives boxes, and masks if the segmentations are there; "box" boxes alone;
            "mask" masks alone, and asks for the segmentations.
        agreement: share of the annotators, from 0 to below 1, that more than must have marked a
            pixel. 0.5, a majority, as in Chen et al. 2019 (ReDO); 0 takes any vote.
        part: the truth is a part instead of the bird: a name of `parts/parts.txt` such as "beak", or
            "eye", "leg" or "wing" for left and right. Each place where it is visible gives a square
            box and the disc in it as mask. An image that does not show the part has neither.
        part_radius: radius of the disc as a share of the longer side of the bird's box. 0.1 is where
            a predicted keypoint commonly counts as found (PCK, Yang and Ramanan 2013).
        download: fetch what is missing from CaltechDATA to `root`, with a check of the MD5 sums.

    Raises:
        RequestError: the data are not there, or a list of theirs is malformed; file and line are named.
    """
    one_of(NAME, "split", split, SPLITS)
    one_of(NAME, "truth", truth, TRUTHS)
    if not 0 <= agreement < 1:
        raise RequestError(f"dataset '{NAME}', agreement: got {agreement}, expected 0 <= agreement < 1")
    if not 0 < part_radius <= 1:
        raise RequestError(f"dataset '{NAME}', part_radius: got {part_radius}, expected 0 < part_radius <= 1")
    if download:
        wanted = ARCHIVES[1:] if HOME.is_in(base_of(root)) else ARCHIVES
        HOME.fetch(
            root,
            lambda base: download_archives(base, wanted),
            complete=lambda base: _segmentations(base) is not None,
        )
    base = HOME.find(root)
    names = _class_names(base / "classes.txt")
    entries = _entries(base, split, names)
    if part is not None:
        return _of_parts(base, entries, part, part_radius, names)
    masks = None if truth == "box" else _segmentations(base)
    if truth == "mask" and masks is None:
        raise RequestError(
            f"dataset '{NAME}': there is no segmentations/ in {base} or beside it; {HOME.advice}"
        )
    return sample_list(base, [_with_truth(entry, truth, masks, agreement) for entry in entries], names)


def _class_names(file: Path) -> list[str]:
    """Species by label: "001.Black_footed_Albatross" becomes "Black footed Albatross"."""
    found = {}
    for line in lines(file, "class_id class_name"):
        found[whole(line, 0, "class id", least=1) - 1] = line.values[1].split(".", 1)[-1].replace("_", " ")
    if not found:
        raise RequestError(f"{file} is empty; expected lines of 'class_id class_name'")
    return [found.get(label, "") for label in range(max(found) + 1)]


def _entries(base: Path, split: str, names: Sequence[str]) -> list[Entry]:
    """The images of a split with their boxes, in the order of `images.txt`."""
    images = by_first(base / "images.txt", "image_id image_name")
    classes = by_first(base / "image_class_labels.txt", "image_id class_id")
    boxes = by_first(base / "bounding_boxes.txt", "image_id x y width height")
    parts = by_first(base / "train_test_split.txt", "image_id is_training_image")
    entries = []
    for key, image in images.items():
        training = whole(_of(parts, key, image, "train_test_split.txt"), 0, "split", most=1)
        if split != "all" and training != (split == "train"):
            continue
        name = image.values[0]
        label = whole(_of(classes, key, image, "image_class_labels.txt"), 0, "class id", 1, len(names)) - 1
        box = _box(_of(boxes, key, image, "bounding_boxes.txt"))
        entries.append(Entry(name, Picture(base / "images" / name, (box,)), label, names[label]))
    if not entries:
        raise RequestError(f"{base / 'train_test_split.txt'} puts no image into the split '{split}'")
    return entries


def _of(table: dict[str, Line], key: str, image: Line, file: str) -> Line:
    if key not in table:
        raise RequestError(f"{image.where}: image '{key}' has no line in {file}; fetch the dataset anew")
    return table[key]


def _box(line: Line) -> Box:
    x, y = real(line, 0, "x"), real(line, 1, "y")
    width, height = real(line, 2, "width"), real(line, 3, "height")
    if width < 0 or height < 0:
        raise RequestError(f"{line.where}: the box is {width:g} wide and {height:g} high, expected 0 or more")
    return x, y, x + width, y + height


def _segmentations(base: Path) -> Path | None:
    """The folder of the masks, in the dataset's folder or beside it."""
    for folder in (base / "segmentations", base.parent / "segmentations"):
        if folder.is_dir():
            return folder
    return None


def _with_truth(entry: Entry, truth: str, masks: Path | None, agreement: float) -> Entry:
    picture = entry.picture
    if truth == "mask":
        picture = replace(picture, boxes=())
    if masks is not None:
        file = (masks / entry.id).with_suffix(".png")
        picture = replace(picture, mask_path=file, on_object=partial(_voted, agreement=agreement))
    return replace(entry, picture=picture)


def _voted(values: np.ndarray, *, agreement: float) -> np.ndarray:
    """Pixels that enough annotators marked; of a file with several channels the first holds the votes."""
    votes = values if values.ndim == 2 else values[..., 0]
    marked: np.ndarray = votes > 255 * agreement
    return marked


def _of_parts(base: Path, entries: list[Entry], part: str, radius: float, names: Sequence[str]) -> SampleList:
    """The samples with the places of a part as their truth."""
    wanted = _part_ids(base / "parts" / "parts.txt", part)
    places: dict[str, list[tuple[float, float]]] = {}
    form = "image_id part_id x y visible"
    for line in lines(base / "parts" / "part_locs.txt", form):
        if line.values[1] in wanted and whole(line, 4, "visibility", most=1):
            places.setdefault(line.values[0], []).append((real(line, 2, "x"), real(line, 3, "y")))
    keys = {line.values[0]: key for key, line in by_first(base / "images.txt", "image_id image_name").items()}
    shown = []
    for entry in entries:
        (x0, y0, x1, y1) = entry.picture.boxes[0]
        reach = radius * max(x1 - x0, y1 - y0)
        # A place is a pixel; its centre lies half a pixel further.
        squares = tuple(
            (x + 0.5 - reach, y + 0.5 - reach, x + 0.5 + reach, y + 0.5 + reach)
            for x, y in places.get(keys[entry.id], ())
        )
        shown.append(replace(entry, picture=replace(entry.picture, boxes=squares)))
    listed = sample_list(base, shown, names)
    return SampleList(
        [
            replace(sample, mask=partial(_discs, entry.picture)) if entry.picture.boxes else sample
            for sample, entry in zip(listed, shown, strict=True)
        ],
        listed.revision,
        names,
    )


def _part_ids(file: Path, part: str) -> set[str]:
    found = {line.values[0]: line.values[1] for line in lines(file, "part_id part_name")}
    ids = {key for key, name in found.items() if name == part or name.split()[-1] == part}
    if not ids:
        raise RequestError(
            f"dataset '{NAME}', part: {file} has no part '{part}'; {nearest(str(part), found.values())}"
        )
    return ids


def _discs(picture: Picture) -> torch.Tensor:
    """Bool (H, W): the discs in the squares of a picture."""
    import torch

    width, height = picture.image().size
    ys = torch.arange(height).view(-1, 1) + 0.5
    xs = torch.arange(width).view(1, -1) + 0.5
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in picture.upright_boxes().tolist():
        mask |= (xs - (x0 + x1) / 2) ** 2 + (ys - (y0 + y1) / 2) ** 2 <= ((x1 - x0) / 2) ** 2
    return mask
