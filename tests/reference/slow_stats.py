"""The statistics again, one image and one resample at a time, to hold the fast ones against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson(successes: float, n: int, level: float) -> tuple[float, float]:
    """Solve |p - share| = z sqrt(p (1 - p) / n) for p: the definition of Wilson's interval."""
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def resampled_indices(n: int, resamples: int, seed: int) -> np.ndarray:
    """The resamples that scipy.stats.bootstrap draws with this generator."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, n, (resamples, n))


def bca_interval(values: Sequence[float], level: float, resamples: int, seed: int) -> tuple[float, float]:
    """BCa as scipy computes it, jackknife and all."""
    result = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="BCa",
        rng=np.random.Generator(np.random.PCG64(seed)),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def t_statistic(differences: np.ndarray, centre: float) -> float:
    """Student's t of a mean against a centre."""
    if differences.mean() == centre:
        return 0.0
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return math.inf if error == 0 else (differences.mean() - centre) / error


def better_pairs(values: np.ndarray, level: float, resamples: int, seed: int) -> np.ndarray:
    """`better[i, j]` by the simultaneous max-|t| bootstrap, with plain loops."""
    count, n = values.shape
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    differences = {(i, j): values[i] - values[j] for i, j in pairs}
    limit = (1 - level) / len(pairs)
    family = [p for p in pairs if 2.0 ** (1 - np.count_nonzero(differences[p])) <= limit]
    largest = []
    for index in resampled_indices(n, resamples, seed):
        largest.append(
            max(
                (abs(t_statistic(differences[p][index], differences[p].mean())) for p in family),
                default=0.0,
            )
        )
    critical = np.quantile(largest, level, method="higher")
    better = np.zeros((count, count), bool)
    for i, j in family:
        t = t_statistic(differences[i, j], 0.0)
        better[i, j], better[j, i] = t > critical, t < -critical
    return better


def win(drops: np.ndarray, method: int) -> float:
    """Mean over images and other methods of P(smaller) + P(tie) / 2, in [0, 1]."""
    scores = []
    for other in range(len(drops)):
        if other == method:
            continue
        for image in range(drops.shape[1]):
            mine, theirs = drops[method, image], drops[other, image]
            scores.append(1.0 if mine < theirs else 0.5 if mine == theirs else 0.0)
    return sum(scores) / len(scores)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p value over all 2^n sign flips of Student's t."""
    data = np.asarray(differences, float)
    observed = abs(t_statistic(data, 0.0))
    reached = 0
    for code in range(2 ** len(data)):
        signs = np.array([1.0 if code >> bit & 1 else -1.0 for bit in range(len(data))])
        reached += abs(t_statistic(data * signs, 0.0)) >= observed - 1e-9
    return float(reached / 2 ** len(data))
