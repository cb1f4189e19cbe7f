"""Leaderboards from rows: the table, what is said beside it, and the files.

Everything is derived from the rows and the manifest of a run, without a model and without a clock:
the same rows give the same bytes. The columns are fixed in `faithmap.columns`.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from faithmap.columns import BEATS, DERIVED_AFTER, board_columns, fills, ordered_scores
from faithmap.comparing import chosen_figures, compare
from faithmap.evidence import Evidence, read_evidence
from faithmap.records import PRIMARY_SCORE
from faithmap.report import figures as drawing
from faithmap.report import markdown
from faithmap.report._format import rank_text, records
from faithmap.report.comparison import render_comparison
from faithmap.sources import timed_alike
from faithmap.standing import (
    Reversal,
    build_lines,
    fill_reversals_of,
    ranked_labels,
    typical_detectable,
    win_field,
)

#: The page of a board beside published figures.
BESIDE = "published.md"
_COUNTS = ("n", "failed", "empty", "rank", "rank_low", "rank_high")
_TEXTS = ("model", "dataset", "explainer", "tied_with", "status")


@dataclass(frozen=True)
class CellFacts:
    """What a board says about one (model, dataset) beside its table."""

    model: str
    dataset: str
    #: Images scored, and images that could not be read.
    n: int
    unreadable: int
    #: Share of the labelled images that the model gets right, in percent: acc(0) by label.
    accuracy: float
    #: Images that the energy pointing game is scored on.
    energy_images: int
    #: Smallest paired difference of the primary score detected at 80% power, in percent.
    detectable: float
    #: The methods that `win` compares.
    win_field: tuple[str, ...]
    #: The default fill of the perturbation curves, and every fill that was scored.
    fill: str
    fills: tuple[str, ...]
    reversals: tuple[Reversal, ...]
    #: Explainer label -> what it noted of maps that were scored all the same, and of how many images.
    notes: Mapping[str, Mapping[str, int]]


def build_board(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The leaderboard: one line per (model, dataset, explainer label), in the request's order.

    Scores have the units of the rows (percent, milliseconds, megabytes) and 95% intervals in
    `*_low, *_high` (quartiles for times); a blank means not measured, never zero. Raises
    RequestError for rows without the columns of a run and FaithmapError for contradictory rows.
    """
    return board_of(read_evidence(rows, manifest))


def fill_reversals(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Pairs of ranked methods whose order by the primary score depends on the fill.

    Columns: `model, dataset`, then the fields of `faithmap.standing.Reversal`.
    """
    names = list(Reversal.__dataclass_fields__)
    lines = [
        {"model": cell.model, "dataset": cell.dataset} | {name: getattr(found, name) for name in names}
        for cell in read_evidence(rows, manifest)
        for found in fill_reversals_of(cell)
    ]
    return pd.DataFrame(lines, columns=["model", "dataset", *names])


def cell_facts(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> list[CellFacts]:
    """What is said beside the table of each cell of the request."""
    return [_facts(cell) for cell in read_evidence(rows, manifest)]


def across_cells(board: pd.DataFrame) -> pd.DataFrame:
    """Each ranked method's place in every cell, and how far the cells agree.

    Lines by mean rank. A column `model / dataset` per cell holds the rank and its interval, blank
    where not ranked. `consistent` is the share (in percent) of the other methods against which the
    method's order is the same in every cell that ranks both, among those met in two cells or more.
    `above_null` counts the cells in which the effect size against the reference null is positive
    with its whole interval. The cells are what they are: nothing is claimed about other models.
    """
    ranked = board[board["status"] == "ok"]
    cells = list(dict.fromkeys(zip(ranked["model"], ranked["dataset"], strict=True)))
    names = list(dict.fromkeys(ranked["explainer"]))
    scores: dict[tuple[str, str, str], Mapping[str, Any]] = {
        (line["model"], line["dataset"], line["explainer"]): line for line in records(ranked)
    }
    places = ranked.groupby("explainer")["rank"].mean()
    lines = []
    for name in sorted(names, key=lambda name: (places[name], names.index(name))):
        own = [scores.get((*cell, name)) for cell in cells]
        line: dict[str, Any] = {"explainer": name}
        for (model, dataset), found in zip(cells, own, strict=True):
            line[f"{model} / {dataset}"] = "" if found is None else rank_text(found)
        known = [found[f"{PRIMARY_SCORE}_z_low"] for found in own if found is not None]
        calibrated = [low for low in known if not math.isnan(low)]
        line["consistent"] = _consistency(name, names, cells, scores)
        line["above_null"] = f"{sum(low > 0 for low in calibrated)}/{len(calibrated)}" if calibrated else ""
        lines.append(line)
    columns = ["explainer", *(f"{model} / {dataset}" for model, dataset in cells)]
    return pd.DataFrame(lines, columns=[*columns, "consistent", "above_null"])


def _consistency(
    name: str,
    names: Sequence[str],
    cells: Sequence[tuple[str, str]],
    scores: Mapping[tuple[str, str, str], Mapping[str, Any]],
) -> float:
    same = []
    for other in names:
        met = [cell for cell in cells if (*cell, name) in scores and (*cell, other) in scores]
        if other != name and len(met) > 1:
            gaps = [int(scores[*cell, other]["rank"]) - int(scores[*cell, name]["rank"]) for cell in met]
            same.append(len(set(np.sign(gaps))) == 1)
    return 100 * sum(same) / len(same) if same else math.nan


def write_boards(
    rows: pd.DataFrame, manifest: Mapping[str, Any], out_dir: str | Path, figures: bool = True
) -> list[Path]:
    """Write `leaderboard.csv`, `leaderboard.md` and `figures/*.png`; returns the paths written.

    Where the request names published figures, `published.md` sets the board beside them.

    Each file appears whole or not at all, and equal rows and manifest give equal bytes.
    """
    cells = read_evidence(rows, manifest)
    return write_board(cells, board_of(cells), manifest, out_dir, figures)


def write_board(
    cells: Sequence[Evidence],
    board: pd.DataFrame,
    manifest: Mapping[str, Any],
    out_dir: str | Path,
    figures: bool = True,
) -> list[Path]:
    """`write_boards` for cells that are arranged and a board that is built already."""
    out = Path(out_dir)
    contents: dict[str, bytes] = {"leaderboard.csv": board_csv(board).encode()}
    drawn: dict[str, Callable[[], bytes]] = {}
    if figures:
        for cell in cells:
            drawn |= drawing.cell_figures(
                board, cell.curves, cell.model, cell.dataset, costs=timed_alike(manifest)
            )
    contents |= {f"figures/{name}": draw() for name, draw in drawn.items()}
    # Heat maps need images and maps, which a board has not: those that a run has drawn are shown.
    shown = [*drawn, *(file.name for file in sorted((out / "figures").glob("heatmaps-*.png")))]
    text = markdown.render_markdown(
        board, [_facts(cell) for cell in cells], manifest, across=across_cells(board), figures=shown
    )
    contents["leaderboard.md"] = text.encode()
    wanted = manifest.get("config", {}).get("published", ())
    if wanted:
        contents[BESIDE] = render_comparison(compare(cells, chosen_figures(wanted), named=True)).encode()
    return [_write_atomic(out / name, content) for name, content in contents.items()]


def board_csv(board: pd.DataFrame) -> str:
    """A board as CSV: four decimals, blanks for what was not measured, `\\n` line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(board.columns)
    for line in board.itertuples(index=False, name=None):
        writer.writerow([_csv_field(value) for value in line])
    return text.getvalue()


def _csv_field(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        text = f"{value:.4f}"
        return "0.0000" if text == "-0.0000" else text
    return str(value)


def _write_atomic(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def board_of(cells: Sequence[Evidence]) -> pd.DataFrame:
    lines = [line for cell in cells for line in build_lines(cell)]
    present = {column for line in lines for column in line}
    derived = [name for name in [*DERIVED_AFTER, *BEATS.values()] if name in present]
    scores = list(dict.fromkeys(score for cell in cells for score in cell.scores))
    if len(cells) > 1:
        scores = ordered_scores(scores, cells[0].manifest)
    columns = board_columns(scores, derived)
    board = pd.DataFrame(lines, columns=columns)
    for column in columns:
        if column in _COUNTS:
            board[column] = board[column].astype("Int64")
        elif column in _TEXTS:
            board[column] = board[column].astype(object).fillna("")
        else:
            board[column] = board[column].astype(np.float64)
    return board


def _facts(cell: Evidence) -> CellFacts:
    judged = np.isfinite(cell.labels) & np.isfinite(cell.predicted)
    right = cell.labels[judged] == cell.predicted[judged]
    energy = [np.isfinite(cell.score(label, "energy_pg")).sum() for label in cell.values]
    main, known = fills(cell.manifest)
    measured = {score.partition("@")[2] for score in cell.scores if score.startswith(f"{PRIMARY_SCORE}@")}
    return CellFacts(
        model=cell.model,
        dataset=cell.dataset,
        n=cell.n,
        unreadable=int(cell.manifest.get("datasets", {}).get(cell.dataset, {}).get("unreadable") or 0),
        accuracy=100 * float(right.mean()) if right.size else math.nan,
        energy_images=int(max(energy, default=0)),
        detectable=typical_detectable(cell),
        win_field=tuple(win_field(cell)) if len(ranked_labels(cell)) > 1 else (),
        fill=main,
        fills=(main, *(fill for fill in known if fill != main and fill in measured)),
        reversals=tuple(fill_reversals_of(cell)),
        notes=cell.notes,
    )
