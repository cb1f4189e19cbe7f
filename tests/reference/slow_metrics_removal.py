"""Insertion and deletion, ROAD and the class gap once more: one image, one step, one pixel at a time.

Written after the papers and the order in which their code works, step upon step on one image that
changes, where the package builds every step anew from the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

import slow_metrics as slow

Array = npt.NDArray[np.float64]


def causal_curve(
    classify: slow.Classify, start: Tensor, finish: Tensor, order: Sequence[int], target: int, steps: int
) -> list[float]:
    """Probabilities of the target while whole pixels of one image are overwritten from another."""
    image, width = start.clone(), start.shape[2]
    curve = [slow.probability(classify, image, target)]
    done = 0
    for step in range(1, steps + 1):
        until = len(order) * step // steps
        for pixel in order[done:until]:
            image[:, pixel // width, pixel % width] = finish[:, pixel // width, pixel % width]
        done = until
        curve.append(slow.probability(classify, image, target))
    return curve


def causal_area(curve: Sequence[float]) -> float:
    """The area as RISE's code adds it up, in percent."""
    return 100 * (sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)


def rise_kernel(side: int = 11, sigma: float = 5.0) -> Array:
    """A Gaussian, cut off at four sigma, whose tails are folded back at the border of the array."""
    reach = int(4 * sigma + 0.5)
    bell = {offset: math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)}
    total = sum(bell.values())
    axis = np.zeros(side)
    for offset, weight in bell.items():
        place = side // 2 + offset
        while not 0 <= place < side:
            place = -1 - place if place < 0 else 2 * side - 1 - place
        axis[place] += weight / total
    return np.outer(axis, axis)


def rise_blurred(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The blur of the normalised image (3, H, W), zeros around it, brought back to [0, 1]."""
    kernel, planes = rise_kernel(), []
    for channel, shift, scale in zip(image.double(), mean.tolist(), std.tolist(), strict=True):
        plane = ndimage.correlate((channel.numpy() - shift) / scale, kernel, mode="constant")
        planes.append(torch.from_numpy(plane * scale + shift))
    return torch.stack(planes).float()


def road_curves(
    classify: slow.Classify,
    image: Tensor,
    target: int,
    label: int,
    order: Sequence[int],
    percentiles: Sequence[int],
    noise: Tensor,
) -> dict[str, list[float]]:
    """ROAD's three readings of one image in one order of removal, each fill by a direct solve."""
    clean = int(classify(image[None])[0].argmax())
    curves: dict[str, list[float]] = {"": [], "@label": [], "@probability": []}
    for percentile in percentiles:
        keep = torch.ones(image.shape[1:], dtype=torch.bool)
        keep.view(-1)[list(order[: len(order) * percentile // 100])] = False
        filled = slow.noisy_linear_exact(image, keep).float()
        noisy = torch.where(keep, filled, (filled + noise).clamp(0, 1))
        decided = int(classify(noisy[None])[0].argmax())
        curves[""].append(float(decided == clean))
        curves["@label"].append(float(decided == label))
        curves["@probability"].append(slow.probability(classify, noisy, target))
    return curves


def auc_d(
    classify: slow.Classify,
    image: Tensor,
    target: int,
    values: Tensor,
    ties: Tensor,
    colour: Tensor,
    shares: Sequence[float],
) -> dict[str, float]:
    """AUC-D of one map, by reading; label accuracy is not asked."""
    curves = [
        slow.perturbation_curves(classify, image, target, 0, signed, ties, colour, shares)
        for signed in (values, -values)
    ]
    return {
        reading: 100
        * (slow.trapezoid(curves[1][reading], shares) - slow.trapezoid(curves[0][reading], shares))
        for reading in ("", "@probability")
    }
