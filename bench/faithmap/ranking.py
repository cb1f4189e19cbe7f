"""Methods on the same images in order: wins, pairs as one family, ranks, letters, agreement of orders.

Pure functions of arrays, as those of `stats`: methods or pairs first, images along the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, product
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from faithmap._resample import FloatArray, count_chunks, resampled_sums
from faithmap.stats import LEVEL, RESAMPLES

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


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
