"""SCAN's equations rewritten one image, one pixel and one entry at a time, in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mask(gradients: Array, percentile: float, method: str = "linear") -> Array:
    """Eq. 1: one where the positive part of a gradient reaches the percentile of the positive ones.

    Without any positive gradient the threshold is zero, which everything reaches.
    """
    positive = [g for g in gradients.ravel() if g > 0]
    threshold = 0.0
    if positive:
        # The last step of numpy's own interpolation rounds; between equals nothing is to be interpolated.
        low = np.percentile(positive, percentile, method="lower")
        high = np.percentile(positive, percentile, method="higher")
        threshold = float(low if low == high else np.percentile(positive, percentile, method=method))
    kept = np.zeros_like(gradients)
    for place in np.ndindex(gradients.shape):
        kept[place] = float(max(gradients[place], 0.0) >= threshold)
    return kept


def stretching_sine(x: float, a: float) -> float:
    """Eq. 4, as printed: by the sign and the modulus of x."""
    sign = (x > 0) - (x < 0)
    return (sign * math.sin(2 * math.pi * abs(x) / (8 + a * abs(x))) + 1) / 2


def kernel(pixels: int, cells: int, factor: float) -> Array:
    """Eq. 7: the weights of the Gaussian filter of one axis."""
    size = 2 * (pixels // cells) + 1
    sigma = factor * pixels / cells
    middle = size // 2
    weights = np.array([math.exp(-((i - middle) ** 2) / (2 * sigma**2)) for i in range(size)])
    return weights / weights.sum()


def blurred(image: Array, grid: tuple[int, int], factor: float) -> Array:
    """Eq. 7: an image (3, H, W) in [0, 1] filtered in two dimensions, mirrored, brought to [-1, 1]."""
    down = kernel(image.shape[1], grid[0], factor)
    across = kernel(image.shape[2], grid[1], factor)
    y_margin, x_margin = len(down) // 2, len(across) // 2
    padded = np.pad(image * 255, ((0, 0), (y_margin, y_margin), (x_margin, x_margin)), mode="reflect")
    result = np.zeros_like(image)
    for place in np.ndindex(image.shape):
        c, y, x = place
        window = padded[c, y : y + len(down), x : x + len(across)]
        result[place] = (window * np.outer(down, across)).sum() / 127.5 - 1
    return result


def losses(
    confidence: Array, reconstruction: Array, target: Array, alpha: float, flexibility: float, weight: float
) -> tuple[float, float]:
    """Eq. 5, 6, 8 and 9 for one image: the loss of confidence, and that of reconstruction.

    `weight` is what confidence multiplies an error by: alpha (9a) or 1 / alpha (9b).
    """
    height, width = confidence.shape
    squares, weighted, total = 0.0, 0.0, 0.0
    for y in range(height):
        for x in range(width):
            error = sum((target[c, y, x] - reconstruction[c, y, x]) ** 2 for c in range(3)) / 3
            squares += error
            weighted += weight * confidence[y, x] * error + (1 - confidence[y, x]) * error
            total += confidence[y, x]
    pixels = height * width
    mean, area = total / pixels, 1 / (1 + alpha)
    omega = (mean - area) ** 2 / (mean * (1 - mean))
    return (1 + omega) * (squares / pixels + flexibility) - flexibility, weighted / pixels


def masked_mean(features: Array, gradients: Array, percentile: float) -> Array:
    """The mean over channels of features (C, h, w) under their mask."""
    return (features * mask(gradients, percentile)).mean(0)
