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
from faithmap.records import Sample

RESAMPLING = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "nearest": PIL.Image.Resampling.NEAREST,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Geometry:
    """A resize from one size to another, then a crop; sizes are (height, width)."""

    source: tuple[int, int]
    resized: tuple[int, int]
    #: (top, left) of the crop in the resized image; negative where the image is smaller.
    offset: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """One image as a model takes it, with its truths."""

    #: (3, H, W) float32 in [0, 1].
    image: Tensor
    #: (K, 4) in pixels of `image`, clipped to it; boxes wholly outside are gone.
    boxes: Tensor | None
    #: Bool (H, W).
    mask: Tensor | None


def geometry(source: tuple[int, int], transform: Transform) -> Geometry:
    """How a transform maps an image: torchvision's rounding of the resize and of the centre crop."""
    height, width = transform.size
    if transform.mode == "squash":
        return Geometry(source, transform.size, (0, 0), transform.size)
    short = math.floor(min(height, width) / transform.crop_pct)
    if height != width:
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
        picture = _resolve(sample.image)
        boxes, mask = _resolve(sample.boxes), _resolve(sample.mask)
        size = picture_size(picture)
        plan = geometry(size, transform)
        image = _image(picture, plan, transform.interpolation)
        if not bool(torch.isfinite(image).all()):
            raise DataError("the image holds NaN or infinity")
        return Prepared(image, _boxes(boxes, plan), _mask(mask, plan))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"image '{sample.id}' cannot be read: {lines[0]}") from error


def _resolve(value: Any) -> Any:
    if isinstance(value, str | Path):
        with PIL.Image.open(value) as image:
            return image.convert("RGB")
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
    picture = picture.convert("RGB")
    if plan.resized != plan.source:
        picture = picture.resize(plan.resized[::-1], RESAMPLING[interpolation])
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return _crop(tensor, plan).contiguous()


def _crop(tensor: Tensor, plan: Geometry) -> Tensor:
    """Cut the crop out of (..., h, w), padding with zeros where the image does not reach."""
    top, left = plan.offset
    height, width = plan.size
    padding = (
        max(-left, 0),
        max(left + width - plan.resized[1], 0),
        max(-top, 0),
        max(top + height - plan.resized[0], 0),
    )
    if any(padding):
        tensor = torch.nn.functional.pad(tensor, padding)
        top, left = max(top, 0), max(left, 0)
    return tensor[..., top : top + height, left : left + width]


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


def _mask(mask: Any, plan: Geometry) -> Tensor | None:
    """Follow the resize by taking, for each new pixel's centre, the old pixel below it."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask).bool()
    if tuple(mask.shape) != plan.source:
        raise DataError(f"its mask has shape {tuple(mask.shape)}, the image {plan.source}")
    rows = ((torch.arange(plan.resized[0]) + 0.5) * plan.source[0] / plan.resized[0]).long()
    columns = ((torch.arange(plan.resized[1]) + 0.5) * plan.source[1] / plan.resized[1]).long()
    return _crop(mask[rows][:, columns], plan)
