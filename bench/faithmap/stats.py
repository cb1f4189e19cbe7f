"""Intervals, paired tests, and calibration against nulls; `ranking` puts methods in order.

Pure functions of arrays: images along the last axis, every random draw from a seeded PCG64.
Nothing here knows of rows, boards or files. Where every input is a multiple of a power of two
(the boards see to that), sums are exact and no result depends on the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy import stats as distributions

from faithmap._resample import FloatArray, bca_bounds, generator, resampled_sums

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """Point estimates with the bounds of their intervals, arrays of one shape."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Spearman's correlation of two arrays of as many entries; NaN where one of them does not vary."""
    left, right = (np.ravel(np.asarray(values)) for values in (one, other))
    if not (np.ptp(left) and np.ptp(right)):
        return math.nan
    return float(distributions.spearmanr(left, right).statistic)


def wilson(successes: npt.ArrayLike, n: npt.ArrayLike, level: float = LEVEL) -> tuple[FloatArray, FloatArray]:
    """Wilson's score interval of a proportion, as two arrays in [0, 1]; NaN where n is 0.

    `successes` may be fractional (a tie counted as a half). Source: Wilson 1927.
    """
    hits, count = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    z = float(distributions.norm.ppf((1 + level) / 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = hits / count
        centre = (share + z * z / (2 * count)) / (1 + z * z / count)
        spread = share * (1 - share) / count + z * z / (4 * count * count)
        half = z * np.sqrt(spread) / (1 + z * z / count)
    known = count > 0
    low = np.where(known, np.clip(centre - half, 0.0, 1.0), np.nan)
    high = np.where(known, np.clip(centre + half, 0.0, 1.0), np.nan)
    # The formula gives the ends exactly; rounding would leave 1e-17 there.
    return np.where(share == 0, 0.0, low), np.where(share == 1, 1.0, high)


def bca(values: npt.ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Means of series (S, n) with BCa bootstrap intervals, all series under the same resamples.

    Falls back to the percentile interval where BCa is undefined; a constant series gives the
    point itself, one image gives NaN bounds, a series with a NaN gives NaN throughout.
    """
    series = np.atleast_2d(np.asarray(values, np.float64))
    n = series.shape[-1]
    empty = np.full(len(series), np.nan)
    if n == 0:
        return Estimate(empty, empty.copy(), empty.copy())
    total = series.sum(axis=-1)
    mean = total / n
    known = np.isfinite(mean)
    low, high = empty.copy(), empty.copy()
    if n > 1 and known.any():
        sums = resampled_sums(series[known], resamples, seed)
        influence = series[known] - mean[known, None]
        bounds = bca_bounds(sums, total[known], influence, level)
        low[known], high[known] = bounds[0] / n, bounds[1] / n
    return Estimate(mean, low, high)


def median_interval(values: npt.ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """The median with a distribution-free interval from order statistics.

    NaN values are left out. Coverage is at least `level` for any continuous distribution where
    n allows it at all (n >= 6 at 95%); otherwise the bounds are NaN.
    """
    data = np.asarray(values, np.float64)
    data = np.sort(data[np.isfinite(data)])
    if not data.size:
        return (math.nan, math.nan, math.nan)
    median = float(np.median(data))
    cut = int(distributions.binom.ppf((1 - level) / 2, data.size, 0.5))
    # ppf gives the first k whose tail reaches the limit; order statistic k (from 1) covers.
    if cut < 1:
        return (median, math.nan, math.nan)
    return (median, float(data[cut - 1]), float(data[data.size - cut]))


def ratio_of_sums(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Sum of numerators over sum of denominators, for series (S, n), with BCa intervals.

    Numerator and denominator of one image stay together in every resample.
    """
    top = np.atleast_2d(np.asarray(numerators, np.float64))
    bottom = np.broadcast_to(np.atleast_2d(np.asarray(denominators, np.float64)), top.shape)
    n = top.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = top.sum(axis=-1) / bottom.sum(axis=-1)
        if n < 2:
            return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        resampled = resampled_sums(top, resamples, seed) / resampled_sums(bottom, resamples, seed)
        left_out = (top.sum(axis=-1, keepdims=True) - top) / (bottom.sum(axis=-1, keepdims=True) - bottom)
    influence = left_out.mean(axis=-1, keepdims=True) - left_out
    return Estimate(value, *bca_bounds(resampled, value, influence, level))


def calibration(
    scores: npt.ArrayLike,
    null_means: npt.ArrayLike,
    higher: bool = True,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Effect size of scores (S, n) against the null's mean on each image, with BCa intervals.

    mean(score - null) / sd(score - null), the sign turned so that positive is better than the
    null. Unlike a z value it does not grow with n. NaN where the difference does not vary.
    """
    oriented = np.asarray(scores, np.float64) - np.asarray(null_means, np.float64)
    difference = np.atleast_2d(oriented if higher else -oriented)
    n = difference.shape[-1]
    if n < 2:
        unknown = np.full(len(difference), np.nan)
        return Estimate(unknown, unknown.copy(), unknown.copy())
    value = _effect(difference.sum(axis=-1), (difference**2).sum(axis=-1), n)
    resampled = _effect(
        resampled_sums(difference, resamples, seed), resampled_sums(difference**2, resamples, seed), n
    )
    left_out = _effect(
        difference.sum(axis=-1, keepdims=True) - difference,
        (difference**2).sum(axis=-1, keepdims=True) - difference**2,
        n - 1,
    )
    influence = left_out.mean(axis=-1, keepdims=True) - left_out
    low, high = bca_bounds(resampled, value, influence, level)
    defined = np.isfinite(value)
    return Estimate(value, np.where(defined, low, np.nan), np.where(defined, high, np.nan))


def _effect(total: FloatArray, squares: FloatArray, n: int) -> FloatArray:
    """Mean over standard deviation (n - 1) from sums; NaN where the deviation is rounding noise."""
    if n < 2:
        return np.full_like(total, np.nan)
    mean = total / n
    variance = (squares - total * mean) / (n - 1)
    varies = variance > 1e-12 * np.maximum(squares / n, 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(varies, mean / np.sqrt(np.where(varies, variance, 1.0)), np.nan)


def sign_flip_test(differences: npt.ArrayLike, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p value of paired differences (n,) under random sign flips: (b + 1) / (B + 1).

    The studentised statistic |mean| / se orders the flips exactly as |mean| does, because flips
    leave the sum of squares alone; so sums are compared. NaN differences are left out; p is 1
    where nothing differs, NaN without any image. Source: Phipson and Smyth 2010 (the + 1).
    """
    data = np.asarray(differences, np.float64)
    data = data[np.isfinite(data)]
    if not data.size:
        return math.nan
    rng = generator(seed)
    observed = abs(float(data.sum())) - 1e-12 * float(np.abs(data).sum())
    step = max(1, 4_000_000 // data.size)
    reached = 0
    for start in range(0, resamples, step):
        flips = rng.integers(0, 2, (min(step, resamples - start), data.size)) * 2.0 - 1.0
        reached += int((np.abs(flips @ data) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: any at most a is significant with a chance of a for any error.

    NaN, a test that was not made, stays NaN and counts for nothing.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    made = sorted((p, place) for place, p in enumerate(values) if math.isfinite(p))
    adjusted, reached = [math.nan] * len(values), 0.0
    for before, (p, place) in enumerate(made):
        reached = max(reached, min(1.0, (len(made) - before) * p))
        adjusted[place] = reached
    return adjusted


def detectable_difference(
    differences: npt.ArrayLike, n: int | None = None, *, power: float = 0.8, level: float = LEVEL
) -> float:
    """The smallest mean paired difference that a two-sided t test of n images finds with `power`.

    `differences` are paired differences (n,), or one standard deviation together with `n`; the
    answer has their unit. It holds for one pair at the given level, without a correction for the
    number of pairs. NaN below two images.
    """
    data = np.asarray(differences, np.float64)
    if data.ndim:
        data = data[np.isfinite(data)]
        n = data.size
        spread = float(data.std(ddof=1)) if n > 1 else math.nan
    else:
        spread = float(data)
    if n is None or n < 2 or not math.isfinite(spread):
        return math.nan
    freedom = n - 1
    critical = float(distributions.t.ppf((1 + level) / 2, freedom))

    def shortfall(shift: float) -> float:
        return float(distributions.nct.sf(critical, freedom, shift)) - power

    reach = critical + abs(float(distributions.t.ppf(power, freedom)))
    while shortfall(reach) < 0:
        reach *= 1.5
    shift = float(optimize.brentq(shortfall, 0.0, reach, xtol=1e-9))
    return shift * spread / math.sqrt(n)
