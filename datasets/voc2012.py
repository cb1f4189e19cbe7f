"""PASCAL VOC 2012: photographs of twenty classes with boxes and masks, several objects an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faithmap import dataset
from faithmap.annotations import pixel_edges, read_annotation
from faithmap.class_map import ClassMap, names_by_label
from faithmap.errors import DataError, RequestError
from faithmap.on_disk import Home, one_of
from faithmap.pictures import Box, Picture, file_size
from faithmap.records import Sample, SampleList, digest

if TYPE_CHECKING:
    import numpy as np

#: In the alphabetical order in which the masks number them, from 1.
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
#: What masks hold along the outlines of objects.
VOID = 255
FOLDER = "VOCdevkit/VOC2012"
SPLITS = ("val", "train", "trainval")
TASKS = ("segmentation", "detection")
OBJECTS = ("each-class", "single")
HOME = Home(
    name="voc2012",
    folder=FOLDER,
    holds=("JPEGImages",),
    advice=(
        "get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012, unpack it, and give "
        "root = the folder that holds VOCdevkit"
    ),
    download="; or give download = true besides, and torchvision fetches it",
)


@dataset(
    version=2,
    source="Everingham et al. 2010 (doi:10.1007/s11263-009-0275-4): PASCAL VOC 2012, train and val",
    license="images under Flickr's terms of use; no licence is stated for the annotations",
    revision="VOCtrainval_11-May-2012",
    citation=(
        "M. Everingham, L. Van Gool, C. K. I. Williams, J. Winn, A. Zisserman. The PASCAL Visual Object "
        "Classes (VOC) Challenge. IJCV 88(2):303-338, 2010."
    ),
    gives={"label", "box", "mask"},
)
def voc2012(
    *,
    root: str | Path | None = None,
    split: str = "val",
    task: str = "segmentation",
    objects: str = "each-class",
    difficult: bool = True,
    class_map: str | Path | None = None,
    download: bool = False,
) -> Iterable[Sample]:
    """PASCAL VOC 2012: one sample for each class in each image, with the boxes and mask of that class.

    An image of two aeroplanes and two persons gives two samples, `2007_000032/aeroplane` with both
    aeroplanes and `2007_000032/person`; the map of one label is judged on its own objects. The
    stored boxes count pixels from 1, both ends included; they become pixel edges, `xmin - 1, ymin -
    1, xmax, ymax`. Masks hold the pixels of the class. The void border around objects (255) belongs to
    none and is no background either: metrics of localisation pass over it. Labels are 0 to 19 in
    alphabetical order unless a class map gives the model's. The revision is a digest of ids, sizes in
    bytes, labels and boxes.

    Args:
        root: the folder that holds `VOCdevkit/VOC2012`, or one of these two.
        split: "val", "train" or "trainval".
        task: "segmentation" takes the images that have masks (1,449 in val); "detection" takes all
            that have boxes (5,823 in val), without masks.
        objects: "each-class" for a sample of every class in an image; "single" for those images
            alone in which all objects are of one class.
        difficult: whether objects that the annotators marked as difficult count. Without them their
            boxes are left out, what only such boxes cover of a mask is void, and a class with no
            other object in an image gives no sample there.
        class_map: a JSON object `{name: class}` or a CSV with the column `label`, as for
            `imagefolder`: which of the model's classes `aeroplane` and so on stand for. Classes that
            it does not have give no samples.
        download: fetch the archive into `root` where it is not there yet, checked by its MD5.

    Raises:
        RequestError: a folder or file is missing or malformed, or a parameter has an unknown value.
            An image or mask that cannot be read raises `DataError`, only when it is loaded.
    """
    for key, value, known in (("split", split, SPLITS), ("task", task, TASKS), ("objects", objects, OBJECTS)):
        one_of(HOME.name, key, value, known)
    labels = _labels(class_map)
    images, masks = _listed(_top(root, download), split, task)
    entries = [
        entry for image in images for entry in _entries(image, masks, labels, objects == "single", difficult)
    ]
    if not entries:
        raise RequestError(f"no image of split '{split}' has such objects; look at objects and difficult")
    sizes = {entry.image: file_size(entry.image) for entry in entries}
    if all(size is None for size in sizes.values()):
        raise RequestError(f"no images are there, {entries[0].image} for one; {HOME.advice}")
    content = [(e.id, sizes[e.image], file_size(e.mask) if e.mask else 0, e.label, e.boxes) for e in entries]
    names = names_by_label({label: name for name, label in labels.items()})
    return SampleList(map(_sample, entries), revision=digest(content), class_names=names)


@dataclass(frozen=True, slots=True)
class Entry:
    """One class in one image."""

    image: Path
    #: The image's segmentation by classes; None where only boxes are asked for.
    mask: Path | None
    name: str
    label: int
    #: Of the objects that count, as pixel edges.
    boxes: tuple[Box, ...]
    #: Of difficult objects that do not.
    hidden: tuple[Box, ...]

    @property
    def id(self) -> str:
        """Image and class."""
        return f"{self.image.stem}/{self.name}"


def _labels(class_map: str | Path | None) -> Mapping[str, int]:
    """Labels of the classes: all twenty, or those that the class map has."""
    if class_map is None:
        return {name: label for label, name in enumerate(CLASSES)}
    classes = ClassMap.read(Path(class_map).expanduser())
    labels = {name: classes[name] for name in CLASSES if name in classes.classes}
    if not labels:
        raise RequestError(f"class map {class_map} has none of VOC's classes; they are {', '.join(CLASSES)}")
    return labels


# --- files --------------------------------------------------------------------------------------


def _top(root: str | Path | None, download: bool) -> Path:
    """The folder that holds `VOCdevkit/VOC2012`, fetched into it if that is asked for."""
    from torchvision.datasets import VOCDetection

    if root is not None:
        given = Path(root).expanduser().absolute()
        root = {"VOC2012": given.parent.parent, "VOCdevkit": given.parent}.get(given.name, given)
    if download:
        HOME.fetch(root, lambda base: VOCDetection(str(base), year="2012", image_set="val", download=True))
    return HOME.find(root).parents[1]


def _listed(top: Path, split: str, task: str) -> tuple[list[Path], bool]:
    """The images of a split in order, and whether masks go with them."""
    from torchvision.datasets import VOCDetection, VOCSegmentation

    loader, lists = (VOCSegmentation, "Segmentation") if task == "segmentation" else (VOCDetection, "Main")
    file = top / FOLDER / "ImageSets" / lists / f"{split}.txt"
    if not file.is_file():
        raise RequestError(f"no such file: {file}; unpack VOCtrainval_11-May-2012.tar anew")
    images = [Path(image) for image in loader(str(top), year="2012", image_set=split).images]
    return [image for image in images if image.name != ".jpg"], task == "segmentation"


def _entries(
    image: Path, masks: bool, labels: Mapping[str, int], single: bool, difficult: bool
) -> Iterator[Entry]:
    """The samples of one image, by class."""
    base = image.parents[1]
    file = base / "Annotations" / f"{image.stem}.xml"
    try:
        things = read_annotation(file).things
    except DataError as error:
        raise RequestError(f"{error}; unpack VOCtrainval_11-May-2012.tar anew") from error
    boxes: dict[str, list[Box]] = defaultdict(list)
    hidden: dict[str, list[Box]] = defaultdict(list)
    for thing in things:
        if thing.name not in CLASSES:
            raise RequestError(f"{file}: '{thing.name}' is none of VOC's classes: {', '.join(CLASSES)}")
        kept = difficult or not thing.difficult
        (boxes if kept else hidden)[thing.name].append(pixel_edges(thing.corners, 1))
    if single and len({thing.name for thing in things}) > 1:
        return
    mask = base / "SegmentationClass" / f"{image.stem}.png" if masks else None
    for name in sorted(boxes):
        if name in labels:
            yield Entry(image, mask, name, labels[name], tuple(boxes[name]), tuple(hidden[name]))


# --- samples ------------------------------------------------------------------------------------


def _sample(entry: Entry) -> Sample:
    picture = Picture(
        entry.image, entry.boxes, entry.mask, partial(_on_object, entry), partial(_undecided, entry)
    )
    return Sample(
        id=entry.id,
        image=picture.image,
        label=entry.label,
        boxes=picture.upright_boxes,
        mask=picture.upright_mask if entry.mask else None,
        name=entry.name,
        void=picture.upright_void if entry.mask else None,
    )


def _on_object(entry: Entry, values: np.ndarray) -> np.ndarray:
    """The pixels of the class, without those that only difficult objects' boxes cover."""
    counted: np.ndarray = _of_class(entry, values) & ~_hidden(entry, values)
    return counted


def _undecided(entry: Entry, values: np.ndarray) -> np.ndarray:
    """The border around objects, and the pixels of difficult objects of the class that do not count."""
    undecided: np.ndarray = (values == VOID) | (_of_class(entry, values) & _hidden(entry, values))
    return undecided


def _of_class(entry: Entry, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2:
        raise DataError(f"{entry.mask} holds colours; expected the palette image, whose values are classes")
    found: np.ndarray = values == CLASSES.index(entry.name) + 1
    return found


def _hidden(entry: Entry, values: np.ndarray) -> np.ndarray:
    """Where boxes of difficult objects lie that do not count, but none that does."""
    import numpy as np
    import torch

    from faithmap.batch import box_mask

    height, width = values.shape[:2]
    if not entry.hidden:
        return np.zeros((height, width), bool)
    hidden, kept = (
        box_mask(torch.tensor(boxes), (height, width)).numpy() for boxes in (entry.hidden, entry.boxes)
    )
    only_hidden: np.ndarray = hidden & ~kept
    return only_hidden
