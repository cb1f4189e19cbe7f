"""The information bottleneck and Opti-CAM rewritten from their papers: one image, in float64, by loops.

Gradients are finite differences of the loss, so that no derivative is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def kernel(sigma: float) -> Array:
    """The published smoothing kernel: a Gaussian on 2 round(2 sigma) + 1 cells a side, of sum one."""
    radius = round(2 * sigma)
    values = np.zeros((2 * radius + 1, 2 * radius + 1))
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            values[y + radius, x + radius] = math.exp(-(y * y + x * x) / (2 * sigma * sigma))
    return values / values.sum()


def smooth(plane: Array, sigma: float) -> Array:
    """A plane (h, w) filtered by the kernel, mirrored at its borders (the border cell is not repeated)."""
    weights = kernel(sigma)
    radius = len(weights) // 2
    padded = np.pad(plane, radius, mode="reflect")
    result = np.zeros_like(plane)
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            window = padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            result[y, x] = (window * weights).sum()
    return result


def divergence(feature: float, mean: float, std: float, share: float) -> float:
    """Schulz et al. 2020, eq. 5, for one feature: KL of Z given R from the noise alone, in nats.

    Z given R is N(share R + (1 - share) mean, (1 - share)^2 std^2), the noise N(mean, std^2).
    """
    centre, spread = share * feature + (1 - share) * mean, (1 - share) * std
    return math.log(std / spread) + (spread**2 + (centre - mean) ** 2) / (2 * std**2) - 0.5


def shares(alpha: Array, sigma: float) -> Array:
    """lambda (C, h, w): the sigmoid of alpha, every channel smoothed."""
    passed = 1 / (1 + np.exp(-alpha))
    return np.stack([smooth(plane, sigma) for plane in passed]) if sigma else passed


def nats(features: Array, mean: Array, std: Array, share: Array) -> Array:
    """The divergence of every feature (C, h, w)."""
    values = np.zeros_like(features)
    for place in np.ndindex(features.shape):
        values[place] = divergence(features[place], mean[place], std[place], share[place])
    return values


def iba_loss(
    tail: Callable[[Array], Array],
    target: int,
    features: Array,
    mean: Array,
    std: Array,
    alpha: Array,
    noise: Array,
    beta: float,
    sigma: float,
) -> float:
    """Eq. 6: cross-entropy averaged over the noisy copies plus beta times the mean information.

    Args:
        tail: features (C, h, w) to logits (classes,).
        target: the class explained.
        features, mean, std, alpha: (C, h, w).
        noise: (samples, C, h, w), standard normal.
        beta, sigma: as the explainer's.
    """
    share = shares(alpha, sigma)
    entropy = 0.0
    for one in noise:
        logits = tail(share * features + (1 - share) * (mean + std * one))
        entropy += math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
    return entropy / len(noise) + beta * float(nats(features, mean, std, share).mean())


def slopes(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """The gradient of a function by central differences."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        high, low = at.copy(), at.copy()
        high[place] += step
        low[place] -= step
        gradient[place] = (function(high) - function(low)) / (2 * step)
    return gradient


def adam(gradient: Callable[[int, Array], Array], start: Array, steps: int, rate: float) -> Array:
    """Kingma and Ba 2015, algorithm 1 with its default constants, downhill.

    Args:
        gradient: of the loss at step t (from 0), at a point.
        start: the first point.
        steps: how many steps.
        rate: the learning rate.
    """
    point, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t in range(steps):
        g = gradient(t, point)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        corrected = first / (1 - 0.9 ** (t + 1)), second / (1 - 0.999 ** (t + 1))
        point = point - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return point


def iba(
    tail: Callable[[Array], Array],
    target: int,
    features: Array,
    mean: Array,
    std: Array,
    noises: Sequence[Array],
    *,
    beta: float,
    sigma: float,
    rate: float,
    start: float,
) -> Array:
    """The map (h, w) in bits; one noise (samples, C, h, w) for each step."""

    def gradient(t: int, alpha: Array) -> Array:
        return slopes(
            lambda at: iba_loss(tail, target, features, mean, std, at, noises[t], beta, sigma), alpha
        )

    alpha = adam(gradient, np.full_like(features, start), len(noises), rate)
    bits: Array = nats(features, mean, std, shares(alpha, sigma)).sum(0) / math.log(2)
    return bits


def enlarge(plane: Array, size: tuple[int, int]) -> Array:
    """Bilinear, corners not aligned: pixel centres at (i + 0.5) h / H - 0.5, clamped to the plane."""
    result = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            at = [
                min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
                for i, n, m in zip((y, x), plane.shape, size, strict=True)
            ]
            low = [int(a) for a in at]
            high = [min(i + 1, n - 1) for i, n in zip(low, plane.shape, strict=True)]
            dy, dx = at[0] - low[0], at[1] - low[1]
            top = plane[low[0], low[1]] * (1 - dx) + plane[low[0], high[1]] * dx
            bottom = plane[high[0], low[1]] * (1 - dx) + plane[high[0], high[1]] * dx
            result[y, x] = top * (1 - dy) + bottom * dy
    return result


def combined(u: Array, features: Array) -> Array:
    """Zhang et al. 2023: features summed with the weights softmax(u)."""
    powers = np.exp(u - u.max())
    total = np.zeros(features.shape[1:])
    for k in range(len(u)):
        total += powers[k] / powers.sum() * features[k]
    return total


def opti_cam_objective(
    predict: Callable[[Array], Array], target: int, image: Array, features: Array, u: Array
) -> float:
    """Zhang et al. 2023, the objective: the target's logit on the masked image (3, H, W)."""
    mask = enlarge(combined(u, features), (image.shape[1], image.shape[2]))
    mask = (mask - mask.min()) / (mask.max() - mask.min())
    return float(predict(image * mask)[target])


def opti_cam(
    predict: Callable[[Array], Array], target: int, image: Array, features: Array, steps: int, rate: float
) -> Array:
    """The u (C,) after some steps of Adam uphill from zero, without an early stop."""
    return adam(
        lambda _, at: -slopes(lambda u: opti_cam_objective(predict, target, image, features, u), at),
        np.zeros(len(features)), steps, rate,
    )  # fmt: skip
