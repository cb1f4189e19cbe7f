"""Mean perturbation curves of a cell, for its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]

#: The scores whose rows carry the curves that are drawn.
CURVE_SCORES = ("neg_auc", "pos_auc")


@dataclass(frozen=True)
class Curves:
    """Mean curves over images, values as in the rows (agreement, 0 to 1)."""

    #: Explainer label -> score -> (P,) mean, at the shares 0, 1/P, ..., (P - 1)/P of the pixels.
    lines: Mapping[str, Mapping[str, FloatArray]] = field(default_factory=dict)
    #: Score -> (3, P): mean of the reference null with the bounds of its 95% interval.
    band: Mapping[str, FloatArray] = field(default_factory=dict)


def mean_curves(
    scored: pd.DataFrame, images: Sequence[str], labels: Sequence[str], reference: str | None
) -> Curves:
    """Average the curves of the rows, an image's draws first.

    `scored` has the columns of the rows with `line` and `null`. As for the scores, the reference
    null's curve stands in for an image whose map is empty or failed.
    """
    if "curve" not in scored.columns:
        return Curves()
    lines: dict[str, dict[str, FloatArray]] = {label: {} for label in labels}
    band: dict[str, FloatArray] = {}
    own = scored[scored["null"] == ""]
    for score in CURVE_SCORES:
        table = own[own["metric"] == score]
        null = _per_image(table[table["line"] == reference], images)
        if null.size:
            band[score] = _interval(null)
        for label in labels:
            curves = _stood_in(table[table["line"] == label], images, null)
            known = np.isfinite(curves).all(axis=-1)
            if known.any():
                lines[label][score] = curves[known].mean(axis=0)
    return Curves({label: curves for label, curves in lines.items() if curves}, band)


def _stood_in(table: pd.DataFrame, images: Sequence[str], null: FloatArray) -> FloatArray:
    curves = _per_image(table, images)
    void = table[table["status"].isin(["empty", "failed"])]["image_id"].astype(str)
    if curves.shape != null.shape or void.empty:
        return curves
    at = pd.Index(list(images)).get_indexer(pd.Index(void.unique()))
    at = at[np.isnan(curves[at]).any(axis=-1)]
    curves[at] = null[at]
    return curves


def _per_image(table: pd.DataFrame, images: Sequence[str]) -> FloatArray:
    """(N, P): each image's curve, the mean of its draws; NaN where it has none, P = 0 without any."""
    has = np.array([hasattr(curve, "__len__") and len(curve) > 1 for curve in table["curve"]], bool)
    drawn = table[has]
    if drawn.empty:
        return np.empty((len(images), 0))
    values = np.array([np.asarray(curve, np.float64) for curve in drawn["curve"]])
    at = pd.Index(list(images)).get_indexer(pd.Index(drawn["image_id"].astype(str)))
    total, count = np.zeros((len(images), values.shape[-1])), np.zeros((len(images), 1))
    np.add.at(total, at, values)
    np.add.at(count, at, 1.0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interval(curves: FloatArray) -> FloatArray:
    known = curves[np.isfinite(curves).all(axis=-1)]
    mean = known.mean(axis=0)
    spread = known.std(axis=0, ddof=1) if len(known) > 1 else np.zeros_like(mean)
    half = 1.96 * spread / np.sqrt(max(len(known), 1))
    return np.stack([mean, mean - half, mean + half])
