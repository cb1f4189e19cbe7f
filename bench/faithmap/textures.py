"""Colours, clouds and textures that the embedded images are painted with, and their random numbers."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TEXTURES = ("plain", "stripes", "checks", "dots", "clouds", "waves")


class Stream:
    """Uniform numbers of one purpose of one image.

    They are taken from the raw 64-bit words of Philox, whose sequence numpy guarantees, rather than
    from the methods of a generator, whose sequences it may change.
    """

    def __init__(self, seed: int, word: int) -> None:
        """Begin the stream of two 64-bit numbers."""
        self._bits = np.random.Philox(key=np.array([seed, word], dtype=np.uint64))

    def many(self, *shape: int) -> Floats:
        """Numbers in [0, 1) of a shape."""
        raw = np.asarray(self._bits.random_raw(math.prod(shape)), dtype=np.uint64)
        numbers: Floats = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers.reshape(shape)

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * float(self.many(1)[0])

    def grain(self, *shape: int) -> Floats:
        """Noise between -1 and 1 with a triangular density: sums of two 16-bit numbers."""
        count = math.prod(shape)
        words = np.asarray(self._bits.random_raw(-(-count // 2)), dtype="<u8").view("<u2")
        pairs: Floats = words[: 2 * count].astype(np.float64).reshape(-1, 2)
        noise: Floats = pairs.sum(axis=1) / 65535.0 - 1.0
        return noise.reshape(shape)


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres (x, y), each (size, size)."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    return x, y


def clouds(stream: Stream, size: int, cells: float, channels: int) -> Floats:
    """Smooth noise in [0, 1], (size, size, channels), with about `cells` lumps along a side."""
    knots = math.ceil(cells) + 2
    values = stream.many(knots, knots, channels)
    for axis in (0, 1):
        place = (np.arange(size) + 0.5) / size * cells + stream.one()
        left = np.floor(place).astype(np.int64)
        share = place - left
        share = share * share * (3 - 2 * share)
        share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        near, far = np.take(values, left, axis), np.take(values, left + 1, axis)
        values = near + (far - near) * share
    return values


def colour(hue: float, saturation: float, value: float) -> Floats:
    """RGB of a hue in turns, a saturation and a value."""
    ramp = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6 - 3) - 1
    colour: Floats = value * (1 - saturation + saturation * np.clip(ramp, 0, 1))
    return colour


def blend(low: float, high: float, share: float) -> float:
    """What lies between two values, by a share."""
    return low + (high - low) * share


def background(stream: Stream, size: int, difficulty: float) -> Floats:
    """Clouds that run between three colours, with finer lumps of light on top."""
    hue, spread = stream.one(), stream.one(0.08, 0.35)
    palette = [colour(hue + k * spread, stream.one(0.25, 0.75), stream.one(0.25, 0.9)) for k in range(3)]
    large = np.clip(clouds(stream, size, 2.6, 2) * 1.8 - 0.4, 0, 1)
    picture = palette[0] + (palette[1] - palette[0]) * large[..., :1]
    picture = picture + (palette[2] - picture) * large[..., 1:]
    lumps = clouds(stream, size, 7.3, 3) - 0.5 + 0.6 * (clouds(stream, size, 17.0, 3) - 0.5)
    return picture + blend(0.10, 0.30, difficulty) * lumps


def slivers(picture: Floats, stream: Stream, difficulty: float) -> None:
    """Paint thin curved slivers that belong to no class."""
    size = picture.shape[0]
    unit = size / 96
    for _ in range(3 + int(8 * difficulty + stream.one())):
        x, y, angle, hue, saturation, value, length, width, bend = stream.many(9)
        x, y, half = x * size, y * size, unit * (5 + 9 * length)
        x0, x1 = max(0, int(x - half - 2)), min(size, int(x + half + 3))
        y0, y1 = max(0, int(y - half - 2)), min(size, int(y + half + 3))
        dy, dx = np.mgrid[y0:y1, x0:x1] + 0.5
        dx, dy = dx - x, dy - y
        cos, sin = math.cos(math.pi * angle), math.sin(math.pi * angle)
        along, across = (dx * cos + dy * sin) / half, dy * cos - dx * sin
        taper = 1 - along * along
        thick = unit * (0.9 + 1.3 * width) * taper
        off = np.abs(across - unit * 8 * (bend - 0.5) * taper)
        cover = np.clip(0.5 + thick - off, 0, 1)[..., None]
        patch = picture[y0:y1, x0:x1]
        patch += cover * (colour(hue, 0.3 + 0.6 * saturation, 0.2 + 0.8 * value) - patch)


def pattern(stream: Stream, size: int) -> tuple[Floats, str]:
    """A texture in [0, 1] over the frame, (size, size, 1), and its name."""
    name = TEXTURES[int(stream.one() * len(TEXTURES))]
    angle, period, shift = stream.one(0, math.pi), stream.one(6.0, 12.0) * size / 96, stream.many(2)
    x, y = grid(size)
    a = 2 * math.pi * ((x * math.cos(angle) + y * math.sin(angle)) / period + shift[0])
    b = 2 * math.pi * ((y * math.cos(angle) - x * math.sin(angle)) / period + shift[1])
    if name == "plain":
        wave = np.zeros_like(a)
    elif name == "stripes":
        wave = np.tanh(3 * np.sin(a))
    elif name == "checks":
        wave = np.tanh(5 * np.sin(a) * np.sin(b))
    elif name == "dots":
        wave = np.tanh(3 * (np.cos(a) + np.cos(b) - 0.7))
    elif name == "waves":
        wave = np.sin(a + 1.4 * np.sin(b / 2))
    else:
        wave = 2.4 * (clouds(stream, size, 9.0, 1)[..., 0] - 0.5)
    return (0.5 + 0.5 * wave)[..., None], name
