"""Bootstrap resamples as counts, and the BCa interval on top of them.

A resample of n images is a vector of n counts that sum to n. The mean of many series under many
resamples is then one matrix product, the leave-one-out values of a mean or a ratio have a closed
form, and an interval costs O(n) a resample where a general routine costs O(n^2) for the jackknife.
The random stream is the one that `scipy.stats.bootstrap` draws for the same generator, so both
agree to rounding; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]

#: Counts held in memory at once: 4 million doubles, 32 MB.
_CHUNK = 4_000_000


def generator(seed: int) -> np.random.Generator:
    """The one kind of random generator that the statistics use: PCG64 from an integer."""
    return np.random.Generator(np.random.PCG64(seed))


def count_chunks(n: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield counts (b, n) of bootstrap resamples, `resamples` rows in all.

    The rows do not depend on how they are cut into chunks.
    """
    rng = generator(seed)
    step = max(1, _CHUNK // max(n, 1))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, n, (size, n))
        drawn += np.arange(size)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=size * n)
        yield counts.reshape(size, n).astype(np.float64)


def resampled_sums(series: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Sums (S, resamples) of series (S, n) under the same bootstrap resamples."""
    chunks = [series @ counts.T for counts in count_chunks(series.shape[-1], resamples, seed)]
    return np.concatenate(chunks, axis=-1)


def _quantiles(ordered: FloatArray, probability: FloatArray) -> FloatArray:
    """Row-wise quantiles (S,) of sorted rows (S, B), linear between order statistics."""
    last = ordered.shape[-1] - 1
    position = np.clip(probability, 0.0, 1.0) * last
    below = np.floor(position).astype(np.intp)
    above = np.minimum(below + 1, last)
    lower = np.take_along_axis(ordered, below[:, None], axis=-1)[:, 0]
    upper = np.take_along_axis(ordered, above[:, None], axis=-1)[:, 0]
    return np.asarray(lower + (upper - lower) * (position - below))


def bca_bounds(
    resampled: FloatArray, estimate: FloatArray, influence: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    """Bias-corrected and accelerated bounds (S,), (S,) of S estimates.

    `resampled` (S, B) are the bootstrap replicates, `influence` (S, n) the jackknife's deviations
    (mean of the leave-one-out values less each of them, times any constant). Where the correction
    is undefined (all replicates on one side, constant data), the percentile interval stands in;
    replicates that are not finite are left out. Source: Efron and Tibshirani 1993, chapter 14.
    """
    low, high = np.empty_like(estimate), np.empty_like(estimate)
    finite = np.isfinite(resampled).all(axis=-1)
    for row in np.flatnonzero(~finite):
        kept = resampled[row][np.isfinite(resampled[row])]
        tails = [(1 - level) / 2, (1 + level) / 2]
        low[row], high[row] = np.quantile(kept, tails) if kept.size else (np.nan, np.nan)
    if finite.any():
        low[finite], high[finite] = _bca_finite(resampled[finite], estimate[finite], influence[finite], level)
    return low, high


def _bca_finite(
    resampled: FloatArray, estimate: FloatArray, influence: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    ordered = np.sort(resampled, axis=-1)
    point = estimate[:, None]
    share = ((ordered < point).mean(axis=-1) + (ordered <= point).mean(axis=-1)) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = special.ndtri(share)
        acceleration = (influence**3).sum(axis=-1) / (6 * (influence**2).sum(axis=-1) ** 1.5)
        bounds = []
        for tail in ((1 - level) / 2, (1 + level) / 2):
            shifted = bias + special.ndtri(tail)
            probability = special.ndtr(bias + shifted / (1 - acceleration * shifted))
            bounds.append(_quantiles(ordered, np.where(np.isfinite(probability), probability, tail)))
    return bounds[0], bounds[1]
