"""ScoreCAM++ rewritten from its paper and from its authors' code: a channel at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from slow_explainers import bilinear

Array = NDArray[np.float64]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


GATES: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid-relu": lambda x: sigmoid(max(x, 0.0)),
    "sigmoid-relu-half": lambda x: sigmoid(max(x, 0.0) / 2),
    "mish": lambda x: x * math.tanh(softplus(x)),
    "swish": lambda x: x * sigmoid(x),
    "relu": lambda x: max(x, 0.0),
    "identity": lambda x: x,
}


def mask_of(channel: Array, size: tuple[int, int], activation: str, clamp: bool, threshold: float) -> Array:
    """Upsample a channel (h, w), then gate it pixel by pixel."""
    large = bilinear(channel, *size)
    if activation == "min-max":
        spread = channel.max() - channel.min()
        mask = (large - large.min()) / (large.max() - large.min()) if spread > 0 else np.zeros(size)
    else:
        mask = np.array([[GATES[activation](float(value)) for value in row] for row in large])
    for row in mask:
        for x, value in enumerate(row):
            if (clamp and value < 0) or (threshold > 0 and value < threshold):
                row[x] = 0.0
    return mask


def scorecam_plus_plus(
    predict: Callable[[Array], Array],
    image: Array,
    features: Array,
    target: int,
    colour: Array,
    *,
    activation: str = "tanh",
    summed: str = "gated",
    baseline: str = "none",
    clamp: bool = False,
    threshold: float = 0.0,
    score: str = "probability",
    stretch: bool = False,
) -> Array:
    """The map (H, W).

    Args:
        predict: image to logits.
        image: (3, H, W) in [0, 1].
        features: (C, h, w).
        target: explained class.
        colour: what masked pixels fade to, (3,).
        activation, summed, baseline, clamp, threshold, score, stretch: as the explainer's.
    """
    size = (image.shape[1], image.shape[2])
    ground = np.ones_like(image) * colour[:, None, None]

    def read(picture: Array) -> float:
        logits = predict(picture)
        if score == "logit":
            return float(logits[target])
        return 1 / sum(math.exp(float(other - logits[target])) for other in logits)

    total = np.zeros(size)
    for channel in features:
        mask = mask_of(channel, size, activation, clamp, threshold)
        alpha = read(ground + (image - ground) * mask)
        if baseline == "zero":
            alpha -= read(ground)
        total += alpha * (mask if summed == "gated" else bilinear(channel, *size))
    total = np.maximum(total, 0)
    if not stretch or total.max() == total.min():
        return total - total.min() if stretch else total
    return (total - total.min()) / (total.max() - total.min())
