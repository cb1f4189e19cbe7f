"""More class activation maps rewritten from their papers: one image, one channel and one cell at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hirescam(features: Array, gradients: Array, *, relu: bool = True) -> Array:
    """Draelos and Carin 2020: gradient times feature in every cell, summed over the channels."""
    channels, height, width = features.shape
    total = np.zeros((height, width))
    for k in range(channels):
        for i in range(height):
            for j in range(width):
                total[i, j] += gradients[k, i, j] * features[k, i, j]
    return np.maximum(total, 0) if relu else total


def eigencam(features: Array, *, centre: bool = False, steps: int = 5000) -> Array:
    """Muhammad and Yeasin 2020: the projection on the first right singular vector, by power iteration."""
    channels, height, width = features.shape
    cells = [[features[k, i, j] for k in range(channels)] for i in range(height) for j in range(width)]
    matrix = np.array(cells)
    if centre:
        for k in range(channels):
            matrix[:, k] -= sum(matrix[:, k]) / len(cells)
    vector = np.ones(channels) + np.arange(channels) / channels
    for _ in range(steps):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / math.sqrt(sum(vector**2))
    projection = matrix @ vector
    if max(projection, key=abs) < 0:
        projection = -projection
    return projection.reshape(height, width)


def ablationcam(
    features: Array, score: float, without: Callable[[int], float], *, magnitude: bool = False
) -> Array:
    """Desai and Ramaswamy 2020: channels weighted by the share of the score lost without each.

    Args:
        features: (C, h, w).
        score: the target's logit.
        without: the target's logit when the channel of that number is set to zero.
        magnitude: divide by the logit's size.
    """
    total = np.zeros(features.shape[1:])
    for k in range(len(features)):
        total += (score - without(k)) / (abs(score) if magnitude else score) * features[k]
    return np.maximum(total, 0)


def psi(
    share: Array, size: tuple[int, int], resize: Callable[[Array, int, int], Array], whole: bool
) -> Array:
    """Srinivas and Fleuret 2019: size, rescaled to [0, 1], upsampled, and summed over channels (C, h, w).

    Args:
        share: bias times gradient, or input times gradient.
        size: (H, W) to upsample to.
        resize: bilinear resize of (h, w).
        whole: rescale all channels by their common range, else each by its own.
    """
    magnitude = np.abs(share)
    total = np.zeros(size)
    for channel in magnitude:
        among = magnitude if whole else channel
        low, high = among.min(), among.max()
        if high > low:
            total += resize((channel - low) / (high - low), *size)
    return total


def read(plane: Array, y: float, x: float) -> float:
    """The value of (h, w) at a place in cells, between cell centres, with zeros outside."""
    height, width = plane.shape
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                value += (1 - abs(y - i)) * (1 - abs(x - j)) * plane[i, j]
    return value


def move(
    y: float, x: float, angle: float, right: float, down: float, size: tuple[int, int]
) -> tuple[float, float]:
    """Where a pixel goes: turned about the image's centre, then shifted by shares of the sides."""
    height, width = size
    v, u = y - (height - 1) / 2, x - (width - 1) / 2
    turned_u = math.cos(angle) * u - math.sin(angle) * v
    turned_v = math.sin(angle) * u + math.cos(angle) * v
    return turned_v + (height - 1) / 2 + down * height, turned_u + (width - 1) / 2 + right * width


def moved_image(image: Array, angle: float, right: float, down: float, colour: Sequence[float]) -> Array:
    """The turned and shifted copy of (3, H, W), each pixel with the nearest one to where it came from."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            # Back: the shift first, then the turn the other way.
            y, x = i - down * height, j - right * width
            y, x = move(y, x, -angle, 0.0, 0.0, (height, width))
            for c in range(3):
                within = 0 <= round(y) < height and 0 <= round(x) < width
                result[c, i, j] = image[c, round(y), round(x)] if within else colour[c]
    return result


def augmented(
    first: Array,
    copies: Sequence[Array],
    moves: Sequence[tuple[float, float, float]],
    size: tuple[int, int],
) -> Array:
    """Maps (h, w) of an image and of its copies, stretched, laid back and divided by what covers a cell.

    Args:
        first: the map of the image itself.
        copies: the maps of its copies.
        moves: angle, shift right and shift down of each copy.
        size: (H, W) of the images.
    """
    height, width = first.shape
    tall, wide = size[0] / height, size[1] / width
    total, weight = np.zeros_like(first), np.zeros_like(first)
    everything = [(first, (0.0, 0.0, 0.0)), *zip(copies, moves, strict=True)]
    for cam, (angle, right, down) in everything:
        if cam.max() == cam.min():
            continue
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        for i in range(height):
            for j in range(width):
                y, x = (i + 0.5) * tall - 0.5, (j + 0.5) * wide - 0.5
                y, x = move(y, x, angle, right, down, size)
                row, column = (y + 0.5) / tall - 0.5, (x + 0.5) / wide - 0.5
                total[i, j] += read(cam, row, column)
                weight[i, j] += read(np.ones_like(cam), row, column)
    return np.where(weight > 0, total / np.maximum(weight, 1e-6), 0.0)
