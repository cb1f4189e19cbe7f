"""Methods that perturb images, rewritten from their papers: one sample and one pixel at a time, float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from slow_explainers import bilinear

Array = NDArray[np.float64]
#: Image (3, H, W) in [0, 1] to the explained score.
Score = Callable[[Array], float]


def hidden(image: Array, labels: NDArray[np.int64], shown: list[bool], fill: str) -> Array:
    """The image with the regions not shown in their mean colour, the image's mean colour, or black."""
    result = image.copy()
    for region, is_shown in enumerate(shown):
        if is_shown:
            continue
        where = labels == region
        for channel in range(3):
            plane = image[channel]
            colour = {"segment": plane[where].mean(), "mean": plane.mean(), "black": 0.0}[fill]
            result[channel][where] = colour
    return result


def lime(samples: list[list[bool]], values: list[float], width: float, penalty: float) -> Array:
    """Ribeiro et al. 2016, eq. 1 with a ridge penalty, solved as one stacked least-squares problem."""
    count = len(samples[0])
    rows, right = [], []
    for sample, value in zip(samples, values, strict=True):
        shown = sum(sample)
        cosine = shown / (math.sqrt(shown) * math.sqrt(count)) if shown else 0.0
        weight = math.sqrt(math.exp(-((1 - cosine) ** 2) / width**2))
        rows.append([math.sqrt(weight)] + [math.sqrt(weight) * z for z in sample])
        right.append(math.sqrt(weight) * value)
    for k in range(count):  # the penalty as further rows; none for the intercept
        rows.append([0.0] + [math.sqrt(penalty) * (j == k) for j in range(count)])
        right.append(0.0)
    return np.asarray(np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0][1:])


def shapley(value: Callable[[list[bool]], float], players: int) -> Array:
    """Shapley values by their definition: the mean gain of a player over all coalitions of the others."""
    result = np.zeros(players)
    for player in range(players):
        others = [other for other in range(players) if other != player]
        for size in range(players):
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for members in combinations(others, size):
                without = [other in members for other in range(players)]
                joined = [other in members or other == player for other in range(players)]
                result[player] += weight * (value(joined) - value(without))
    return result


def rise_mask(cells: Array, down: int, across: int, height: int, width: int) -> Array:
    """Petsiuk et al. 2018, sec. 3.2: enlarge to one cell more than the image, cut out at an offset."""
    count = len(cells)
    tall, wide = math.ceil(height / count), math.ceil(width / count)
    large = bilinear(cells, (count + 1) * tall, (count + 1) * wide)
    return np.asarray(large[down : down + height, across : across + width])


def rise(score: Score, image: Array, masks: list[Array], keep: float) -> Array:
    """Petsiuk et al. 2018, eq. 6."""
    total = np.zeros(image.shape[1:])
    for mask in masks:
        total += score(image * mask) * mask
    return np.asarray(total / (keep * len(masks)))


def rise_moments(score: Score, image: Array, count: int, keep: float) -> tuple[Array, Array]:
    """Mean and standard deviation, over all masks, of what one mask adds to the map.

    Enumerates every grid of count x count cells and every offset; small grids and images only.
    """
    _, height, width = image.shape
    tall, wide = math.ceil(height / count), math.ceil(width / count)
    mean, square = np.zeros((height, width)), np.zeros((height, width))
    for cells in product((0.0, 1.0), repeat=count * count):
        chance = keep ** sum(cells) * (1 - keep) ** (count * count - sum(cells)) / (tall * wide)
        grid = np.array(cells).reshape(count, count)
        for down, across in product(range(tall), range(wide)):
            mask = rise_mask(grid, down, across, height, width)
            added = score(image * mask) * mask / keep
            mean += chance * added
            square += chance * added**2
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def blurred(image: Array, sigma: float) -> Array:
    """Gaussian blur of planes (C, H, W), cut off at three sigma, borders mirrored."""
    return np.stack([gaussian_filter(plane, sigma, mode="mirror", truncate=3.0) for plane in image])


def enlarged(low: Array, height: int, width: int) -> Array:
    """Each cell of a mask becomes a block; then smoothed by 5 pixels of 224."""
    rows, columns = low.shape
    large = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            large[i, j] = low[int((i + 0.5) * rows / height), int((j + 0.5) * columns / width)]
    return np.asarray(blurred(large[None], 5 / 224 * min(height, width))[0])


def deletion_loss(
    probability: Score, image: Array, low: Array, area: float, variation: float, power: float
) -> float:
    """Fong and Vedaldi 2017, the objective, without shifts."""
    rows, columns = low.shape
    loss = 0.0
    for i in range(rows):
        for j in range(columns):
            loss += area * abs(1 - low[i, j])
            if i + 1 < rows:
                loss += variation * abs(low[i + 1, j] - low[i, j]) ** power
            if j + 1 < columns:
                loss += variation * abs(low[i, j + 1] - low[i, j]) ** power
    height, width = image.shape[1:]
    mask = enlarged(low, height, width)
    deleted = blurred(image, 10 / 224 * min(height, width))
    return loss + probability(mask * image + (1 - mask) * deleted)


def adam(gradient: Callable[[Array], Array], start: Array, steps: int, rate: float) -> Array:
    """Kingma and Ba 2015, algorithm 1, clipped to [0, 1] after each step."""
    place, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(place)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        place = place - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        place = np.clip(place, 0, 1)
    return place


def slopes(function: Callable[[Array], float], place: Array, step: float = 1e-5) -> Array:
    """Central differences."""
    result = np.zeros_like(place)
    for index in np.ndindex(*place.shape):
        moved = place.copy()
        moved[index] = place[index] + step
        above = function(moved)
        moved[index] = place[index] - step
        result[index] = (above - function(moved)) / (2 * step)
    return result


def rescale_two_layers(
    first: Array,
    bias: Array,
    second: Array,
    image: Array,
    reference: Array,
    activation: Callable[[Array], Array],
) -> Array:
    """Shrikumar et al. 2017, eq. 1 on `second @ activation(first @ x + bias)`, entry by entry."""
    before, start = first @ image + bias, first @ reference + bias
    after, end = activation(before), activation(start)
    result = np.zeros_like(image)
    for i in range(len(image)):
        for k in range(len(before)):
            multiplier = (after[k] - end[k]) / (before[k] - start[k]) * second[k]
            result[i] += first[k, i] * multiplier * (image[i] - reference[i])
    return result
