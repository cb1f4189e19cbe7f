"""Orders of methods compared one pair and one resample at a time, to hold the fast ones against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slow_stats import resampled_indices, t_statistic


def sign(value: float, tolerance: float = 0.0) -> int:
    """-1, 0 or 1; 0 within the tolerance."""
    return 0 if abs(value) <= tolerance else 1 if value > 0 else -1


def tau_b(one: Sequence[float], other: Sequence[float], tolerance: float = 0.0) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in the reverse, over untied pairs of each side."""
    total, untied, untied_other = 0, 0, 0
    for i in range(len(one)):
        for j in range(i + 1, len(one)):
            a, b = sign(one[i] - one[j]), sign(other[i] - other[j], tolerance)
            total += a * b
            untied += abs(a)
            untied_other += abs(b)
    return total / math.sqrt(untied * untied_other) if untied and untied_other else math.nan


def tau_bounds(
    reference: Sequence[float], values: np.ndarray, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The outer ones of the ordered replicates of tau next to the two quantiles."""
    replicates = [
        tau_b(reference, values[:, index].mean(axis=1).tolist())
        for index in resampled_indices(values.shape[1], resamples, seed)
    ]
    ordered = sorted(value for value in replicates if not math.isnan(value))
    low = math.floor((1 - level) / 2 * (len(ordered) - 1))
    high = math.ceil((1 + level) / 2 * (len(ordered) - 1))
    return ordered[low], ordered[high]


def simultaneous_bounds(
    values: np.ndarray, level: float, resamples: int, seed: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """Mean difference of every pair, less and plus the largest |t*| times its standard error."""
    count, n = values.shape
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    apart = {(i, j): values[i] - values[j] for i, j in pairs}
    largest = [
        max(abs(t_statistic(apart[pair][index], apart[pair].mean())) for pair in pairs)
        for index in resampled_indices(n, resamples, seed)
    ]
    critical = float(np.quantile(largest, level, method="higher"))
    bounds = {}
    for pair in pairs:
        half = critical * apart[pair].std(ddof=1) / math.sqrt(n)
        bounds[pair] = (apart[pair].mean() - half, apart[pair].mean() + half)
    return bounds


def verdicts(printed: Sequence[float], decided: np.ndarray) -> dict[str, int]:
    """Counts of pairs; `decided[i, j]` is 1 where i has the larger mean for certain, -1 the smaller."""
    counts = {"agree": 0, "disagree": 0, "undecided": 0}
    for i in range(len(printed)):
        for j in range(i + 1, len(printed)):
            product = sign(printed[i] - printed[j]) * int(decided[i, j])
            counts[{1: "agree", -1: "disagree", 0: "undecided"}[product]] += 1
    return counts
