"""Bounded drop and increase once more, from the sentences of their definition, in exact fractions."""

from __future__ import annotations

from fractions import Fraction


def change(clean: float, kept: float, floor: float) -> Fraction:
    """(1 + t) (O - Y) / (max(O, Y) + t), without any rounding."""
    y, o, t = Fraction(clean), Fraction(kept), Fraction(floor)
    return (1 + t) * (o - y) / (max(o, y) + t)


def scores(clean: float, kept: float, floor: float) -> dict[str, float]:
    """All scores of an image, in percent."""
    y, t = Fraction(clean), Fraction(floor)
    moved = change(clean, kept, floor)
    found = {
        "bounded_drop": max(-moved, Fraction(0)),
        "bounded_increase": max(moved, Fraction(0)),
        "bounded_drop_limit": (1 + t) * y / (y + t),
        "bounded_increase_limit": 1 - y,
    }
    return {name: float(100 * value) for name, value in found.items()}
