"""Numbers and names as the boards print them, in Markdown and on a terminal alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from faithmap.columns import is_cost

#: Short headings of columns whose names say less to a reader.
HEADINGS = {
    "auc_d": "AUC-D", "neg_auc": "Neg AUC", "pos_auc": "Pos AUC", "average_drop": "Drop",
    "increase": "Increase", "win": "Win", "area": "Area", "energy_pg": "Energy",
    "ms_per_image": "ms / image", "forwards": "Forwards", "backwards": "Backwards",
    "peak_mb": "Peak MB", "win_share": "Win share", "energy_pg_corrected": "Energy, corrected",
    "beats_swapped": "Beats swapped", "beats_rolled": "Beats rolled", "fit_images": "Fit images",
    "fit_seconds": "Fit seconds", "params_added": "Parameters added", "auc_d_z": "Effect",
}  # fmt: skip
ARROWS = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", "none": ""}
DASH = "\N{EN DASH}"


def known(value: Any) -> bool:
    """Whether a board's field holds a number: blanks are NaN or pandas' NA."""
    return value is not None and value is not pd.NA and not (isinstance(value, float) and math.isnan(value))


def records(board: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a table as dictionaries from column to field."""
    return [{str(name): field for name, field in line.items()} for line in board.to_dict("records")]


def number(column: str, value: Any) -> str:
    """A value as text: one decimal for scores, two for effects, three digits for costs; or ''."""
    if not known(value):
        return ""
    if column.endswith("_z"):
        text = f"{value:.2f}"
    elif is_cost(column):
        text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    else:
        text = f"{value:.1f}"
    return text.removeprefix("-") if not float(text) else text


def bounds(line: Mapping[str, Any], column: str) -> tuple[str, str] | None:
    """The two ends of a column's interval as text; None where there is none."""
    low, high = line.get(f"{column}_low"), line.get(f"{column}_high")
    return (number(column, low), number(column, high)) if known(low) and known(high) else None


def with_bounds(line: Mapping[str, Any], column: str) -> str:
    """A field as text, with the ends of its interval where there are any: `2.5 [1.0, 4.1]`."""
    text, ends = number(column, line.get(column)), bounds(line, column)
    return f"{text} [{ends[0]}, {ends[1]}]" if text and ends else text


def rank_text(line: Mapping[str, Any]) -> str:
    """A rank with its interval, as `2 (1-4)`; a dash where the line is not ranked."""
    if not known(line.get("rank")):
        return DASH
    return f"{line['rank']} ({line['rank_low']}{DASH}{line['rank_high']})"


def by_rank(line: Mapping[str, Any]) -> float:
    """Sorting key that puts ranked lines first, the best on top."""
    return float(line["rank"]) if known(line.get("rank")) else math.inf


def heading(column: str) -> str:
    """The short heading of a column: known by hand, or its name in words."""
    if column in HEADINGS:
        return HEADINGS[column]
    for root in sorted(HEADINGS, key=len, reverse=True):
        if column.startswith(f"{root}_"):
            return f"{HEADINGS[root]}, {column[len(root) + 1 :].replace('_', ' ')}"
    return column.replace("_", " ")


def count(n: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one.

    >>> count(1, "image"), count(0, "image")
    ('1 image', '0 images')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def code(name: Any) -> str:
    """A name as Markdown code that no name can break out of."""
    text = " ".join(str(name).split()).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, its first `left` columns flush left and the others right."""
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def file_stem(*names: str) -> str:
    """Names joined into a file name: whatever is not a letter, digit or one of `._+-` becomes `-`."""
    joined = "-".join(names)
    return "".join(sign if sign.isalnum() or sign in "._+-" else "-" for sign in joined)
