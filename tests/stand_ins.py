"""Stand-ins for datasets whose photographs may not be passed on: drawn scenes in their official files.

    python tests/stand_ins.py docs/figures

writes one of each into a temporary folder and draws it as `faithmap show` draws the original: whoever
looks at the figures sees whether boxes, masks and labels come out of the files as they went in. The
scenes are flat: the outlines of the dataset `shapes` in one colour on a ground of another.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from copies import save_grey
from faithmap.datasets.shapes import render
from official import annotation, devkit
from scipy import ndimage

SCENES = 16
#: Disc, square, triangle, star, plus, ring, crescent, hourglass: what each stands for.
IMAGENET = (
    "n04254680", "n03291819", "n09472597", "n02317335", "n03598930", "n07693725", "n07753592", "n03544143",
)  # fmt: skip
VOC = ("tvmonitor", "diningtable", "boat", "aeroplane", "sheep", "bicycle", "bird", "bottle")
BIRDS = (
    "001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani",
    "005.Crested_Auklet", "006.Least_Auklet", "007.Parakeet_Auklet", "008.Rhinoceros_Auklet",
)  # fmt: skip
#: Breed, its number in the lists, whether it is a cat.
PETS = (
    ("Abyssinian", 1, True), ("american_bulldog", 2, False), ("beagle", 5, False), ("Bengal", 6, True),
    ("Birman", 7, True), ("boxer", 9, False), ("Persian", 24, True), ("pug", 26, False),
)  # fmt: skip
FOOD = ("pizza", "ravioli", "samosa", "hot_dog", "waffles", "donuts", "gyoza", "cup_cakes")
IMAGENETTE = (
    "n03445777", "n03394916", "n03888257", "n01440764", "n03000684", "n03425413", "n03028079", "n02979186",
)  # fmt: skip
OUTLINES = ("disc", "square", "triangle", "star", "plus", "ring", "crescent", "hourglass")
GROUND = np.array([[214, 222, 228], [232, 221, 200], [205, 219, 196], [92, 104, 118]], np.uint8)
INK = np.array([
    [192, 57, 43], [41, 98, 176], [31, 122, 77], [214, 137, 16], [125, 60, 152], [20, 143, 139],
    [203, 67, 138], [90, 74, 66],
], np.uint8)  # fmt: skip
#: Width and height, in turns.
SIZES = ((500, 375), (375, 500), (500, 333), (400, 400))


@dataclass(frozen=True)
class Scene:
    """A drawn image: uint8 (H, W, 3), and for each object its class (0 to 7) and mask, bool (H, W)."""

    image: np.ndarray
    things: tuple[tuple[int, np.ndarray], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]

    def save(self, file: Path) -> None:
        """Write the image as a JPEG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(self.image).save(file, "JPEG", quality=95, subsampling=0)


@cache
def scene(index: int, objects: int, size: tuple[int, int]) -> Scene:
    """One drawn scene. Of two objects the second is of another class, or a twin where `index` is 3 mod 4."""
    side = max(size)
    rendered = render([index], split="val", size=side, objects=objects)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    window = slice(top, top + size[1]), slice(left, left + size[0])
    label, other = int(rendered.labels[0]), int(rendered.others[0])
    things = [(label, rendered.masks[0][window])]
    if objects == 2:
        things.append((label if index % 4 == 3 else other, rendered.other_masks[0][window]))
    image = np.empty((size[1], size[0], 3), np.uint8)
    image[:] = GROUND[(index // 2) % len(GROUND)]
    for kind, mask in things:
        image[mask] = INK[kind]
    return Scene(image, tuple((kind, mask) for kind, mask in things if mask.any()))


def scenes(objects: int = 1, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Scene]:
    """All scenes of a stand-in, every class twice."""
    return [scene(index, objects, sizes[index % len(sizes)]) for index in range(SCENES)]


def corners(mask: np.ndarray, first: int = 0) -> tuple[int, int, int, int]:
    """The first and last column and row of a mask as xmin, ymin, xmax, ymax, counted from `first`."""
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = (int(edge) + first for edge in (columns.min(), rows.min(), columns.max(), rows.max()))
    return x0, y0, x1, y1


def rim(mask: np.ndarray, inside: int, outside: int) -> np.ndarray:
    """The pixels along an outline: so many of the object's and so many of the ground's."""
    # To scipy no iterations are as many as change anything.
    grown = ndimage.binary_dilation(mask, iterations=outside) if outside else mask
    core = ndimage.binary_erosion(mask, iterations=inside, border_value=1) if inside else mask
    rest: np.ndarray = grown & ~core
    return rest


def imagenet(root: Path) -> None:
    """Loose images with the devkit and XML boxes, counted from 0; some with a twin, which has a box too."""
    truths = {}
    for number, drawn in enumerate(scenes(2), 1):
        name, label = f"ILSVRC2012_val_{number:08d}", drawn.things[0][0]
        truths[number] = IMAGENET[label]
        drawn.save(root / "val" / f"{name}.JPEG")
        own = [(IMAGENET[kind], corners(mask)) for kind, mask in drawn.things if kind == label]
        annotation(root / "ILSVRC2012_bbox_val_v3" / "val" / f"{name}.xml", drawn.size, own)
    devkit(root / "ILSVRC2012_devkit_t12", truths)


def tiny_imagenet(root: Path) -> None:
    """Images of 64 pixels with one box each, counted from 0. A copy may hold fewer than 200 classes."""
    table = []
    for number, drawn in enumerate(scenes(1, [(64, 64)])):
        label, mask = drawn.things[0]
        drawn.save(root / "val" / "images" / f"val_{number}.JPEG")
        words = (f"val_{number}.JPEG", IMAGENET[label], *corners(mask))
        table.append("\t".join(str(word) for word in words) + "\n")
    (root / "val" / "val_annotations.txt").write_text("".join(table), encoding="utf-8")
    (root / "wnids.txt").write_text("\n".join(IMAGENET) + "\n", encoding="utf-8")
    (root / "words.txt").write_text("\n".join(f"{wnid}\ta word" for wnid in IMAGENET), encoding="utf-8")


def voc2012(root: Path) -> None:
    """Two objects an image, boxes counted from 1, masks with five pixels of void along all outlines."""
    from faithmap.datasets.voc2012 import CLASSES

    base, names = root / "VOCdevkit" / "VOC2012", []
    for number, drawn in enumerate(scenes(2), 1):
        names.append(f"2012_{number:06d}")
        drawn.save(base / "JPEGImages" / f"{names[-1]}.jpg")
        things = [(VOC[kind], corners(mask, first=1)) for kind, mask in drawn.things]
        annotation(base / "Annotations" / f"{names[-1]}.xml", drawn.size, things)
        values = np.zeros(drawn.size[::-1], np.uint8)
        for kind, mask in drawn.things:
            values[mask] = CLASSES.index(VOC[kind]) + 1
        for _, mask in drawn.things:
            values[rim(mask, 2, 3)] = 255
        save_grey(base / "SegmentationClass" / f"{names[-1]}.png", values)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("val", "train", "trainval"):
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def cub(root: Path) -> None:
    """Boxes as x, y, width, height from 0, and votes of five annotators, who differ at the outline."""
    base = root / "CUB_200_2011"
    tables: dict[str, list[str]] = {
        "classes.txt": [f"{place} {name}" for place, name in enumerate(BIRDS, 1)],
        "images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": [], "bounding_boxes.txt": [],
    }  # fmt: skip
    for number, drawn in enumerate(scenes(), 1):
        label, mask = drawn.things[0]
        name = f"{BIRDS[label]}/{BIRDS[label][4:]}_{number:04d}_{500 + number}.jpg"
        drawn.save(base / "images" / name)
        x0, y0, x1, y1 = corners(mask)
        tables["images.txt"].append(f"{number} {name}")
        tables["image_class_labels.txt"].append(f"{number} {label + 1}")
        tables["train_test_split.txt"].append(f"{number} 0")
        tables["bounding_boxes.txt"].append(f"{number} {x0:.1f} {y0:.1f} {x1 - x0 + 1:.1f} {y1 - y0 + 1:.1f}")
        votes = np.where(mask, 5, 0)
        votes[rim(mask, 4, 0)] = 3
        votes[rim(mask, 0, 4)] = 2
        save_grey((root / "segmentations" / name).with_suffix(".png"), 51 * votes)
    for file, table in tables.items():
        (base / file).write_text("\n".join(table) + "\n", encoding="utf-8")


def pets(root: Path) -> None:
    """Trimaps: 1 inside, 3 for six pixels on either side of the outline, 2 elsewhere."""
    base, rows = root / "oxford-iiit-pet", []
    for number, drawn in enumerate(scenes(), 1):
        label, mask = drawn.things[0]
        breed, place, cat = PETS[label]
        name = f"{breed}_{number}"
        rows.append(f"{name} {place} {1 if cat else 2} {place}")
        drawn.save(base / "images" / f"{name}.jpg")
        trimap = np.where(rim(mask, 6, 6), 3, np.where(mask, 1, 2))
        save_grey(base / "annotations" / "trimaps" / f"{name}.png", trimap)
    for split, content in (("list", rows), ("test", rows), ("trainval", rows[:1])):
        file = base / "annotations" / f"{split}.txt"
        file.write_text("\n".join(content) + "\n", encoding="utf-8")


def food(root: Path) -> None:
    """A list of eight dishes, which has no boxes."""
    base, lists = root / "food-101", {dish: list[str]() for dish in FOOD}
    for number, drawn in enumerate(scenes(), 1):
        dish = FOOD[drawn.things[0][0]]
        lists[dish].append(f"{dish}/{number}")
        drawn.save(base / "images" / dish / f"{number}.jpg")
    (base / "meta").mkdir()
    for split in ("train", "test"):
        (base / "meta" / f"{split}.json").write_text(json.dumps(lists), encoding="utf-8")


def dogs_vs_cats(root: Path) -> None:
    """Kaggle's folder: disc, square, triangle and star are cats, the others dogs."""
    for number, drawn in enumerate(scenes()):
        kind = "cat" if drawn.things[0][0] < 4 else "dog"
        drawn.save(root / "train" / f"{kind}.{number}.jpg")


def imagenette(root: Path) -> None:
    """Folders of eight of the ten classes."""
    for split in ("train", "val"):
        for number, drawn in enumerate(scenes(), 1):
            wnid = IMAGENETTE[drawn.things[0][0]]
            drawn.save(root / "imagenette2-320" / split / wnid / f"{wnid}_{number}.JPEG")


def huggingface(root: Path) -> None:
    """A Parquet file of rows with images, words for labels, boxes as x, y, width, height, and masks."""
    import importlib

    columns: dict[str, list[Any]] = {name: [] for name in ("picture", "outline", "boxes", "segmentation")}
    for drawn in scenes():
        kind, mask = drawn.things[0]
        x0, y0, x1, y1 = corners(mask)
        for column, pixels in (("picture", drawn.image), ("segmentation", mask.astype(np.uint8))):
            stream = io.BytesIO()
            PIL.Image.fromarray(pixels).save(stream, "PNG")
            columns[column].append({"bytes": stream.getvalue(), "path": None})
        columns["outline"].append(OUTLINES[kind])
        columns["boxes"].append([[x0, y0, x1 - x0 + 1, y1 - y0 + 1]])
    library = importlib.import_module("datasets")
    library.disable_progress_bars()
    rows = library.Dataset.from_dict(columns)
    for column in ("picture", "segmentation"):
        rows = rows.cast_column(column, library.Image())
    rows.to_parquet(root / "test.parquet")


STAND_INS: dict[str, Callable[[Path], None]] = {
    "imagenet": imagenet,
    "tiny-imagenet": tiny_imagenet,
    "voc2012": voc2012,
    "cub-200-2011": cub,
    "oxford-iiit-pet": pets,
    "food-101": food,
    "dogs-vs-cats": dogs_vs_cats,
    "imagenette": imagenette,
    "huggingface": huggingface,
}
#: What a request says of one besides its root.
ASKED = {
    "huggingface": """path = "parquet"
data_files = { test = "test.parquet" }
image = "picture"
labels = "outline"
boxes = "boxes"
box_format = "xywh"
mask = "segmentation"
"""
}


def show(name: str, folder: Path) -> None:
    """Draw the stand-in of a dataset into `folder`, under a title that says what it is."""
    from faithmap.cli import main

    with tempfile.TemporaryDirectory() as scratch:
        STAND_INS[name](Path(scratch))
        request = Path(scratch) / "request.toml"
        label = f"stand-in for {name}"
        request.write_text(
            f'[[datasets]]\nname = "{name}"\nlabel = "{label}"\nroot = "."\n{ASKED.get(name, "")}\n'
            '[[models]]\nname = "shapes/resnet"\n',
            encoding="utf-8",
        )
        out = folder / f"{name}.png"
        if main(["show", label, "--request", str(request), "--out", str(out)]):
            raise SystemExit(f"{out} was not drawn")


if __name__ == "__main__":
    for chosen in STAND_INS:
        show(chosen, Path(sys.argv[1]))
