"""From a stored image to a model's input, with boxes and masks following every resize and crop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from faithmap.errors import DataError
from faithmap.models import Transform
from faithmap.pictures import Picture, to_rgb
from faithmap.records import Sample

RESAMPLING = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "nearest": PIL.Image.Resampling.NEAREST,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}

#: An image whose resize has so many times the pixels of its crop is resized within the crop alone.
LONG = 16


@dataclass(frozen=True)
class Geometry:
    """A resize from one size to another, then a crop; sizes are (height, width)."""

    source: tuple[int, int]
    resized: tuple[int, int]
    #: (top, left) of the crop in the resized image; negative where the image is smaller.
    offset: tuple[int, int]
    size: tuple[int, int]

    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the resized image that the crop shows."""
        rows, columns = (
            slice(max(start, 0), min(start + length, whole))
            for start, length, whole in zip(self.offset, self.size, self.resized, strict=True)
        )
        return rows, columns

    def padding(self) -> tuple[int, int, int, int]:
        """Pixels of the crop beyond the resized image: left, right, top, bottom."""
        (top, left), (height, width) = self.offset, self.size
        return (
            max(-left, 0),
            max(left + width - self.resized[1], 0),
            max(-top, 0),
            max(top + height - self.resized[0], 0),
        )


@dataclass(frozen=True)
class Prepared:
    """One image as a model takes it, with its truths."""

    #: (3, H, W) float32 in [0, 1].
    image: Tensor
    #: (K, 4) in pixels of `image`, clipped to it; boxes wholly outside are gone.
    boxes: Tensor | None
    #: Bool (H, W).
    mask: Tensor | None
    #: Bool (H, W): where the mask is undecided; None where it is nowhere.
    void: Tensor | None = None


def geometry(source: tuple[int, int], transform: Transform) -> Geometry:
    """How a transform maps an image: torchvision's rounding of the resize and of the centre crop."""
    height, width = transform.size
    short = math.floor(min(height, width) / transform.crop_pct)
    if transform.mode == "squash":
        resized = (math.floor(height / transform.crop_pct), math.floor(width / transform.crop_pct))
    elif height != width:
        # A crop that is no square: as small as covers both sides by their crop share, as timm does.
        sides = (math.floor(height / transform.crop_pct), math.floor(width / transform.crop_pct))
        ratio = min(side / target for side, target in zip(source, sides, strict=True))
        resized = (round(source[0] / ratio), round(source[1] / ratio))
    elif source[0] <= source[1]:
        resized = (short, int(short * source[1] / source[0]))
    else:
        resized = (int(short * source[0] / source[1]), short)
    offset = (round((resized[0] - height) / 2.0), round((resized[1] - width) / 2.0))
    return Geometry(source, resized, offset, transform.size)


def prepare(sample: Sample, transform: Transform) -> Prepared:
    """Load an image and bring it, its boxes and its mask to a model's input.

    Raises:
        DataError: the image cannot be read, or its boxes or mask do not belong to it; the
            sample is named.
    """
    try:
        picture = _picture(sample.image)
        boxes, mask, void = _resolve(sample.boxes), _resolve(sample.mask), _resolve(sample.void)
        if void is not None and mask is None:
            raise DataError("it has void pixels, but no mask that they could be void in")
        size = picture_size(picture)
        plan = geometry(size, transform)
        image = _image(picture, plan, transform.interpolation)
        if not bool(torch.isfinite(image).all()):
            raise DataError("the image holds NaN or infinity")
        return Prepared(image, _boxes(boxes, plan), _mask(mask, plan), _mask(void, plan, "void"))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"image '{sample.id}' cannot be read: {lines[0]}") from error


def _picture(value: Any) -> PIL.Image.Image | Tensor:
    """A file as a viewer shows it, upright; an image in memory as it is, in RGB."""
    value = _resolve(value)
    if isinstance(value, str | Path):
        return Picture(Path(value)).image()
    return to_rgb(value) if isinstance(value, PIL.Image.Image) else value


def _resolve(value: Any) -> Any:
    return value() if callable(value) else value


def picture_size(picture: PIL.Image.Image | Tensor) -> tuple[int, int]:
    """(height, width) of an image."""
    if isinstance(picture, PIL.Image.Image):
        return picture.height, picture.width
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] != 3:
        raise DataError("expected a PIL image or a float tensor (3, H, W) in [0, 1]")
    return int(picture.shape[1]), int(picture.shape[2])


def _image(picture: PIL.Image.Image | Tensor, plan: Geometry, interpolation: str) -> Tensor:
    if isinstance(picture, Tensor):
        if plan.source == plan.resized == plan.size:
            return picture.float().clamp(0, 1)
        array = (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        picture = PIL.Image.fromarray(array)
    rows, columns = plan.window()
    if math.prod(plan.resized) > LONG * math.prod(plan.size):
        picture = _resized_within(picture, plan, interpolation)
    else:
        if plan.resized != plan.source:
            picture = picture.resize(plan.resized[::-1], RESAMPLING[interpolation])
        picture = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return torch.nn.functional.pad(tensor, plan.padding()).contiguous()


def _resized_within(picture: PIL.Image.Image, plan: Geometry, interpolation: str) -> PIL.Image.Image:
    """What the crop shows of a resize that is too large to be made: of images a few pixels wide, or tall."""
    rows, columns = plan.window()
    down, across = (old / new for old, new in zip(plan.source, plan.resized, strict=True))
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return picture.resize(size, RESAMPLING[interpolation], box=box)


def _boxes(boxes: Any, plan: Geometry) -> Tensor | None:
    if boxes is None:
        return None
    moved = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4).clone()
    scale = (plan.resized[1] / plan.source[1], plan.resized[0] / plan.source[0])
    for axis in (0, 1):
        moved[:, axis::2] = (moved[:, axis::2] * scale[axis] - plan.offset[1 - axis]).clamp(
            0, plan.size[1 - axis]
        )
    kept = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    return moved[kept].float()


def _mask(mask: Any, plan: Geometry, word: str = "mask") -> Tensor | None:
    """Follow the resize by taking, for each new pixel's centre, the old pixel below it."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask).bool()
    if tuple(mask.shape) != plan.source:
        raise DataError(f"its {word} has shape {tuple(mask.shape)}, the image {plan.source}")
    below = [
        ((torch.arange(seen.start, seen.stop) + 0.5) * old / new).long()
        for seen, old, new in zip(plan.window(), plan.source, plan.resized, strict=True)
    ]
    return torch.nn.functional.pad(mask[below[0]][:, below[1]], plan.padding())
