"""Intervals, paired tests, ranks with their uncertainty, and calibration against nulls.

Pure functions of arrays: images along the last axis, every random draw from a seeded PCG64.
Nothing here knows of rows, boards or files. Where every input is a multiple of a power of two
(the boards see to that), sums are exact and no result depends on the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, product
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy import stats as distributions

from faithmap._resample import FloatArray, bca_bounds, count_chunks, generator, resampled_sums

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """Point estimates with the bounds of their intervals, arrays of one shape."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


class Ranking(NamedTuple):
    """Ranks with their simultaneous intervals; rank 1 is the best."""

    #: (M,) by mean; equal means share the smaller rank.
    rank: IntArray
    #: (M,) 1 + the number of methods that are significantly better.
    low: IntArray
    #: (M,) M less the number of methods that are significantly worse.
    high: IntArray
    #: (M, M) `better[i, j]`: i is significantly better than j.
    better: BoolArray

    @property
    def decided(self) -> BoolArray:
        """(M, M) pairs that differ significantly, in either direction."""
        return np.asarray(self.better | self.better.T)


class Differences(NamedTuple):
    """Mean differences of pairs of methods, the first less the second, with simultaneous bounds."""

    #: (P,) positions of the two methods.
    first: IntArray
    second: IntArray
    value: FloatArray
    low: FloatArray
    high: FloatArray
    #: (P,) 1 or -1 where the pair is decided, else 0.
    sign: IntArray


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


def paired_win(drops: npt.ArrayLike) -> FloatArray:
    """Per image and method (M, n), in [0, 1]: the share of the other methods that are beaten.

    Smaller is better, a tie counts one half. NaN with fewer than two methods.
    """
    values = np.atleast_2d(np.asarray(drops, np.float64))
    if len(values) < 2:
        return np.full_like(values, np.nan)
    won = np.zeros_like(values)
    for row, own in enumerate(values):
        beaten = (own < values).sum(axis=0) + ((own == values).sum(axis=0) - 1) / 2
        won[row] = beaten / (len(values) - 1)
    return np.where(np.isnan(values).any(axis=0), np.nan, won)


def smallest_share(drops: npt.ArrayLike) -> FloatArray:
    """Per image and method (M, n): 1 where the value is the smallest, shared equally among ties."""
    values = np.atleast_2d(np.asarray(drops, np.float64))
    least = (values == values.min(axis=0)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(least / least.sum(axis=0))


def rank_intervals(
    values: npt.ArrayLike,
    higher_is_better: bool = True,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ranking:
    """Rank methods (M, n) by their means over shared images, with simultaneous rank intervals.

    All pairs form one family: the studentised differences of every pair are resampled together,
    and a pair is decided where |t| exceeds the `level` quantile of the largest |t*| (Romano and
    Wolf 2005). A pair that differs on so few images that even the most extreme of its sign flips
    would not survive Bonferroni's correction is left undecided and out of the family, as Tarone
    1990 does for discrete data: it cannot be found, and its resamples with no spread at all would
    hide every other pair. The chance of any wrong order is about 1 - level.
    """
    data = np.atleast_2d(np.asarray(values, np.float64))
    if not np.isfinite(data).all():
        raise ValueError("rank_intervals was given values that are not finite; give shared images only")
    oriented = data if higher_is_better else -data
    count, n = oriented.shape
    first, second = np.triu_indices(count, 1)
    better = np.zeros((count, count), np.bool_)
    if n and first.size:
        signs = decided_signs(oriented[first] - oriented[second], level, resamples, seed)
        better[first, second] = signs > 0
        better[second, first] = signs < 0
    total = oriented.sum(axis=-1)
    rank = 1 + (total[None, :] > total[:, None]).sum(axis=-1)
    return Ranking(rank, 1 + better.sum(axis=0), count - better.sum(axis=1), better)


def paired_differences(
    values: npt.ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Differences:
    """Mean differences of all pairs of methods (M, n) over shared images, with simultaneous intervals.

    The family, its studentised bootstrap and the pairs that are left out of it are those of
    `rank_intervals`: an interval excludes zero exactly where that function decides the pair. A pair
    left out, which too few images tell apart, has NaN bounds.
    """
    data = np.atleast_2d(np.asarray(values, np.float64))
    if not np.isfinite(data).all():
        raise ValueError("paired_differences was given values that are not finite; give shared images only")
    first, second = np.triu_indices(len(data), 1)
    n = data.shape[-1]
    if not n or not first.size:
        unknown = np.full(first.size, np.nan)
        return Differences(first, second, unknown, unknown.copy(), unknown.copy(), np.zeros_like(first))
    apart = data[first] - data[second]
    testable, critical = _simultaneous(apart, level, resamples, seed)
    total, squares = apart.sum(axis=-1), (apart**2).sum(axis=-1)
    half = np.where(testable, critical * np.sqrt(_variance(total, squares, n)), np.nan)
    sign = _signs(apart, testable, critical)
    return Differences(first, second, total / n, total / n - half, total / n + half, sign)


def decided_signs(differences: FloatArray, level: float, resamples: int, seed: int) -> IntArray:
    """Sign (P,) of each pair's mean difference (P, n) where it is significant, else 0; one family."""
    return _signs(differences, *_simultaneous(differences, level, resamples, seed))


def family_signs(families: Sequence[FloatArray], level: float, resamples: int, seed: int) -> list[IntArray]:
    """Signs of families of differences (P, n) of the same images, all of them decided as one family.

    The resamples are common to all, so that the largest |t*| of a resample is that of every family;
    testable is what would survive Bonferroni's correction for all pairs there are.
    """
    pairs = sum(len(family) for family in families)
    testable = [_testable(family, level, pairs) for family in families]
    largest = np.zeros(resamples)
    for family, kept in zip(families, testable, strict=True):
        np.maximum(largest, _largest(family[kept], resamples, seed), out=largest)
    critical = float(np.quantile(largest, level, method="higher"))
    return [_signs(family, kept, critical) for family, kept in zip(families, testable, strict=True)]


def _simultaneous(
    differences: FloatArray, level: float, resamples: int, seed: int
) -> tuple[BoolArray, float]:
    """Which pairs (P, n) belong to the family, and the |t| that its largest exceeds by chance."""
    testable = _testable(differences, level, len(differences))
    largest = _largest(differences[testable], resamples, seed)
    return testable, float(np.quantile(largest, level, method="higher"))


def _testable(differences: FloatArray, level: float, pairs: int) -> BoolArray:
    """Pairs (P,) that differ on enough images to be found at all in a family of so many."""
    differing = (differences != 0).sum(axis=-1)
    return np.asarray(np.exp2(1.0 - differing) <= (1 - level) / pairs)


def _largest(differences: FloatArray, resamples: int, seed: int) -> FloatArray:
    """The largest |t*| (resamples,) of pairs (P, n); zeros where none of them varies."""
    n = differences.shape[-1]
    moving = _variance(differences.sum(axis=-1), (differences**2).sum(axis=-1), n) > 0
    if not moving.any():
        return np.zeros(resamples)
    return np.concatenate(list(_largest_t(differences[moving], resamples, seed)))


def _signs(differences: FloatArray, testable: BoolArray, critical: float) -> IntArray:
    """The sign of each pair's mean where its |t| is critical; a shift without any spread always is."""
    total, squares = differences.sum(axis=-1), (differences**2).sum(axis=-1)
    statistic = _studentised(total, squares, differences.shape[-1], 0.0)
    return np.where(testable & (np.abs(statistic) > critical), np.sign(total), 0.0).astype(np.int64)


def _largest_t(differences: FloatArray, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield the largest |t*| of all pairs (P, n), for chunks of resamples."""
    n = differences.shape[-1]
    total = differences.sum(axis=-1, keepdims=True)
    squared = differences**2
    for counts in count_chunks(n, resamples, seed):
        resampled = _studentised(differences @ counts.T, squared @ counts.T, n, total)
        yield np.abs(resampled).max(axis=0)


def _variance(total: FloatArray, squares: FloatArray, n: int) -> FloatArray:
    """Variance of the mean from sums; exactly 0 where only rounding is left of it."""
    variance = (squares - total * total / n) / (max(n - 1, 1) * n)
    return np.where(variance > 1e-13 * squares / n, variance, 0.0)


def _studentised(total: FloatArray, squares: FloatArray, n: int, centre: FloatArray | float) -> FloatArray:
    """(mean - centre) / se from sums; infinite where a shifted mean has no spread, 0 where none."""
    error = np.sqrt(_variance(total, squares, n))
    shift = (total - centre) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(shift == 0, 0.0, shift / error)


def order_agreement(
    reference: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    tolerance: float = 0.0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Kendall's tau-b of a fixed order (M,) with that of the means (M, n), and its percentile bounds.

    The images are resampled, the same for all methods; the reference is taken as it is. Means that
    differ by no more than `tolerance` are tied. NaN where either side ties all methods, and bounds
    are NaN below two images. The bounds are values that tau can take: the outer ones of the two
    replicates next to each quantile. Source: Kendall 1945.
    """
    data = np.atleast_2d(np.asarray(values, np.float64))
    fixed = np.asarray(reference, np.float64)
    first, second = np.triu_indices(len(data), 1)
    order = np.sign(fixed[first] - fixed[second])
    n = data.shape[-1]

    def tau(sums: FloatArray) -> FloatArray:
        apart = sums[first] - sums[second]
        found = np.where(np.abs(apart) > tolerance * n, np.sign(apart), 0.0)
        scale = np.sqrt((order**2).sum() * (found**2).sum(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((order @ found) / scale)

    point = float(tau(data.sum(axis=-1)))
    if n < 2:
        return point, math.nan, math.nan
    drawn = tau(resampled_sums(data, resamples, seed))
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size or math.isnan(point):
        return point, math.nan, math.nan
    low = np.quantile(drawn, (1 - level) / 2, method="lower")
    return point, float(low), float(np.quantile(drawn, (1 + level) / 2, method="higher"))


def letter_groups(decided: npt.ArrayLike) -> list[str]:
    """Letters (M,) such that two methods share one exactly where their pair is undecided.

    `decided` (M, M) is symmetric, rows in the order of the board, so the first letters go to the
    best. Sharing a letter is not transitive. Source: Piepho 2004, insert and absorb.
    """
    matrix = np.asarray(decided, np.bool_)
    groups: list[frozenset[int]] = [frozenset(range(len(matrix)))]
    for one, other in zip(*np.nonzero(np.triu(matrix, 1)), strict=True):
        groups = _absorb(chain.from_iterable(_insert(group, int(one), int(other)) for group in groups))
    names = _letters()
    letters = [""] * len(matrix)
    for group in sorted(groups, key=sorted):
        name = next(names)
        for member in group:
            letters[member] += name
    return letters


def _insert(group: frozenset[int], one: int, other: int) -> list[frozenset[int]]:
    return [group - {one}, group - {other}] if {one, other} <= group else [group]


def _absorb(groups: Iterator[frozenset[int]]) -> list[frozenset[int]]:
    unique = list(dict.fromkeys(groups))
    return [group for group in unique if not any(group < other for other in unique)]


def _letters() -> Iterator[str]:
    """a, b, ..., z, then a1, b1, ...: a digit keeps the concatenation unambiguous."""
    yield from ascii_lowercase
    for number, letter in product(range(1, 10_000), ascii_lowercase):
        yield f"{letter}{number}"
