"""From the arrays of one (model, dataset) to the lines of its board: estimates, ranks, derived scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from faithmap import ranking, stats
from faithmap.columns import (
    BEATS,
    CALIBRATED_SCORES,
    FIT_COSTS,
    base_score,
    column_of,
    direction,
    fills,
    is_time,
)
from faithmap.evidence import Evidence, FloatArray, snap
from faithmap.records import PRIMARY_SCORE, REFERENCE_NULL

Line = dict[str, Any]

#: A method that failed on more than this share of the images is listed, not ranked.
FAILED_LIMIT = 0.01
_DROP = "average_drop"
_ENERGY = "energy_pg"


@dataclass(frozen=True)
class Reversal:
    """Two ranked methods whose order by the primary score depends on the fill."""

    #: The better and the worse one under the default fill.
    first: str
    second: str
    fill: str
    #: Mean of first minus second, in percent, under the default fill (> 0) and under `fill` (< 0).
    difference: float
    difference_there: float
    #: Whether each of the two orders is significant at 95%, all ranked pairs one family.
    significant: bool
    significant_there: bool


def build_lines(cell: Evidence, *, resamples: int = stats.RESAMPLES) -> list[Line]:
    """The board's lines of one cell, one for each explainer of the request, in its order."""
    seed = run_seed(cell)
    lines: dict[str, Line] = {label: _first_columns(cell, label) for label in cell.explainers}
    measured = [label for label in cell.explainers if label in cell.values and label not in cell.skipped]
    _add_estimates(cell, lines, measured, resamples, seed)
    _add_effects(cell, lines, measured, resamples, seed)
    _add_energy(cell, lines, measured, resamples, seed)
    _add_beats(cell, lines, measured)
    _add_fits(cell, lines, measured)
    ranked = ranked_labels(cell)
    _add_win(cell, lines, ranked, resamples, seed)
    _add_ranks(cell, lines, ranked, resamples, seed)
    return [lines[label] for label in cell.explainers]


def run_seed(cell: Evidence) -> int:
    """The seed of the run, which seeds the statistics as well."""
    return int(cell.manifest.get("settings", {}).get("seed", 0))


def ranked_labels(cell: Evidence) -> list[str]:
    """The methods that are ranked on this cell, in the order of the request."""
    return [label for label in cell.explainers if status_of(cell, label) == "ok"]


def status_of(cell: Evidence, label: str) -> str:
    """ "ok" for a ranked method, else what keeps the line from being ranked."""
    if label in cell.skipped:
        return f"skipped: {cell.skipped[label]}"
    if cell.role(label) != "method":
        return cell.role(label)
    if label not in cell.values:
        return "not ranked: no rows"
    if reason := cell.unreliable(label):
        return f"not ranked: {reason}"
    # Another metric that fails costs its own column, not the rank.
    if cell.unranked[label] > FAILED_LIMIT * cell.n:
        return f"not ranked: {100 * cell.unranked[label] / max(cell.n, 1):.1f}% failed"
    missing = cell.n - int(np.isfinite(cell.score(label, PRIMARY_SCORE)).sum())
    if missing > FAILED_LIMIT * cell.n or missing == cell.n:
        return f"not ranked: {PRIMARY_SCORE} missing on {missing} of {cell.n} images"
    return "ok"


def shared_scores(cell: Evidence, labels: Sequence[str], score: str) -> FloatArray:
    """One score (M, n) of several lines on the images on which all of them have it."""
    values = np.array([cell.score(label, score) for label in labels]).reshape(len(labels), len(cell.images))
    return np.asarray(values[:, np.isfinite(values).all(axis=0)])


def win_field(cell: Evidence) -> list[str]:
    """The methods that `win` compares: the ranked ones whose drop was measured."""
    return [label for label in ranked_labels(cell) if np.isfinite(cell.score(label, _DROP)).any()]


def fill_reversals_of(cell: Evidence, *, resamples: int = stats.RESAMPLES) -> list[Reversal]:
    """Pairs of ranked methods in another order under another fill, the surest reversals first."""
    labels = ranked_labels(cell)
    main, others = fills(cell.manifest)
    found: list[Reversal] = []
    for fill in others:
        score = f"{PRIMARY_SCORE}@{fill}"
        if fill == main or score not in cell.scores or len(labels) < 2:
            continue
        here = np.array([cell.score(label, PRIMARY_SCORE) for label in labels])
        there = np.array([cell.score(label, score) for label in labels])
        both = np.isfinite(here).all(axis=0) & np.isfinite(there).all(axis=0)
        found += _reversals(cell, labels, fill, here[:, both], there[:, both], resamples)
    found.sort(key=lambda r: (-(r.significant + r.significant_there), r.fill, r.first, r.second))
    return found


def _reversals(
    cell: Evidence, labels: Sequence[str], fill: str, here: FloatArray, there: FloatArray, resamples: int
) -> list[Reversal]:
    if not here.shape[-1]:
        return []
    higher = direction(PRIMARY_SCORE, cell.manifest) != "lower"
    seed = run_seed(cell)
    rank_here = ranking.rank_intervals(here, higher, resamples=resamples, seed=seed)
    rank_there = ranking.rank_intervals(there, higher, resamples=resamples, seed=seed)
    return [
        Reversal(
            first, second, fill, float((here[i] - here[j]).mean()), float((there[i] - there[j]).mean()),
            bool(rank_here.better[i, j]), bool(rank_there.better[j, i]),
        )
        for i, first in enumerate(labels) for j, second in enumerate(labels)
        if rank_here.rank[i] < rank_here.rank[j] and rank_there.rank[i] > rank_there.rank[j]
    ]  # fmt: skip


def typical_detectable(cell: Evidence) -> float:
    """The primary score's smallest paired difference that n images detect at 80% power.

    For a typical pair: the one with the median standard deviation of differences among all pairs
    of ranked methods. In percent; NaN with fewer than two methods or images.
    """
    values = shared_scores(cell, ranked_labels(cell), PRIMARY_SCORE)
    first, second = np.triu_indices(len(values), 1)
    if not first.size or values.shape[-1] < 2:
        return float("nan")
    spreads = (values[first] - values[second]).std(axis=-1, ddof=1)
    return stats.detectable_difference(float(np.median(spreads)), values.shape[-1])


def _first_columns(cell: Evidence, label: str) -> Line:
    line: Line = {"model": cell.model, "dataset": cell.dataset, "explainer": label, "n": cell.n}
    if label in cell.values and label not in cell.skipped:
        line |= {"failed": cell.failed[label], "empty": cell.empty[label]}
    return line | {"status": status_of(cell, label)}


def _put(line: Line, column: str, value: float, low: float, high: float) -> None:
    line |= {column: value, f"{column}_low": low, f"{column}_high": high}


def _add_estimates(
    cell: Evidence, lines: Mapping[str, Line], labels: Sequence[str], resamples: int, seed: int
) -> None:
    for (label, score), numbers in estimates(cell, labels, cell.scores, resamples, seed).items():
        _put(lines[label], column_of(score), *numbers)


def estimates(
    cell: Evidence,
    labels: Sequence[str],
    scores: Sequence[str],
    resamples: int = stats.RESAMPLES,
    seed: int = 0,
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Value and bounds by label and score, as boards print them; without what was not measured.

    Means with intervals, medians of times with quartiles, the largest memory without bounds.
    """
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    series: dict[bytes, list[tuple[str, str]]] = {}
    for label in labels:
        for score in scores:
            values = cell.score(label, score)
            known = np.isfinite(values)
            data = values[known]
            if not data.size:
                continue
            if is_time(score):
                timings = cell.timings.get((label, score), data)
                median, low, high = np.quantile(timings, [0.5, 0.25, 0.75]).tolist()
                found[label, score] = median, low, high
            elif base_score(score) == "peak_mb":
                found[label, score] = float(data.max()), float("nan"), float("nan")
            elif score in cell.hit_value:
                found[label, score] = _hit_estimate(data, cell.hit_value[score])
            else:
                series.setdefault(known.tobytes(), []).append((label, score))
    for pattern, members in series.items():
        known = np.frombuffer(pattern, np.bool_)
        block = np.array([cell.score(label, score)[known] for label, score in members])
        mean, low, high = (part.tolist() for part in stats.bca(block, resamples=resamples, seed=seed))
        found |= dict(zip(members, zip(mean, low, high, strict=True), strict=True))
    return found


def _hit_estimate(values: FloatArray, hit: float) -> tuple[float, float, float]:
    low, high = stats.wilson(values.sum() / hit, values.size)
    return float(values.mean()), hit * float(low), hit * float(high)


def _add_effects(
    cell: Evidence, lines: Mapping[str, Line], labels: Sequence[str], resamples: int, seed: int
) -> None:
    """Effect sizes against the reference null, for every line but the null itself."""
    judged = [label for label in labels if cell.method(label) != REFERENCE_NULL]
    for score in CALIBRATED_SCORES:
        null = cell.null_score(score)
        higher = direction(score, cell.manifest) != "lower"
        blocks: dict[bytes, list[str]] = {}
        for label in judged:
            known = np.isfinite(cell.score(label, score)) & np.isfinite(null)
            if known.any():
                blocks.setdefault(known.tobytes(), []).append(label)
        for pattern, members in blocks.items():
            known = np.frombuffer(pattern, np.bool_)
            values = np.array([cell.score(label, score)[known] for label in members])
            if score == PRIMARY_SCORE:
                found = stats.calibration(values, null[known], higher, resamples=resamples, seed=seed)
                for label, *numbers in zip(members, *(part.tolist() for part in found), strict=True):
                    _put(lines[label], f"{score}_z", *numbers)
            else:
                effects = stats.calibration(values, null[known], higher, resamples=1, seed=seed).value
                for label, effect in zip(members, effects.tolist(), strict=True):
                    lines[label][f"{score}_z"] = effect


def _share_score(cell: Evidence) -> str:
    """The score that holds the object's share of the image: the stand-in of the energy."""
    for entry in cell.manifest.get("metrics", ()):
        if _ENERGY in entry.get("fallback", {}):
            return str(entry["fallback"][_ENERGY])
    return "object_share"


def _add_energy(
    cell: Evidence, lines: Mapping[str, Line], labels: Sequence[str], resamples: int, seed: int
) -> None:
    """The chance-corrected energy, 100 sum(E - a) / sum(1 - a), over the scored images."""
    share_score = _share_score(cell)
    for label in labels:
        energy, share = cell.score(label, _ENERGY), cell.score(label, share_score)
        known = np.isfinite(energy) & np.isfinite(share)
        if known.any() and (share[known] < 100).any():
            gain, room = energy[known] - share[known], 100.0 - share[known]
            found = stats.ratio_of_sums(gain, room, resamples=resamples, seed=seed)
            _put(lines[label], "energy_pg_corrected", *(100 * float(part[0]) for part in found))


def _add_beats(cell: Evidence, lines: Mapping[str, Line], labels: Sequence[str]) -> None:
    """The share of images on which a method beats its own moved maps; a tie is one half."""
    sign = -1.0 if direction(PRIMARY_SCORE, cell.manifest) == "lower" else 1.0
    for (label, null), moved in cell.moved.items():
        if label not in labels or null not in BEATS or PRIMARY_SCORE not in cell.scores:
            continue
        gain = sign * (cell.score(label, PRIMARY_SCORE) - moved[cell.scores.index(PRIMARY_SCORE)])
        gain = gain[np.isfinite(gain)]
        if gain.size:
            _put(lines[label], BEATS[null], *_hit_estimate((np.sign(gain) + 1) * 50.0, 100.0))


def _add_fits(cell: Evidence, lines: Mapping[str, Line], labels: Sequence[str]) -> None:
    """What fitting a line's explainer to the model took, where it was fitted."""
    for label in labels:
        fit = cell.manifest.get("explainers", {}).get(label, {}).get("fits", {}).get(cell.model)
        lines[label] |= {name: float(fit[name]) for name in FIT_COSTS} if fit else {}


def _add_win(
    cell: Evidence, lines: Mapping[str, Line], ranked: Sequence[str], resamples: int, seed: int
) -> None:
    """`win` and `win_share` among the ranked methods, from the drop of each image."""
    field = [label for label in ranked if label in win_field(cell)]
    drops = shared_scores(cell, field, _DROP)
    if len(field) < 2 or not drops.shape[-1]:
        return
    found = stats.bca(snap(100 * ranking.paired_win(drops)), resamples=resamples, seed=seed)
    shares = 100 * ranking.smallest_share(drops)
    for label, share, *numbers in zip(field, shares, *(part.tolist() for part in found), strict=True):
        _put(lines[label], "win", *numbers)
        _put(lines[label], "win_share", *_hit_estimate(share, 100.0))


def _add_ranks(
    cell: Evidence, lines: Mapping[str, Line], ranked: Sequence[str], resamples: int, seed: int
) -> None:
    """Rank, rank interval and tie letters of the ranked methods, over their shared images."""
    values = shared_scores(cell, ranked, PRIMARY_SCORE)
    if not len(values) or not values.shape[-1]:
        return
    higher = direction(PRIMARY_SCORE, cell.manifest) != "lower"
    found = ranking.rank_intervals(values, higher, resamples=resamples, seed=seed)
    order = np.argsort(found.rank, kind="stable")
    letters = ranking.letter_groups(_reordered(found.decided, order))
    for place, method in enumerate(order):
        lines[ranked[method]] |= {
            "rank": int(found.rank[method]),
            "rank_low": int(found.low[method]),
            "rank_high": int(found.high[method]),
            "tied_with": letters[place],
        }


def _reordered(matrix: npt.NDArray[np.bool_], order: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    return np.asarray(matrix[np.ix_(order, order)])
