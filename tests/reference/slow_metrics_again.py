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
