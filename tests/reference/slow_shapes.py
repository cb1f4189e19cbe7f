"""The outlines of the dataset `shapes` again, as corners and circles, one point at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]


def star_corners() -> list[Point]:
    """Five tips on the unit circle, five dents at 0.45."""
    turns = [k * math.pi / 5 for k in range(10)]
    return [((1.0, 0.45)[k % 2] * math.cos(a), (1.0, 0.45)[k % 2] * math.sin(a)) for k, a in enumerate(turns)]


def plus_corners() -> list[Point]:
    """A cross of two bars, 2 long and 0.68 wide."""
    w = 0.34
    return [(1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w),
            (-1, -w), (-w, -w), (-w, -1), (w, -1), (w, -w), (1, -w)]  # fmt: skip


CORNERS: dict[str, Sequence[Point]] = {
    "square": [(1, 1), (-1, 1), (-1, -1), (1, -1)],
    "triangle": [(math.cos(a), math.sin(a)) for a in (math.pi / 3, math.pi, 5 * math.pi / 3)],
    "star": star_corners(),
    "plus": plus_corners(),
    "hourglass": [(0.85, 1), (-0.85, 1), (-0.1, 0), (-0.85, -1), (0.85, -1), (0.1, 0)],
}


def within(name: str, u: float, v: float) -> bool:
    """Whether a point lies in a unit shape: circles by their radius, corners by counting crossings."""
    if name == "disc":
        return math.hypot(u, v) < 1
    if name == "ring":
        return 0.55 < math.hypot(u, v) < 1
    if name == "crescent":
        return math.hypot(u, v) < 1 and math.hypot(u - 0.5, v) > 0.8
    corners = CORNERS[name]
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y0 > v) != (y1 > v) and u < x0 + (v - y0) * (x1 - x0) / (y1 - y0):
            crossings += 1
    return crossings % 2 == 1


def coverage(name: str, centre: Point, scale: float, angle: float, size: int, fine: int) -> np.ndarray:
    """Share of each pixel that a turned and scaled shape covers, from fine x fine points a pixel."""
    cos, sin = math.cos(angle), math.sin(angle)
    shares = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            if math.hypot(column + 0.5 - centre[0], row + 0.5 - centre[1]) > 1.5 * scale + 1:
                continue
            hits = 0
            for i in range(fine):
                for j in range(fine):
                    dx = column + (j + 0.5) / fine - centre[0]
                    dy = row + (i + 0.5) / fine - centre[1]
                    hits += within(name, (dx * cos + dy * sin) / scale, (dy * cos - dx * sin) / scale)
            shares[row, column] = hits / fine**2
    return shares
