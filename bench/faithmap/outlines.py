"""The outlines of the embedded shapes: where each one's rim runs, its area, and how far it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STAR_INNER, PLUS_ARM, RING_HOLE, WAIST, GLASS_WIDTH = 0.45, 0.34, 0.55, 0.10, 0.85
#: The crescent is the unit disc less a disc of radius `BITE` around (BITE_AT, 0).
BITE, BITE_AT = 0.80, 0.50


def _star(u: Floats, v: Floats) -> Floats:
    # Fold the plane into one tenth of the star, where the outline is a single straight edge.
    fold = np.abs((np.arctan2(v, u) / (0.4 * math.pi) + 0.5) % 1.0 - 0.5) * (0.4 * math.pi)
    radius = np.hypot(u, v)
    dx, dy = 1.0 - STAR_INNER * math.cos(math.pi / 5), STAR_INNER * math.sin(math.pi / 5)
    return ((radius * np.cos(fold) - 1.0) * dy + radius * np.sin(fold) * dx) / math.hypot(dx, dy)


def _plus(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(a, b) - 1.0, np.minimum(a, b) - PLUS_ARM)


def _hourglass(u: Floats, v: Floats) -> Floats:
    slope = GLASS_WIDTH - WAIST
    return np.maximum(np.abs(v) - 1.0, (np.abs(u) - WAIST - slope * np.abs(v)) / math.hypot(1.0, slope))


def _lens() -> float:
    """Area common to the crescent's two discs."""
    b = math.acos((BITE_AT**2 + BITE**2 - 1) / (2 * BITE_AT * BITE))
    return HORN + BITE**2 * b - BITE_AT * math.sin(HORN)


def _arc(start: float, stop: float, count: int) -> Floats:
    angles = np.linspace(start, stop, count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


CORNERS = np.array([(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)])
CIRCLE = _arc(0, 2 * math.pi, 181)
#: Angle at which the crescent's two circles meet.
HORN = math.acos((BITE_AT**2 + 1 - BITE**2) / (2 * BITE_AT))


class Outline(NamedTuple):
    """A shape in coordinates of its own, about 1 from its middle to its rim."""

    #: Negative inside, zero on the rim, and changing by no more than the distance moved: its value
    #: at a pixel's centre tells whether the rim can cross that pixel at all.
    field: Callable[[Floats, Floats], Floats]
    area: float
    #: Points (K, 2) of the same convex hull: they tell how far the shape reaches when turned.
    hull: Floats


OUTLINES = (
    Outline(lambda u, v: np.hypot(u, v) - 1.0, math.pi, CIRCLE),
    Outline(lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 1.0, 4.0, CORNERS),
    Outline(
        lambda u, v: np.maximum(np.abs(v) * math.sqrt(0.75) - u * 0.5, u) - 0.5,
        0.75 * math.sqrt(3),
        _arc(math.pi / 3, 5 * math.pi / 3, 3),
    ),
    Outline(_star, 5 * STAR_INNER * math.sin(math.pi / 5), _arc(0, 1.6 * math.pi, 5)),
    Outline(
        _plus,
        8 * PLUS_ARM - 4 * PLUS_ARM**2,
        np.concatenate([CORNERS * (1.0, PLUS_ARM), CORNERS * (PLUS_ARM, 1.0)]),
    ),
    Outline(
        lambda u, v: np.maximum(np.hypot(u, v) - 1.0, RING_HOLE - np.hypot(u, v)),
        math.pi * (1 - RING_HOLE**2),
        CIRCLE,
    ),
    Outline(
        lambda u, v: np.maximum(np.hypot(u, v) - 1.0, BITE - np.hypot(u - BITE_AT, v)),
        math.pi - _lens(),
        _arc(HORN, 2 * math.pi - HORN, 181),
    ),
    Outline(_hourglass, 2 * (WAIST + GLASS_WIDTH), CORNERS * (GLASS_WIDTH, 1.0)),
)
