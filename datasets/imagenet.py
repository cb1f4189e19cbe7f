"""ImageNet (ILSVRC2012) as it is handed out: validation images with the boxes of the labelled class, or the
training images."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faithmap import dataset, on_disk
from faithmap.annotations import pixel_edges, read_annotation
from faithmap.class_map import read_rows, read_text
from faithmap.errors import DataError, RequestError
from faithmap.imagenet_classes import ImageNetClasses, imagenet_classes
from faithmap.pictures import SUFFIXES, Box, Picture, file_size
from faithmap.records import Sample, SampleList, digest

if TYPE_CHECKING:
    import torch

IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
WNID = re.compile(r"n\d{8}")
ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"
#: What torchvision makes of the devkit.
META = "meta.bin"
SPLITS = ("val", "train")
#: Where things lie below the root: unpacked one by one, by torchvision, or as Kaggle packs them.
TRAIN_PLACES = ("train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train")
IMAGE_PLACES = ("val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", ".")
BOX_PLACES = (
    "ILSVRC2012_bbox_val_v3/val", "ILSVRC2012_bbox_val_v3", "Annotations/CLS-LOC/val",
    "ILSVRC/Annotations/CLS-LOC/val", "val",
)  # fmt: skip
DEVKIT_PLACES = ("ILSVRC2012_devkit_t12/data", "data", ".")

HOW_TO_GET = (
    "get the validation images and boxes of ILSVRC2012 at image-net.org (an account is needed), unpack "
    "ILSVRC2012_img_val.tar into ROOT/val and ILSVRC2012_bbox_val_v3.tgz into ROOT/ILSVRC2012_bbox_val_v3, "
    f"put {ARCHIVE} beside them, and give root = ROOT"
)


@dataset(
    version=1,
    source="Russakovsky et al. 2015 (arXiv:1409.0575): validation set of ILSVRC2012",
    license="ImageNet's terms of access: non-commercial research and education; no redistribution",
    revision="ILSVRC2012, boxes v3",
    citation=(
        "O. Russakovsky et al. ImageNet Large Scale Visual Recognition Challenge. IJCV 115(3):211-252, 2015. "
        "doi:10.1007/s11263-015-0816-y"
    ),
    gives={"label", "box"},
)
def imagenet(
    *,
    root: str | Path | None = None,
    annotations: str | Path | None = None,
    devkit: str | Path | None = None,
    split: str = "val",
    one_box: bool = False,
) -> Iterable[Sample]:
    """The images of ImageNet (ILSVRC2012): by default those for validation, with the labelled class's boxes.

    The images lie in one folder, as `ILSVRC2012_img_val.tar` holds them, or in folders named by
    WordNet ids, as torchvision sorts them; ids are the same, `ILSVRC2012_val_00000001`. Any part of
    the 50,000 will do. Labels are the models' (0 to 999, by sorted WordNet id), not the devkit's own
    numbers. In the boxes x and y run from 0 to the image's side less 1, both ends being part of the
    box; they become pixel edges. A copy whose images were resized has its boxes scaled, since the
    XML files state the size that was annotated. The revision is a digest of ids, sizes in bytes,
    labels and boxes.

    The training images lie in folders named by WordNet ids, in `train`; they come without boxes, for
    explainers that learn. Any of the classes will do: labels are the same, whichever are there.

    Args:
        root: the folder that holds the images in `val` or `ILSVRC2012_img_val`, or a copy of
            Kaggle's; the other two are looked for in it.
        annotations: the folder of the XML files, or Kaggle's `LOC_val_solution.csv`. Without either
            there are no boxes.
        devkit: the devkit's folder or its archive, or Kaggle's `LOC_val_solution.csv`: what says the
            labels of images that do not lie in class folders.
        split: "val" or "train".
        one_box: list only images with one box of the labelled class, no more and no fewer.

    Raises:
        RequestError: no images are found, or nothing that says their labels, or what says them is
            malformed. An image, or the XML file of one, that cannot be read raises `DataError`, only
            when it is loaded.
    """
    if root is None:
        raise RequestError(f"dataset 'imagenet' was given no root; {HOW_TO_GET}")
    top = Path(root).expanduser()
    if on_disk.one_of("imagenet", "split", split, SPLITS) == "train":
        return _training(top, one_box or annotations is not None or devkit is not None)
    images = _images(top)
    wnids = {name: wnid for name, (_, wnid) in images.items() if wnid}
    if len(wnids) < len(images):
        given, source = _truths(top, Path(devkit).expanduser() if devkit is not None else None)
        missing = next((name for name in images if name not in wnids and name not in given), None)
        if missing is not None:
            raise RequestError(f"{source} says nothing of the image {missing}; is it that of ILSVRC2012?")
        wnids = {name: wnids.get(name) or given[name] for name in images}
    look_up = _boxes(top, Path(annotations).expanduser() if annotations is not None else None)
    classes = imagenet_classes()
    entries = [_entry(name, path, wnids[name], look_up, classes) for name, (path, _) in images.items()]
    if one_box:
        entries = [entry for entry in entries if len(entry.boxes) == 1]
        if not entries:
            raise RequestError(
                f"one_box: none of the {len(images)} images in {top} has one box of its class; give "
                "annotations = the folder of the XML files, or leave one_box out"
            )
    return SampleList(
        (_sample(entry, classes) for entry in entries),
        revision=digest([(e.id, file_size(e.path), e.label, e.boxes, e.annotated) for e in entries]),
        class_names=classes.names,
    )


def _training(root: Path, asked: bool) -> SampleList:
    """The training images, labelled by their folders."""
    if asked:
        raise RequestError(
            "the training images have no boxes here: leave out one_box, annotations and devkit"
        )
    classes = imagenet_classes()
    for folder in (root / place for place in TRAIN_PLACES):
        entries = [
            on_disk.Entry(file.stem, Picture(file), label, classes.names[label])
            for file, label in (classes.images_in(folder) if folder.is_dir() else ())
        ]
        if entries:
            return on_disk.sample_list(folder, entries, classes.names)
    raise RequestError(
        f"{root} holds no training images in folders of WordNet ids, such as {TRAIN_PLACES[0]}/n01440764; "
        "unpack ILSVRC2012_img_train.tar and each archive in it to a folder of its own"
    )


# --- images -------------------------------------------------------------------------------------


def _images(root: Path) -> dict[str, tuple[Path, str]]:
    """Images by id, sorted, each with the WordNet id of its folder or nothing."""
    if not root.is_dir():
        raise RequestError(f"no such folder: {root}; {HOW_TO_GET}")
    for place in IMAGE_PLACES:
        if not (root / place).is_dir():
            continue
        found: dict[str, tuple[Path, str]] = {}
        for path, wnid in _files(root / place):
            if IMAGE.fullmatch(path.stem) and path.suffix.lower() in SUFFIXES:
                if path.stem in found:
                    raise RequestError(
                        f"{path.stem} is there twice: {found[path.stem][0]} and {path}; drop one"
                    )
                found[path.stem] = path, wnid
        if found:
            return dict(sorted(found.items()))
    raise RequestError(
        f"{root} holds no images named ILSVRC2012_val_00000001.JPEG and so on, neither in {IMAGE_PLACES[0]} "
        f"nor in {IMAGE_PLACES[1]}, loose or in folders of WordNet ids; {HOW_TO_GET}. For images of other "
        "names there is the dataset imagefolder"
    )


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.iterdir():
        if WNID.fullmatch(path.name) and path.is_dir():
            yield from ((file, path.name) for file in path.iterdir())
        else:
            yield path, ""


# --- labels -------------------------------------------------------------------------------------


def _truths(root: Path, given: Path | None) -> tuple[Mapping[str, str], Path]:
    """WordNet ids by image, and the file that says them: a devkit, its archive, or Kaggle's CSV."""
    if given is not None and given.is_file():
        return (_solution_wnids(given) if given.suffix.lower() == ".csv" else _archived(given)), given
    for folder in [given] if given is not None else [root, root / "devkit"]:
        for place in DEVKIT_PLACES:
            if (folder / place / TRUTH).is_file():
                return _unpacked(folder / place), folder / place / TRUTH
        for name, read in ((META, _prepared), (ARCHIVE, _archived), (SOLUTION, _solution_wnids)):
            if (folder / name).is_file():
                return read(folder / name), folder / name
    raise RequestError(
        f"nothing in {given or root} says the labels of the images; put the devkit of ILSVRC2012 "
        f"({ARCHIVE}) or Kaggle's {SOLUTION} there, or give devkit = its path"
    )


def _unpacked(data: Path) -> dict[str, str]:
    """The ground truth of an unpacked devkit, whose numbers 1 to 1000 are in an order of its own."""
    import numpy as np
    import scipy.io

    file = data / "meta.mat"
    if not file.is_file():
        raise RequestError(f"no such file: {file}; the devkit's numbers mean nothing without it")
    try:
        synsets = np.atleast_1d(scipy.io.loadmat(file, squeeze_me=True)["synsets"])
        wnids = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0
        }
    except Exception as error:
        raise RequestError(f"{file} cannot be read as the devkit's table of synsets: {error}") from error
    truths = {}
    for line, text in enumerate(read_text(data / TRUTH, "ground truth").split(), start=1):
        number = int(text) if text.isascii() and text.isdigit() else 0
        if number not in wnids:
            raise RequestError(f"{data / TRUTH}, line {line}: '{text}' is no class that {file} knows")
        truths[_name(line)] = wnids[number]
    return truths


def _archived(archive: Path) -> dict[str, str]:
    """The ground truth of the devkit's archive, read and checked against its MD5 by torchvision."""
    from torchvision.datasets.imagenet import parse_devkit_archive

    with tempfile.TemporaryDirectory() as scratch:
        try:
            with on_disk.kept_inside():
                parse_devkit_archive(scratch, str(archive.absolute()))
        except Exception as error:
            said = str(error).replace(scratch, str(archive.parent))
            raise RequestError(
                f"{archive} is not the devkit of ILSVRC2012, or it is damaged ({said}); fetch it again"
            ) from error
        return _prepared(Path(scratch) / META)


def _prepared(file: Path) -> dict[str, str]:
    """The ground truth in the file that torchvision makes of the devkit."""
    from torchvision.datasets.imagenet import load_meta_file

    try:
        _, wnids = load_meta_file(str(file.parent), file.name)
        return {_name(number): str(wnid) for number, wnid in enumerate(wnids, start=1)}
    except Exception as error:
        raise RequestError(
            f"{file} is not what torchvision makes of the devkit: {error}; remove it"
        ) from error


def _name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def _solution_wnids(file: Path) -> dict[str, str]:
    return {name: objects[0][0] for name, objects in _solution(file).items()}


def _solution(file: Path) -> dict[str, list[tuple[str, Box]]]:
    """Kaggle's table: for each image the objects, `wnid xmin ymin xmax ymax` in a row."""
    found = {}
    for line, row in read_rows(file, "table", ("ImageId", "PredictionString")):
        words = row["PredictionString"].split()
        objects = []
        try:
            for start in range(0, len(words), 5):
                wnid, (x0, y0, x1, y1) = words[start], (float(word) for word in words[start + 1 : start + 5])
                objects.append((wnid, (x0, y0, x1, y1)))
                if not (WNID.fullmatch(wnid) and x0 <= x1 and y0 <= y1):
                    raise ValueError
        except ValueError:
            objects = []
        if not objects:
            raise RequestError(
                f"table {file}, line {line}: '{row['PredictionString']}' is no list of objects; expected "
                "'wnid xmin ymin xmax ymax' for each"
            )
        found[row["ImageId"]] = objects
    return found


# --- boxes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Boxes:
    """Objects of one image, as pixel edges."""

    things: tuple[tuple[str, Box], ...] = ()
    #: (width, height) of the image that was annotated.
    size: tuple[int, int] | None = None
    #: Why they could not be read.
    fault: str = ""


def _boxes(root: Path, given: Path | None) -> Callable[[str], Boxes]:
    """What gives the objects of an image by its id."""
    if given is not None and not given.exists():
        raise RequestError(f"no such file or folder: {given}; give annotations = the folder of the XML files")
    if given is not None and given.is_file():
        return _from_table(given)
    for folder in (given, given / "val") if given is not None else (root / place for place in BOX_PLACES):
        if folder.is_dir() and next(folder.glob("ILSVRC2012_val_*.xml"), None) is not None:
            return partial(_from_xml, folder)
    if given is not None:
        raise RequestError(
            f"{given} holds no files ILSVRC2012_val_*.xml; unpack ILSVRC2012_bbox_val_v3.tgz there"
        )
    return _from_table(root / SOLUTION) if (root / SOLUTION).is_file() else lambda _: Boxes()


def _from_xml(folder: Path, name: str) -> Boxes:
    file = folder / f"{name}.xml"
    if not file.is_file():
        return Boxes()
    try:
        read = read_annotation(file)
    except DataError as error:
        return Boxes(fault=str(error))
    return Boxes(tuple((thing.name, pixel_edges(thing.corners, 0)) for thing in read.things), read.size)


def _from_table(file: Path) -> Callable[[str], Boxes]:
    table = _solution(file)
    return lambda name: Boxes(tuple((wnid, pixel_edges(box, 0)) for wnid, box in table.get(name, ())))


# --- samples ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One image with what is known of it; boxes are those of the labelled class."""

    id: str
    path: Path
    label: int
    boxes: tuple[Box, ...]
    annotated: tuple[int, int] | None
    fault: str


def _entry(
    name: str, path: Path, wnid: str, look_up: Callable[[str], Boxes], classes: ImageNetClasses
) -> Entry:
    found = look_up(name)
    boxes = tuple(box for other, box in found.things if other == wnid)
    return Entry(name, path, classes.label(wnid, str(path)), boxes, found.size, found.fault)


def _sample(entry: Entry, classes: ImageNetClasses) -> Sample:
    return Sample(
        id=entry.id,
        image=Picture(entry.path).image,
        label=entry.label,
        boxes=partial(_upright_boxes, entry) if entry.boxes or entry.fault else None,
        name=classes.names[entry.label],
    )


def _upright_boxes(entry: Entry) -> torch.Tensor:
    """The boxes in pixels of the image as it is, which may be a resized copy of the annotated one."""
    if entry.fault:
        raise DataError(entry.fault)
    if entry.annotated is None:
        return Picture(entry.path, entry.boxes).upright_boxes()
    width, height = Picture(entry.path).stored_size()
    if entry.annotated == (height, width) and width != height:
        raise DataError(
            f"{entry.path} has {width} x {height} pixels, but its boxes are those of an image of {height} x "
            f"{width}; it was turned"
        )
    across, down = width / entry.annotated[0], height / entry.annotated[1]
    boxes = tuple((x0 * across, y0 * down, x1 * across, y1 * down) for x0, y0, x1, y1 in entry.boxes)
    return Picture(entry.path, boxes).upright_boxes()
