"""Occlusion (Zeiler and Fergus 2014)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: 15 pixels wide, 8 apart on an image of 224.
WINDOW, STRIDE = 15 / 224, 8 / 224


def _pixels(share: float, size: tuple[int, int]) -> tuple[int, int]:
    """A share of the sides in whole pixels (height, width), at least one."""
    return max(1, round(share * size[0])), max(1, round(share * size[1]))


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """The clean image and one image a position of the window; the last positions may stick out."""
    size = model.input_size
    window = _pixels(params.get("window", WINDOW), size)
    stride = _pixels(params.get("stride", STRIDE), size)
    steps = [math.ceil((side - w) / s) + 1 for side, w, s in zip(size, window, stride, strict=True)]
    return 1.0 + steps[0] * steps[1]


@explainer(
    version=1, source="Zeiler and Fergus 2014 (arXiv:1311.2901), sec. 4.2", forwards=_forwards, backwards=0,
    check_params={"window": 0.25, "stride": 0.125},
)  # fmt: skip
def occlusion(
    model: Model, batch: Batch, *, window: float = WINDOW, stride: float = STRIDE, fill: float = 0.0
) -> Maps:
    """Loss of the target's logit when a square is covered, averaged over the squares on a pixel.

    Shape (B, H, W); signed; unit: logit. All three channels are covered at once.

    Published: a grey square, whose size is not stated, and the probability of the class over its
    position. Here the logit is read, a pixel holds the mean of all squares on it, and the square is
    black, 15 pixels wide and moved by 8 on an image of 224.

    Args:
        model: the model.
        batch: images with targets.
        window: side of the square as a share of the image's side, in (0, 1].
        stride: distance of neighbouring squares, likewise; not above `window`.
        fill: value in [0, 1] that covers the square; 0 is black, the paper's grey is 0.5.
    """
    import torch
    from captum.attr import Occlusion

    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size

    if not 0 < stride <= window <= 1:
        raise RequestError(
            f"occlusion: got window {window} and stride {stride}, expected 0 < stride <= window <= 1"
        )
    chunk = chunk_size(model)
    shapes, strides = _pixels(window, batch.size), _pixels(stride, batch.size)
    attribution = Occlusion(model)
    maps = []
    for images, targets in zip(batch.images.split(chunk), batch.targets.split(chunk), strict=True):
        loss = attribution.attribute(
            images, sliding_window_shapes=(3, *shapes), strides=(3, *strides), baselines=fill,
            target=targets, perturbations_per_eval=max(1, chunk // len(images)),
        )  # fmt: skip
        # captum repeats the value on each channel: the first holds it once.
        maps.append(loss[:, 0])
    return torch.cat(maps)
