"""Differences of lines from a baseline, as Markdown and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from faithmap.columns import column_of
from faithmap.report._format import code, count, heading, known, records, table, with_bounds
from faithmap.report._provenance import plain

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ("Explainer", "Difference", "p", "p, adjusted", "Verdict")
_FROM = "From"
_LEGEND = (
    "*Difference*: the mean over images of the explainer's score less the baseline's, both on the same "
    "images, with a 95% BCa bootstrap interval. *p*: paired sign-flip test; *adjusted* for all lines of a "
    "table (Holm). *Verdict*: empty where the adjusted p is above 0.05. The interval is each pair's own, so "
    "that one of many may leave out zero without a verdict. Lines that are not ranked, as controls and "
    "nulls, are in italics."
)


def pairs_table(lines: pd.DataFrame) -> Table:
    """For a terminal: one section for each model and dataset; controls and nulls are dimmed."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(_title(lines)), header_style="bold", pad_edge=False)
    header = _header(lines)
    for column in header:
        # Where the terminal is narrow, labels are folded, and no number is cut.
        label = column in (header[0], _FROM)
        justify: Literal["left", "right"] = "left" if label or column == header[-1] else "right"
        drawn.add_column(column, justify=justify, no_wrap=not label, overflow="fold")
    for (model, dataset), here in lines.groupby(["model", "dataset"], sort=False):
        drawn.add_section()
        drawn.add_row(Text(f"{model} / {dataset}, {_images(here)}", style="italic"))
        for line in records(here):
            style = "" if line["status"] == "ok" else "dim"
            fields = [str(line["explainer"]), *_baseline(line, header), *_fields(line)]
            drawn.add_row(*(Text(field) for field in fields), style=style)
    return drawn


def render_pairs(lines: pd.DataFrame, left_out: Sequence[str]) -> str:
    """The page: a table for each model and dataset, and what is not compared."""
    parts = [f"# {_title(lines, code)}", _LEGEND]
    header = _header(lines)
    for (model, dataset), here in lines.groupby(["model", "dataset"], sort=False):
        body = [[_name(line), *map(code, _baseline(line, header)), *_fields(line)] for line in records(here)]
        parts += [f"## {code(model)} on {code(dataset)}", f"{_images(here)}.", table(header, body)]
    parts += [f"Not compared: {plain(line)}." for line in left_out]
    return "\n\n".join(parts) + "\n"


def _title(lines: pd.DataFrame, quoted: Callable[[str], str] = str) -> str:
    first = lines.iloc[0]
    baseline = "the first line of each method" if _FROM in _header(lines) else quoted(first["against"])
    return f"{heading(column_of(str(first['score'])))}: differences from {baseline}"


def _header(lines: pd.DataFrame) -> tuple[str, ...]:
    """The columns; where baselines differ, every line names its own."""
    return (_HEADER[0], _FROM, *_HEADER[1:]) if lines["against"].nunique() > 1 else _HEADER


def _baseline(line: Mapping[str, Any], header: Sequence[str]) -> list[str]:
    return [str(line["against"])] if _FROM in header else []


def _name(line: Mapping[str, Any]) -> str:
    return code(line["explainer"]) if line["status"] == "ok" else f"*{code(line['explainer'])}*"


def _images(lines: pd.DataFrame) -> str:
    measured = lines.loc[lines["n"] > 0, "n"]
    low, high = (int(measured.min()), int(measured.max())) if len(measured) else (0, 0)
    return count(low, "image") if low == high else f"{low} to {high} images"


def _fields(line: Mapping[str, Any]) -> list[str]:
    if not line["n"]:
        return ["", "", "", str(line["status"]).partition(":")[0]]
    return [
        with_bounds(line, "difference"),
        _chance(line["p"]),
        _chance(line["p_holm"]),
        str(line["verdict"]),
    ]


def _chance(p: float) -> str:
    if not known(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
