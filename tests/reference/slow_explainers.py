"""The explainers rewritten from their papers: one image, one channel and one cell at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Image (3, H, W) in [0, 1] to logits (classes,).
Predict = Callable[[Array], Array]


def _weighted(weights: list[float], features: Array) -> Array:
    channels, height, width = features.shape
    total = np.zeros((height, width))
    for k in range(channels):
        for i in range(height):
            for j in range(width):
                total[i, j] += weights[k] * features[k, i, j]
    return np.maximum(total, 0)


def gradcam(features: Array, gradients: Array) -> Array:
    """Selvaraju et al. 2017, eq. 1 (weights) and 2 (map); (C, h, w) each."""
    channels, height, width = features.shape
    weights = []
    for k in range(channels):
        total = sum(gradients[k, i, j] for i in range(height) for j in range(width))
        weights.append(total / (height * width))
    return _weighted(weights, features)


def gradcam_plus_plus(features: Array, gradients: Array) -> Array:
    """Chattopadhay et al. 2018, eq. 19 (alphas), 5 (weights); without the positive factor exp(S)."""
    channels, height, width = features.shape
    weights = []
    for k in range(channels):
        everything = sum(features[k, a, b] for a in range(height) for b in range(width))
        weight = 0.0
        for i in range(height):
            for j in range(width):
                g = gradients[k, i, j]
                if g != 0:
                    alpha = g**2 / (2 * g**2 + everything * g**3)
                    weight += alpha * max(g, 0.0)
        weights.append(weight)
    return _weighted(weights, features)


def xgradcam(features: Array, gradients: Array) -> Array:
    """Fu et al. 2020: gradients averaged with the features' shares as weights."""
    channels, height, width = features.shape
    weights = []
    for k in range(channels):
        everything = sum(features[k, a, b] for a in range(height) for b in range(width))
        weight = 0.0
        for i in range(height):
            for j in range(width):
                if features[k, i, j] != 0:
                    weight += features[k, i, j] / everything * gradients[k, i, j]
        weights.append(weight)
    return _weighted(weights, features)


def layercam(features: Array, gradients: Array) -> Array:
    """Jiang et al. 2021: every cell weighted by its own positive gradient."""
    channels, height, width = features.shape
    total = np.zeros((height, width))
    for k in range(channels):
        for i in range(height):
            for j in range(width):
                total[i, j] += max(gradients[k, i, j], 0.0) * features[k, i, j]
    return np.maximum(total, 0)


def bilinear(values: Array, height: int, width: int) -> Array:
    """Bilinear resize of (h, w), pixel centres aligned, borders continued."""
    rows, columns = values.shape
    resized = np.zeros((height, width))
    for i in range(height):
        y = min(max((i + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
        top = math.floor(y)
        bottom = min(top + 1, rows - 1)
        for j in range(width):
            x = min(max((j + 0.5) * columns / width - 0.5, 0.0), columns - 1.0)
            left = math.floor(x)
            right = min(left + 1, columns - 1)
            upper = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
            lower = values[bottom, left] * (1 - (x - left)) + values[bottom, right] * (x - left)
            resized[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return resized


def _softmax(values: Array) -> Array:
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())


def scorecam(
    predict: Predict,
    image: Array,
    features: Array,
    target: int,
    *,
    probability: bool = False,
    channel_softmax: bool = True,
    subtract_blank: bool = False,
    colour: float = 0.0,
) -> Array:
    """Wang et al. 2020, algorithm 1, and the readings of its authors' code.

    Args:
        predict: image to logits.
        image: (3, H, W) in [0, 1].
        features: (C, h, w).
        target: explained class.
        probability: the score is the softmax over the classes.
        channel_softmax: weights are the softmax of the scores over the channels.
        subtract_blank: less the score of the blank image.
        colour: what masked pixels fade to.
    """

    def score(picture: Array) -> float:
        logits = predict(picture)
        return float((_softmax(logits) if probability else logits)[target])

    blank = np.full_like(image, colour)
    scores = []
    for channel in features:
        mask = bilinear(channel, *image.shape[1:])
        spread = channel.max() - channel.min()
        mask = (mask - mask.min()) / (mask.max() - mask.min()) if spread > 0 else np.zeros_like(mask)
        scores.append(score(colour + (image - colour) * mask) - (score(blank) if subtract_blank else 0.0))
    weights = _softmax(np.array(scores)) if channel_softmax else np.array(scores)
    return _weighted(list(weights), features)


def occlusion(predict: Predict, image: Array, target: int, window: int, stride: int, fill: float) -> Array:
    """Zeiler and Fergus 2014: every window that begins within the image, the last ones cut at the border."""
    _, height, width = image.shape
    clean = predict(image)[target]
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for top in range(0, height - window + stride, stride):
        for left in range(0, width - window + stride, stride):
            covered = image.copy()
            covered[:, top : top + window, left : left + window] = fill
            total[top : top + window, left : left + window] += clean - predict(covered)[target]
            count[top : top + window, left : left + window] += 1
    return np.asarray(total / count)


def integrated_gradients(gradient: Callable[[Array], Array], image: Array, steps: int) -> Array:
    """Sundararajan et al. 2017, eq. 1 by the middle rule, from black; summed over the channels."""
    total = np.zeros_like(image)
    for step in range(steps):
        total += gradient(image * (step + 0.5) / steps)
    return np.asarray((image * total / steps).sum(0))


def sobel(image: Array) -> Array:
    """Sobel magnitude / 8 of the luminance of an image (3, H, W), borders continued."""
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    height, width = grey.shape

    def at(i: int, j: int) -> float:
        return float(grey[min(max(i, 0), height - 1), min(max(j, 0), width - 1)])

    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            across = sum(w * (at(i + d, j + 1) - at(i + d, j - 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            down = sum(w * (at(i + 1, j + d) - at(i - 1, j + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            result[i, j] = math.hypot(across, down) / 8
    return result
