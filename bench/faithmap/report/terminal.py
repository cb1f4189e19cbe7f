"""The table at the end of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from faithmap.report._format import by_rank, heading, known, number, rank_text, records, with_bounds

if TYPE_CHECKING:
    from rich.table import Table

_AFTER = ("energy_pg", "average_drop", "ms_per_image")


def summary_table(board: pd.DataFrame) -> Table:
    """A compact table of a board: rank interval, AUC-D with its interval, energy, drop and time.

    Ranked methods come first, then controls and nulls (dimmed); a line without values says why.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Leaderboard", header_style="bold", pad_edge=False)
    for title in ("Rank", "Explainer", f"{heading('auc_d')} [95%]", *(heading(name) for name in _AFTER)):
        table.add_column(
            Text(title), justify="left" if title in ("Rank", "Explainer") else "right", no_wrap=True
        )
    cells = list(dict.fromkeys(zip(board["model"], board["dataset"], strict=True)))
    for model, dataset in cells:
        if len(cells) > 1:
            table.add_section()
            table.add_row("", Text(f"{model} / {dataset}", style="italic"))
        here = records(board[(board["model"] == model) & (board["dataset"] == dataset)])
        for line in sorted(here, key=by_rank):
            fields = [Text(field) for field in _fields(line)]
            table.add_row(*fields, style="" if line["status"] == "ok" else "dim")
    if len(cells) == 1:
        table.title = Text(f"{cells[0][0]} on {cells[0][1]}")
    return table


def _fields(line: Mapping[str, Any]) -> list[str]:
    score = with_bounds(line, "auc_d")
    status = str(line["status"])
    if status not in ("ok", "control", "null") and not known(line["auc_d"]):
        score = status if len(status) <= 40 else f"{status[:39]}\N{HORIZONTAL ELLIPSIS}"
    place = rank_text(line) if status == "ok" else status.partition(":")[0]
    return [place, str(line["explainer"]), score, *(number(name, line[name]) for name in _AFTER)]
