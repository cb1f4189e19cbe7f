"""One line of a board as the baseline of all others, image by image: which differences are real?"""

from __future__ import annotations

import math
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
    lines = [line for cell in able for line in _lines(cell, label, name, resamples)]
    return pd.DataFrame(lines)


def without_baseline(cells: Sequence[Evidence], label: str, score: str = PRIMARY_SCORE) -> list[str]:
    """The models and datasets that `differences` leaves out, in words."""
    name = _score_of(cells, score)
    return [
        f"{cell.model} on {cell.dataset}: '{label}' has no {name}, {status_of(cell, label)}"
        for cell in cells
        if not _measured(cell, label, name)
    ]


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


def _lines(cell: Evidence, label: str, score: str, resamples: int) -> list[dict[str, Any]]:
    lines = [_line(cell, other, label, score, resamples) for other in cell.explainers if other != label]
    above, below = _VERDICTS[direction(score, cell.manifest)]
    for line, adjusted in zip(lines, stats.holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = adjusted
        if adjusted <= 1 - stats.LEVEL:
            line["verdict"] = above if line["difference"] > 0 else below
    return sorted(lines, key=lambda line: -line["difference"] if line["n"] else math.inf)


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
