"""Metrics that explain again, once more: one image, one shift and one pixel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from faithmap.batch import seed_of

#: One image (3, H, W) to its map (H, W), as metrics see it.
Explain = Callable[[Tensor], Tensor]


def shifts(seed: int, name: str, shape: torch.Size, radius: float, samples: int) -> list[Tensor]:
    """The shifts of one image, one after the other from its generator."""
    generator = torch.Generator().manual_seed(seed_of(seed, "max-sensitivity", name))
    return [(2 * torch.rand(shape, generator=generator) - 1) * radius for _ in range(samples)]


def length(values: Sequence[float]) -> float:
    """Euclidean length."""
    return math.sqrt(sum(value * value for value in values))


def sensitivity(explain: Explain, image: Tensor, moves: Sequence[Tensor]) -> list[float]:
    """Relative change of the map for each shift; the score is the largest."""
    first = explain(image).double().flatten().tolist()
    ratios = []
    for move in moves:
        other = explain((image + move).clamp(0, 1)).double().flatten().tolist()
        ratios.append(length([b - a for a, b in zip(first, other, strict=True)]) / length(first))
    return ratios


def place(name: str) -> tuple[int, int]:
    """Row and column, 0 or 1 each, that an image takes in its mosaic."""
    return divmod(seed_of(0, "place", name) % 4, 2)


def partners(
    name: str, label: int, pool: Sequence[tuple[str, int, int, float]], confidence: float
) -> list[str]:
    """The three images set beside one, from (id, label, predicted class, probability of the label)."""
    found: list[str] = []
    classes = [label]
    for other in sorted(pool, key=lambda entry: seed_of(0, "partner", name, entry[0])):
        right = other[1] == other[2] and other[3] >= confidence
        if len(found) < 3 and other[0] != name and right and other[1] not in classes:
            found.append(other[0])
            classes.append(other[1])
    return found


def halved(image: Tensor) -> Tensor:
    """An image (C, H, W) of even sides at half of them: a tent of four pixels each way, cut at the border."""
    tent = {-1: 0.125, 0: 0.375, 1: 0.375, 2: 0.125}
    channels, height, width = image.shape
    small = torch.zeros(channels, height // 2, width // 2, dtype=torch.float64)
    for y in range(height // 2):
        for x in range(width // 2):
            weights, total = 0.0, torch.zeros(channels, dtype=torch.float64)
            for dy, row in tent.items():
                for dx, column in tent.items():
                    if 0 <= 2 * y + dy < height and 0 <= 2 * x + dx < width:
                        weights += row * column
                        total += row * column * image[:, 2 * y + dy, 2 * x + dx].double()
            small[:, y, x] = total / weights
    return small.float()


def mosaic(images: Sequence[Tensor]) -> Tensor:
    """Four images (C, h, w) side by side, pixel by pixel: the upper two, then the lower two."""
    channels, height, width = images[0].shape
    canvas = torch.full((channels, 2 * height, 2 * width), torch.nan)
    for k, image in enumerate(images):
        for y in range(height):
            for x in range(width):
                canvas[:, (k // 2) * height + y, (k % 2) * width + x] = image[:, y, x]
    return canvas


def quarter_share(values: Tensor, row: int, column: int) -> float:
    """Percent of the positive relevance of a map (H, W) of even sides in one quarter; NaN for none."""
    height, width = values.shape
    inside = total = 0.0
    for y, line in enumerate(values.tolist()):
        for x, value in enumerate(line):
            total += max(0.0, value)
            if (2 * y // height, 2 * x // width) == (row, column):
                inside += max(0.0, value)
    return 100 * inside / total if total else float("nan")
