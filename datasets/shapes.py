"""The embedded default: textured shapes on cluttered colour clouds, rendered from a seed.

Every image is a pure function of (split, seed, index) and the knobs. Each purpose (scene, object,
slivers, noise, tag) draws from a counter-based stream of its own, so turning one knob leaves the
rest of the image as it was. Lengths are in pixels of a 96 px image, scaled by `size / 96`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from faithmap import dataset
from faithmap.errors import RequestError
from faithmap.outlines import OUTLINES
from faithmap.records import Sample
from faithmap.textures import Stream, background, blend, colour, grid, pattern, slivers

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]

CLASSES = ("disc", "square", "triangle", "star", "plus", "ring", "crescent", "hourglass")
SPLITS = ("train", "val", "test")

#: Share of the frame covered by the object: one object, and each of two.
AREA = (0.045, 0.24)
AREA_OF_TWO = (0.045, 0.085)
#: Streams of random numbers of an image.
SCENE, OBJECT, SECOND, PLACES, SLIVERS, NOISE, TAG = range(7)


def _stream(split: str, seed: int, index: int, purpose: int) -> Stream:
    """The random numbers of one purpose of one image."""
    return Stream(seed, (SPLITS.index(split) << 56) | (purpose << 48) | index)


# --- painting -----------------------------------------------------------------------------------

#: 64 points of a pixel, no two in one row or column: an upright edge is resolved as finely as a slanted one.
LATTICE = np.stack([np.arange(64), np.arange(64) * 27 % 64]) / 64 + 0.5 / 64 - 0.5


@dataclass(frozen=True)
class _Thing:
    """One placed object: centre and scale in pixels, angle in radians."""

    label: int
    x: float
    y: float
    scale: float
    angle: float

    def field(self, x: Floats, y: Floats) -> Floats:
        """Signed distance bound in pixels: negative inside."""
        cos, sin = math.cos(self.angle) / self.scale, math.sin(self.angle) / self.scale
        dx, dy = x - self.x, y - self.y
        return self.scale * OUTLINES[self.label].field(dx * cos + dy * sin, dy * cos - dx * sin)

    def coverage(self, size: int) -> tuple[Floats, Floats]:
        """Share of each pixel that the object covers, to 1/64, and the field at the centres."""
        x, y = grid(size)
        middle = self.field(x, y)
        share = (middle < 0).astype(np.float64)
        edge = np.abs(middle) < 0.7072
        fine = self.field(x[edge][:, None] + LATTICE[0], y[edge][:, None] + LATTICE[1])
        share[edge] = (fine < 0).mean(axis=1)
        return share, middle


def _reach(label: int, angle: float) -> Floats:
    """How far a unit shape turned by `angle` reaches: [[x_min, y_min], [x_max, y_max]]."""
    cos, sin = math.cos(angle), math.sin(angle)
    turned = OUTLINES[label].hull @ np.array([[cos, sin], [-sin, cos]])
    return np.stack([turned.min(axis=0), turned.max(axis=0)])


def _spot(reach: Floats, size: int, draw: Floats) -> Floats:
    """A centre (x, y) from two uniform numbers, with the whole shape inside the frame.

    The density rises towards the frame's sides, which makes up for the room that shapes near a side
    leave uncovered: else the middle of the frame would be a good guess.
    """
    margin = 1.5
    low, high = margin - reach[0], size - margin - reach[1]
    for _ in range(2):
        draw = 0.5 - 0.5 * np.cos(math.pi * draw)
    spot: Floats = low + (high - low) * draw
    return spot


def _things(split: str, seed: int, index: int, size: int, objects: int) -> tuple[_Thing, ...]:
    """Choose class, angle, size and place of the labelled object, and of the other one if there are two."""
    kinds, reaches = [], []
    low, high = AREA if objects == 1 else AREA_OF_TWO
    for order in range(objects):
        stream = _stream(split, seed, index, (OBJECT, SECOND)[order])
        angle, share, turn = stream.one(0, 2 * math.pi), stream.one(), stream.one()
        label = index % 8 if order == 0 else (index + 1 + int(7 * turn)) % 8
        area = low * (high / low) ** (share**1.4) * size * size
        reach = _reach(label, angle)
        scale = min(math.sqrt(area / OUTLINES[label].area), (size - 6) / float((reach[1] - reach[0]).max()))
        kinds.append((label, scale, angle))
        reaches.append(reach * scale)
    # Of two objects, take the first places between which a gap is left, else the widest apart.
    best, widest = [], -math.inf
    for draw in _stream(split, seed, index, PLACES).many(64, 2, 2):
        spots = [_spot(reach, size, place) for reach, place in zip(reaches, draw, strict=False)]
        boxes = [spot + reach for spot, reach in zip(spots, reaches, strict=True)]
        gap = float(np.maximum(boxes[0][0] - boxes[-1][1], boxes[-1][0] - boxes[0][1]).max())
        if gap > widest:
            best, widest = spots, gap
        if widest >= 2 or objects == 1:
            break
    return tuple(
        _Thing(label, float(x), float(y), scale, angle)
        for (label, scale, angle), (x, y) in zip(kinds, best, strict=True)
    )


def _paint(picture: Floats, thing: _Thing, stream: Stream, difficulty: float) -> tuple[Masks, str]:
    """Paint an object; its colours keep a distance from what lies behind it, less so where difficult."""
    size = picture.shape[0]
    cover, middle = thing.coverage(size)
    behind = (picture * cover[..., None]).sum(axis=(0, 1)) / cover.sum()
    draws = stream.many(6, 3)
    colours = [colour(h, 0.35 + 0.6 * s, 0.3 + 0.7 * v) for h, s, v in draws]
    main = max(colours, key=lambda tone: float(((tone - behind) ** 2).sum()))
    away = main - behind
    main = behind + away * min(1.0, blend(0.80, 0.34, difficulty) / (math.sqrt(float(away @ away)) + 1e-9))
    texture, name = pattern(stream, size)
    second = main + stream.one(0.3, 0.6) * (colours[int(stream.one() * 6)] - main)
    body = main + (second - main) * texture
    # Light from the upper left and a darker rim make a body of it.
    x, y = grid(size)
    light = ((thing.x - x) + (thing.y - y)) / (2.2 * thing.scale)
    rim = np.exp(-((middle / (1.4 * size / 96)) ** 2))
    body = body * (1 + 0.14 * np.clip(light, -1, 1) - blend(0.35, 0.12, difficulty) * rim)[..., None]
    picture += cover[..., None] * (body - picture)
    return cover >= 0.5, name


def tag_colour(label: int) -> Floats:
    """RGB of the tag that stands for a class."""
    return colour(label / 8, 0.95, 1.0 if label % 2 else 0.8)


def _tag(picture: Floats, stream: Stream, label: int, taken: Masks, shortcut: float) -> Masks:
    """Plant, with probability `shortcut`, the label's tag in a corner that no object reaches into."""
    size = picture.shape[0]
    side, inset = max(4, round(size / 9)), max(1, round(size / 48))
    planted = stream.one() < shortcut
    corners = []
    for (row, column), priority in zip(
        product((inset, size - inset - side), repeat=2), stream.many(4), strict=True
    ):
        overlap = int(taken[row : row + side, column : column + side].sum())
        corners.append((overlap, float(priority), row, column))
    _, _, row, column = min(corners)
    tag = np.zeros((size, size), dtype=bool)
    if planted:
        tag[row : row + side, column : column + side] = True
        picture[tag] = 0.08
        picture[row + 1 : row + side - 1, column + 1 : column + side - 1] = tag_colour(label)
    return tag


# --- whole images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """One rendered image with everything that is known of it."""

    image: NDArray[np.uint8]
    mask: Masks
    other_mask: Masks
    tag: Masks
    things: tuple[_Thing, ...]
    #: Of each object.
    textures: tuple[str, ...]
    difficulty: float


@lru_cache(maxsize=128)
def _scene(
    split: str, seed: int, index: int, size: int, difficulty: float | None, objects: int, shortcut: float
) -> _Scene:
    stream = _stream(split, seed, index, SCENE)
    drawn = stream.one()
    hard = drawn if difficulty is None else difficulty
    picture = background(stream, size, hard)
    slivers(picture, _stream(split, seed, index, SLIVERS), hard)
    things = _things(split, seed, index, size, objects)
    masks, textures = [], []
    for order, thing in enumerate(things):
        paint = _stream(split, seed, index, (OBJECT, SECOND)[order])
        paint.many(8)  # spent on size, angle and class
        mask, texture = _paint(picture, thing, paint, hard)
        masks.append(mask)
        textures.append(texture)
    if objects == 1:
        masks.append(np.zeros_like(masks[0]))
    else:
        masks[0] &= ~masks[1]
    tag = _tag(picture, _stream(split, seed, index, TAG), things[0].label, masks[0] | masks[1], shortcut)
    noise = _stream(split, seed, index, NOISE).grain(size, size, 3)
    picture += blend(0.03, 0.17, hard) * noise
    image = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    image = np.ascontiguousarray(image.transpose(2, 0, 1))
    return _Scene(image, masks[0] & ~tag, masks[1] & ~tag, tag, things, tuple(textures), hard)


@dataclass(frozen=True)
class Rendered:
    """Images with their truth; the first axis is the image."""

    #: (N, 3, S, S) uint8.
    images: NDArray[np.uint8]
    #: (N, S, S): the labelled object covers at least half of the pixel.
    masks: Masks
    labels: NDArray[np.int64]
    #: The other object's class, -1 where there is none, and its mask.
    others: NDArray[np.int64]
    other_masks: Masks
    #: The planted tag; all false where none was planted.
    tags: Masks
    difficulties: Floats


def _check(
    split: str, n: int, seed: int, size: int, difficulty: float | None, objects: int, shortcut: float
) -> None:
    wrong = None
    if split not in SPLITS:
        wrong = f"split is {split!r}; expected one of {', '.join(SPLITS)}"
    elif not 1 <= n <= 2**31:
        wrong = f"n is {n}; expected at least one image"
    elif not 0 <= seed < 2**63:
        wrong = f"seed is {seed}; expected a whole number from 0 up"
    elif not 32 <= size <= 1024:
        wrong = f"size is {size}; expected 32 to 1024 pixels"
    elif difficulty is not None and not 0 <= difficulty <= 1:
        wrong = f"difficulty is {difficulty}; expected 0 (easy) to 1 (hard), or none at all for a mixture"
    elif objects not in (1, 2):
        wrong = f"objects is {objects}; expected 1 or 2"
    elif not 0 <= shortcut <= 1:
        wrong = f"shortcut is {shortcut}; expected a probability from 0 to 1"
    if wrong:
        raise RequestError(f"dataset 'shapes': {wrong}")


def render(
    indices: Iterable[int],
    *,
    split: str = "test",
    seed: int = 0,
    size: int = 96,
    difficulty: float | None = None,
    objects: int = 1,
    shortcut: float = 0.0,
) -> Rendered:
    """Render the images of some indices; each is the same whatever it is rendered with.

    Raises:
        RequestError: a knob is out of range.
    """
    chosen = [int(index) for index in indices]
    _check(split, 1, seed, size, difficulty, objects, shortcut)
    if not chosen or not all(0 <= index < 2**48 for index in chosen):
        raise RequestError("dataset 'shapes': give one index or more, each from 0 to 2**48 - 1")
    scenes = [_scene.__wrapped__(split, seed, i, size, difficulty, objects, shortcut) for i in chosen]
    return Rendered(
        images=np.stack([scene.image for scene in scenes]),
        masks=np.stack([scene.mask for scene in scenes]),
        labels=np.array([scene.things[0].label for scene in scenes]),
        others=np.array([scene.things[1].label if objects == 2 else -1 for scene in scenes]),
        other_masks=np.stack([scene.other_mask for scene in scenes]),
        tags=np.stack([scene.tag for scene in scenes]),
        difficulties=np.array([scene.difficulty for scene in scenes]),
    )


# --- the plugin ---------------------------------------------------------------------------------


def describe(
    sample_id: str,
    *,
    size: int = 96,
    difficulty: float | None = None,
    objects: int = 1,
    shortcut: float = 0.0,
) -> dict[str, Any]:
    """Tell what lies in the image of an id: the objects, the labelled one first, and the tag.

    The knobs are those that the dataset was asked for. `objects` holds for each its `label`, `name`,
    `centre` (x, y) and `scale` in pixels, `angle` in radians, `texture` and `mask`; `tag` is the mask of
    the planted tag, or None.

    Raises:
        RequestError: the id is not one of this dataset, or a knob is out of range.
    """
    parts = sample_id.split("-")
    if len(parts) != 3 or parts[0] not in SPLITS or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise RequestError(f"dataset 'shapes': no image has the id {sample_id!r}; ids look like test-0-00012")
    split, seed, index = parts[0], int(parts[1]), int(parts[2])
    _check(split, 1, seed, size, difficulty, objects, shortcut)
    scene = _scene(split, seed, index, size, difficulty, objects, shortcut)
    told = []
    masks = (scene.mask, scene.other_mask)
    for thing, texture, mask in zip(scene.things, scene.textures, masks, strict=False):
        place = {"centre": (thing.x, thing.y), "scale": thing.scale, "angle": thing.angle}
        told.append(
            {"label": thing.label, "name": CLASSES[thing.label], **place, "texture": texture, "mask": mask}
        )
    tag = scene.tag if scene.tag.any() else None
    return {"difficulty": scene.difficulty, "objects": told, "tag": tag}


def _image(scene: Callable[[], _Scene]) -> torch.Tensor:
    import torch

    return torch.from_numpy(scene().image).float() / 255


def _mask(scene: Callable[[], _Scene]) -> torch.Tensor:
    import torch

    return torch.from_numpy(scene().mask.copy())


def _boxes(scene: Callable[[], _Scene]) -> torch.Tensor:
    import torch

    rows, columns = np.nonzero(scene().mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.tensor([box], dtype=torch.float32)


class Shapes(list[Sample]):
    """The samples, with the names of the classes."""

    class_names = CLASSES


@dataset(
    version=1,
    source="rendered by faithmap: textured shapes with exact masks",
    license="CC0-1.0",
    revision="renderer 1",
    gives={"label", "box", "mask"},
)
def shapes(
    *,
    split: str = "test",
    n: int = 512,
    seed: int = 0,
    size: int = 96,
    difficulty: float | None = None,
    objects: int = 1,
    shortcut: float = 0.0,
) -> Iterable[Sample]:
    """Eight classes of textured shapes on cluttered clouds, rendered from a seed, with exact masks.

    Args:
        split: "train", "val" or "test"; the embedded models learnt from "train" with seed 0.
        n: images, of balanced classes.
        seed: another seed gives other images.
        size: side of the square images, in pixels.
        difficulty: 0 (strong colours, calm) to 1 (faint, cluttered, noisy); None mixes them.
        objects: 2 adds an object of another class, which is not the label; see `describe`.
        shortcut: probability that a small tag in a corner gives the class away by its colour.
    """
    _check(split, n, seed, size, difficulty, objects, shortcut)
    samples = Shapes()
    for index in range(n):
        scene = partial(_scene, split, seed, index, size, difficulty, objects, shortcut)
        samples.append(
            Sample(
                id=f"{split}-{seed}-{index:05d}",
                image=partial(_image, scene),
                label=index % len(CLASSES),
                boxes=partial(_boxes, scene),
                mask=partial(_mask, scene),
                name=CLASSES[index % len(CLASSES)],
            )
        )
    return samples
