"""What the columns of a board are called, in which order they stand, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from faithmap.records import PRIMARY_SCORE, Direction

#: The columns that name a line and count its images.
IDENTITY = ("model", "dataset", "explainer", "n", "failed", "empty")
#: The scores that every board shows, measured or not.
MAIN_SCORES = (
    "auc_d", "neg_auc", "pos_auc", "average_drop", "increase", "win", "area", "energy_pg",
    "ms_per_image", "forwards", "backwards", "peak_mb",
)  # fmt: skip
#: The scores with an effect size against the reference null.
CALIBRATED_SCORES = ("auc_d", "neg_auc", "pos_auc", "average_drop", "increase", "energy_pg")
#: The columns that place a line.
PLACE = ("rank", "rank_low", "rank_high", "tied_with", "status")
#: Scores derived on the board from several rows, and the score after which each one stands.
DERIVED_AFTER = {
    "win_share": "average_drop", "energy_pg_corrected": "energy_pg", "fit_images": "backwards",
    "fit_seconds": "backwards", "params_added": "backwards",
}  # fmt: skip
#: What fitting an explainer took, from the record of its fit.
FIT_COSTS = ("fit_images", "fit_seconds", "params_added")
#: The null that a method's own maps become -> the column of images on which the method beats it.
BEATS = {"swapped": "beats_swapped", "rolled": "beats_rolled"}

#: Directions of the scores that faithmap itself defines, for boards whose manifest is silent.
_DIRECTIONS: dict[str, Direction] = {
    "auc_d": "higher", "neg_auc": "higher", "pos_auc": "lower", "average_drop": "lower",
    "increase": "higher", "win": "higher", "win_share": "higher", "area": "none",
    "energy_pg": "higher", "energy_pg_corrected": "higher", "beats_swapped": "higher",
    "beats_rolled": "higher", "ms_per_image": "lower", "forwards": "lower", "backwards": "lower",
    "peak_mb": "lower", "fit_images": "none", "fit_seconds": "lower", "params_added": "none",
}  # fmt: skip
_COST = {"forwards", "backwards", "peak_mb", *FIT_COSTS}
_FILLS = {"black", "mean", "blur", "noisy-linear"}


def base_score(score: str) -> str:
    """The score without its variant: `auc_d@label` is a variant of `auc_d`."""
    return score.partition("@")[0]


def variant_title(score: str, variant: str) -> str:
    """The name that a score has in the rows when its metric is asked for as a variant.

    >>> variant_title("auc_d", "blur"), variant_title("auc_d@label", "blur"), variant_title("area", "")
    ('auc_d@blur', 'auc_d@label-blur', 'area')
    """
    if not variant:
        return score
    return f"{score}-{variant}" if "@" in score else f"{score}@{variant}"


def column_of(score: str) -> str:
    """The board's column of a score in the rows.

    >>> column_of("auc_d@probability"), column_of("auc_d@label-blur")
    ('auc_d_prob', 'auc_d_label_blur')
    """
    base, _, variant = score.partition("@")
    short = re.sub(r"\bprobability\b", "prob", variant)
    return re.sub(r"[^0-9A-Za-z]+", "_", f"{base}_{short}" if short else base)


def is_time(score: str) -> bool:
    """Whether a score is a time, shown as a median with its interquartile range."""
    return score.startswith("ms_")


def is_cost(score: str) -> bool:
    """Whether a score is a cost: measured on some images only, and no null can stand in for it."""
    return is_time(score) or base_score(score) in _COST


def direction(score: str, manifest: Mapping[str, Any]) -> Direction:
    """Which way of a score (in rows or on the board) is better: "higher", "lower" or "none"."""
    declared = _declared(manifest)
    columns = {column_of(name): way for name, way in reversed(declared.items())}
    for known in (declared, columns, _DIRECTIONS):
        if score in known:
            return known[score]
    base = base_score(score)
    if base in declared or base in _DIRECTIONS:
        return declared.get(base, _DIRECTIONS.get(base, "none"))
    # A variant's column, whose plugin declares the plain score alone.
    roots = [name for name in {**_DIRECTIONS, **columns} if score.startswith(f"{name}_")]
    if roots:
        root = max(roots, key=len)
        return columns.get(root, _DIRECTIONS.get(root, "none"))
    return "lower" if is_cost(score) else "none"


def _declared(manifest: Mapping[str, Any]) -> dict[str, Direction]:
    ways: dict[str, Direction] = {}
    for entry in manifest.get("metrics", ()):
        for score, way in entry.get("scores", {}).items():
            ways.setdefault(score, way)
    return ways


def ordered_scores(present: Iterable[str], manifest: Mapping[str, Any]) -> list[str]:
    """Scores of the rows in registry order: as the metrics declare them, then the rest by name.

    The variants of a score that are not declared themselves follow it, by name.
    """
    left = dict.fromkeys(sorted(present))
    ordered: list[str] = []
    for score in _declared(manifest):
        own = [name for name in left if name == score]
        kin = [name for name in left if name != score and base_score(name) == score]
        undeclared = [name for name in kin if name not in _declared(manifest)]
        for name in own + undeclared:
            del left[name]
        ordered += own + undeclared
    return ordered + list(left)


def score_columns(scores: Sequence[str], derived: Iterable[str]) -> list[str]:
    """All score columns of a board, main ones first; `derived` are the derived ones it has."""
    wanted = set(derived)
    others: list[str] = []
    for score in scores:
        if column_of(score) not in MAIN_SCORES:
            others.append(column_of(score))
        others += [name for name, after in DERIVED_AFTER.items() if after == score and name in wanted]
    others += [name for name in [*DERIVED_AFTER, *BEATS.values()] if name in wanted and name not in others]
    return list(dict.fromkeys([*MAIN_SCORES, *others]))


def board_columns(scores: Sequence[str], derived: Iterable[str]) -> list[str]:
    """Every column of a board in order, for scores of the rows in registry order."""
    shown = score_columns(scores, derived)
    columns = [*IDENTITY, *shown]
    for column in shown:
        columns += [f"{column}_low", f"{column}_high"]
        if column in CALIBRATED_SCORES:
            columns.append(f"{column}_z")
        if column == PRIMARY_SCORE:
            columns += [f"{column}_z_low", f"{column}_z_high"]
    return [*columns, *PLACE]


def fills(manifest: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The fill of the primary score's own curves, and the names of all fills that may occur."""
    entries = [entry for entry in manifest.get("metrics", ()) if entry.get("fill")]
    scored = [entry for entry in entries if PRIMARY_SCORE in map(base_score, entry.get("scores", ()))]
    plain = [str(entry["fill"]) for entry in scored if PRIMARY_SCORE in entry["scores"]]
    main = "black" if "black" in plain or not plain else plain[0]
    return main, sorted(_FILLS | {str(entry["fill"]) for entry in scored})
