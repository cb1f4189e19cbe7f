"""Lines of a board against a baseline, image by image: which differences are real?

The baseline is one line for all others (`differences`), or for each method its own first line (`within`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from faithmap import stats
from faithmap.columns import column_of, direction, is_cost
from faithmap.errors import RequestError, nearest
from faithmap.evidence import Evidence
from faithmap.records import PRIMARY_SCORE
from faithmap.standing import run_seed, shared_scores, status_of

#: What a difference is called whose adjusted p value is at most 1 - stats.LEVEL, by the score's direction.
_VERDICTS = {"higher": ("better", "worse"), "lower": ("worse", "better"), "none": ("higher", "lower")}


def differences(
    cells: Sequence[Evidence], label: str, score: str = PRIMARY_SCORE, *, resamples: int = stats.RESAMPLES
) -> pd.DataFrame:
    """Paired differences of every line from one, the baseline, on each model and dataset.

    Args:
        cells: the evidence of a run, as `evidence.read_evidence` gives it.
        label: the explainer's label that the others are set against, a method or a control.
        score: a score of single images, by its name in the rows or on the board (`auc_d`,
            `auc_d@label` or `auc_d_label`).
        resamples: of the bootstrap.

    Returns:
        A line for each other explainer where the baseline was measured, the highest difference first:
        the mean over the images that both have a value on of the explainer's less the baseline's, in
        the score's unit, with a 95% BCa interval; `p` of a paired sign-flip test, and `p_holm`, adjusted
        for all lines of the model and dataset (Holm 1979); `verdict`, empty where `p_holm` is above 0.05,
        and by the score's direction "better" or "worse", or where it has none "higher" or "lower".
        NaN where there is nothing to compare; `status` is that of the board.

    Raises:
        RequestError: no cell has the line, or the score, or it is not a score of single images.
    """
    name = _score_of(cells, score)
    asked = list(dict.fromkeys(each for cell in cells for each in cell.explainers))
    if label not in asked:
        raise RequestError(
            f"the run has no explainer '{label}' to set the others against; {nearest(label, asked)}"
        )
    if asked == [label]:
        raise RequestError(f"the run has no line beside '{label}' to set against it; run another explainer")
    able = [cell for cell in cells if _measured(cell, label, name)]
    if not able:
        why = next((f" ({cell.skipped[label]})" for cell in cells if label in cell.skipped), "")
        raise RequestError(f"'{label}' has no {name} on any model and dataset of the run{why}")
    lines: list[dict[str, Any]] = []
    for cell in able:
        found = _lines(cell, [(other, label) for other in cell.explainers if other != label], name, resamples)
        lines += sorted(found, key=lambda line: -line["difference"] if line["n"] else math.inf)
    return pd.DataFrame(lines)


def within(
    cells: Sequence[Evidence], score: str = PRIMARY_SCORE, *, resamples: int = stats.RESAMPLES
) -> pd.DataFrame:
    """Paired differences of the lines of each method from the first of them: what its parameters change.

    Args:
        cells: the evidence of a run, as `evidence.read_evidence` gives it.
        score: as `differences` takes it.
        resamples: of the bootstrap.

    Returns:
        What `differences` returns, in the order of the request. `against` is the first line of the method
        that was measured there, and `p_holm` is adjusted for all lines of the model and dataset, over all
        methods. Lines without a value are left out, and named by `unmeasured`.

    Raises:
        RequestError: no method has two lines, or the cells have not the score.
    """
    name = _score_of(cells, score)
    lines: list[dict[str, Any]] = []
    for cell in cells:
        first: dict[str, str] = {}
        for label in cell.explainers:
            if _measured(cell, label, name):
                first.setdefault(cell.method(label), label)
        others = [each for each in cell.explainers if each not in first.values()]
        asked = [(each, first[cell.method(each)]) for each in others if _measured(cell, each, name)]
        lines += _lines(cell, asked, name, resamples)
    if not lines:
        raise RequestError(
            f"no method of the run has two lines with {name}; give one of them a second set of parameters, "
            "as name[key=value]"
        )
    return pd.DataFrame(lines)


def without_baseline(cells: Sequence[Evidence], label: str, score: str = PRIMARY_SCORE) -> list[str]:
    """The models and datasets that `differences` leaves out, in words."""
    name = _score_of(cells, score)
    return [
        f"{cell.model} on {cell.dataset}: '{label}' has no {name}, {status_of(cell, label)}"
        for cell in cells
        if not _measured(cell, label, name)
    ]


def unmeasured(cells: Sequence[Evidence], score: str = PRIMARY_SCORE) -> list[str]:
    """The lines of methods with several that `within` leaves out, in words; those of one reason together."""
    name = _score_of(cells, score)
    said: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        several = Counter(map(cell.method, cell.explainers))
        for label in cell.explainers:
            if several[cell.method(label)] > 1 and not _measured(cell, label, name):
                said.setdefault((f"{cell.model} on {cell.dataset}", status_of(cell, label)), []).append(label)
    return [f"{where}: {', '.join(labels)} ({why})" for (where, why), labels in said.items()]


def _measured(cell: Evidence, label: str, score: str) -> bool:
    return bool(np.isfinite(cell.score(label, score)).any())


def _score_of(cells: Sequence[Evidence], score: str) -> str:
    """The name in the rows of a score of single images."""
    known = list(dict.fromkeys(each for cell in cells for each in cell.scores if not is_cost(each)))
    if score in known:
        return score
    by_column = {column_of(each): each for each in reversed(known)}
    if score in by_column:
        return by_column[score]
    if is_cost(score):
        raise RequestError(f"'{score}' is a cost, which is not measured image by image; give a score of maps")
    raise RequestError(f"the run has no score '{score}' of single images; {nearest(score, known)}")


def _lines(
    cell: Evidence, asked: Sequence[tuple[str, str]], score: str, resamples: int
) -> list[dict[str, Any]]:
    """Lines of a cell and their baselines, as one family."""
    lines = [_line(cell, other, label, score, resamples) for other, label in asked]
    above, below = _VERDICTS[direction(score, cell.manifest)]
    for line, adjusted in zip(lines, stats.holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = adjusted
        if adjusted <= 1 - stats.LEVEL:
            line["verdict"] = above if line["difference"] > 0 else below
    return lines


def _line(cell: Evidence, other: str, label: str, score: str, resamples: int) -> dict[str, Any]:
    both = shared_scores(cell, [other, label], score)
    apart = both[0] - both[1]
    seed = run_seed(cell)
    found = stats.bca(apart, resamples=resamples, seed=seed)
    return {
        "model": cell.model, "dataset": cell.dataset, "explainer": other, "score": score, "against": label,
        "n": apart.size, "difference": float(found.value[0]), "difference_low": float(found.low[0]),
        "difference_high": float(found.high[0]), "p": stats.sign_flip_test(apart, seed=seed),
        "p_holm": math.nan, "verdict": "", "status": status_of(cell, other),
    }  # fmt: skip
