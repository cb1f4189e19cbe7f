"""`leaderboard.md`: a board that can be read, and judged, on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from faithmap.columns import MAIN_SCORES, direction, is_cost, is_time
from faithmap.report._format import (
    ARROWS,
    DASH,
    bounds,
    by_rank,
    code,
    count,
    file_stem,
    heading,
    known,
    number,
    rank_text,
    records,
    table,
)
from faithmap.report._provenance import legend, plain, provenance, unreliable
from faithmap.sources import timed_alike

if TYPE_CHECKING:
    from faithmap.leaderboard import CellFacts
    from faithmap.standing import Reversal

Line = Mapping[str, Any]

_SHOWN = tuple(column for column in MAIN_SCORES if not is_cost(column))
#: Reversals written out before the rest is only counted.
_REVERSALS = 12


def render_markdown(
    board: pd.DataFrame,
    facts: Sequence[CellFacts],
    manifest: Mapping[str, Any],
    *,
    across: pd.DataFrame | None = None,
    figures: Sequence[str] = (),
) -> str:
    """The board as GitHub Markdown, ending in one newline.

    `figures` are the names of files in `figures/` beside it; those of a cell stand in its section.
    """
    parts = ["# Leaderboard", _introduction(manifest)]
    if across is not None and len(facts) > 1:
        parts += _across(across)
    for cell in facts:
        here = board[(board["model"] == cell.model) & (board["dataset"] == cell.dataset)]
        parts += _section(records(here), cell, manifest, figures)
    parts += unreliable(manifest) + legend(board.columns) + provenance(manifest)
    return "\n\n".join(parts) + "\n"


def _introduction(manifest: Mapping[str, Any]) -> str:
    request = manifest["request"]
    return (
        f"{len(request['explainers'])} explainers, {count(len(request['models']), 'model')}, "
        f"{count(len(request['datasets']), 'dataset')}, scored by faithmap {manifest.get('version', '?')}. "
        "Brackets are 95% intervals; methods that share a letter under *Ties* are not told apart. "
        "**Bold** is the best of the ranked methods in a column. What the columns mean stands "
        "[below](#what-the-columns-mean), what was run [at the end](#provenance)."
    )


def _across(places: pd.DataFrame) -> list[str]:
    cells = [column for column in places.columns if column not in ("explainer", "consistent", "above_null")]
    header = ["Explainer", *(code(cell) for cell in cells), "Same order", "Above null"]
    lines = [
        [code(line["explainer"]), *(line[cell] or DASH for cell in cells),
         f"{line['consistent']:.0f}%" if known(line["consistent"]) else "", line["above_null"]]
        for line in records(places)
    ]  # fmt: skip
    note = (
        "*Same order*: the share of the other methods against which a method's order is the same in "
        "every cell that ranks both. *Above null*: the cells in which its effect size against the "
        "reference null is positive with its whole interval. The cells are taken as they are: this "
        "says nothing of other models or other data."
    )
    return ["## Ranks across cells", table(header, lines), note]


def _section(
    lines: Sequence[Line], cell: CellFacts, manifest: Mapping[str, Any], figures: Sequence[str]
) -> list[str]:
    measured = [line for line in lines if any(known(line[column]) for column in MAIN_SCORES)]
    methods = sorted((line for line in measured if _is_method(line)), key=by_rank)
    others = [line for line in measured if not _is_method(line)]
    parts = [f"## {code(cell.model)} on {code(cell.dataset)}", _conditions(cell)]
    if methods:
        parts.append(_main_table(methods, methods, manifest))
    if others:
        parts += ["### Controls and nulls (never ranked)", _main_table(others, methods, manifest)]
    left_out = [line for line in lines if line["status"] not in ("ok", "control", "null")]
    if left_out:
        reasons = [f"- {code(line['explainer'])}: {plain(line['status'])}" for line in left_out]
        parts += ["### Not ranked", "\n".join(reasons)]
    parts += _fitted_here(measured, cell, manifest) + _noted(measured, cell)
    parts += _stood_in(measured) + _figures(cell, figures)
    parts += _variants(methods + others, manifest) + _cost(methods + others, manifest)
    return parts + _reversal_list(cell)


def _noted(lines: Sequence[Line], cell: CellFacts) -> list[str]:
    """What explainers noted of maps that count all the same."""
    said = [
        f"- {code(line['explainer'])}, {count(number, 'image')}: {plain(note)}"
        for line in lines
        for note, number in cell.notes.get(line["explainer"], {}).items()
    ]
    return ["Noted of maps that are scored all the same:", "\n".join(said)] if said else []


def _fitted_here(lines: Sequence[Line], cell: CellFacts, manifest: Mapping[str, Any]) -> list[str]:
    """Which methods, and whether the model, have learnt from images that they are scored on."""
    entries = manifest.get("explainers", {})
    seen = [
        line["explainer"]
        for line in lines
        if cell.dataset
        in entries.get(line["explainer"], {}).get("fits", {}).get(cell.model, {}).get("scored_too", ())
    ]
    tuned = manifest.get("models", {}).get(cell.model, {}).get("tuned", {})
    said = []
    if cell.dataset in tuned.get("scored_too", ()):
        said.append("**The model was fine-tuned on images of this very table.**")
    if seen:
        said.append(f"**Fitted on images of this very table**: {', '.join(map(code, seen))}.")
    return said


def _stood_in(lines: Sequence[Line]) -> list[str]:
    """How many maps were no maps; said only where there are some."""
    counted = [
        f"{code(line['explainer'])} {line['empty']} empty, {line['failed']} failed"
        for line in lines if line["empty"] or line["failed"]
    ]  # fmt: skip
    if not counted:
        return []
    return [f"Images without a map, scored as the reference null: {'; '.join(counted)}."]


def _is_method(line: Line) -> bool:
    return line["status"] not in ("control", "null")


def _conditions(cell: CellFacts) -> str:
    unread = f" ({cell.unreadable} more could not be read)" if cell.unreadable else ""
    said = [f"{count(cell.n, 'image')}{unread}."]
    if known(cell.accuracy):
        said.append(
            f"The untouched images: {cell.accuracy:.1f}% classified as labelled (acc(0) by label); "
            "agreement with the model's own prediction starts at 100%."
        )
    filled = f"Removed pixels are filled with {cell.fill}"
    also = [fill for fill in cell.fills if fill != cell.fill]
    said.append(f"{filled}; {', '.join(also)} in the variants." if also else f"{filled}.")
    if cell.energy_images:
        said.append(f"Energy is scored on {count(cell.energy_images, 'image')}.")
    if known(cell.detectable):
        said.append(
            f"The smallest paired AUC-D difference that these images detect at 80% power is "
            f"**{cell.detectable:.1f}** points (one typical pair, 5% level)."
        )
    if cell.win_field:
        said.append(f"*Win* compares {', '.join(map(code, cell.win_field))}.")
    return " ".join(said)


def _main_table(lines: Sequence[Line], field: Sequence[Line], manifest: Mapping[str, Any]) -> str:
    shown = [column for column in _SHOWN if column == "auc_d" or _any(field or lines, column)]
    shown = [column for column in shown if column != "win" or _any(lines, "win")]
    ranked = any(known(line["rank"]) for line in lines)
    header = [*(["Rank"] if ranked else []), "Explainer"]
    columns: list[tuple[str, Callable[[Line], str]]] = []
    for column in shown:
        columns.append((_title(column, manifest), _best_marked(column, field, manifest, interval=True)))
        if column == "auc_d":
            if ranked:
                columns.append(("Ties", lambda line: str(line["tied_with"])))
            if _any(lines, "auc_d_z"):
                effect = _best_marked("auc_d_z", field, manifest, interval=True)
                columns.append((_title("auc_d_z", manifest), effect))
    rows = []
    for line in lines:
        place = [rank_text(line).replace(" ", "&nbsp;")] if ranked else []
        rows.append([*place, code(line["explainer"]), *(write(line) for _, write in columns)])
    return table([*header, *(title for title, _ in columns)], rows, left=1 + ranked)


def _title(column: str, manifest: Mapping[str, Any]) -> str:
    way = "higher" if column.endswith("_z") else direction(column, manifest)
    return (heading(column) + ARROWS[way]).replace(" ", "&nbsp;")


def _any(lines: Iterable[Line], column: str) -> bool:
    return any(known(line.get(column)) for line in lines)


def _best_marked(
    column: str, field: Sequence[Line], manifest: Mapping[str, Any], interval: bool
) -> Callable[[Line], str]:
    """A writer of one column's fields; the best of the ranked lines, as printed, are bold."""
    way = "higher" if column.endswith("_z") else direction(column, manifest)
    printed = [number(column, line[column]) for line in field if line["status"] == "ok"]
    values = [float(text) for text in printed if text]
    comparable = way != "none" and (timed_alike(manifest) or not is_time(column))
    best = {"higher": max, "lower": min}[way](values) if values and comparable else None

    def write(line: Line) -> str:
        text = number(column, line.get(column))
        if not text:
            return ""
        ends = bounds(line, column) if interval else None
        bold = line["status"] == "ok" and best is not None and float(text) == best
        shown = f"**{text}**" if bold else text
        return f"{shown}<br><sub>[{ends[0]},&nbsp;{ends[1]}]</sub>" if ends else shown

    return write


def _variants(lines: Sequence[Line], manifest: Mapping[str, Any]) -> list[str]:
    """The other scores, without intervals: those and both halves of each AUC-D are in the CSV."""
    stand_ins = {
        other for entry in manifest.get("metrics", ()) for other in entry.get("fallback", {}).values()
    }
    skipped = ("pos_auc_", "neg_auc_")
    columns = [
        column
        for column in _other_scores(lines)
        if not is_cost(column) and column not in stand_ins and not column.startswith(skipped)
    ]
    if not columns:
        return []
    return [
        "### Variants and further scores",
        _plain_table(lines, columns, manifest, interval=False),
        "Their intervals, and the two halves of every AUC-D, are in `leaderboard.csv`.",
    ]


def _cost(lines: Sequence[Line], manifest: Mapping[str, Any]) -> list[str]:
    known_first = [column for column in MAIN_SCORES if is_cost(column) and _any(lines, column)]
    columns = [*known_first, *(column for column in _other_scores(lines) if is_cost(column))]
    if not columns:
        return []
    note = "Times are medians with quartiles, on a cold context; a blank was not measured."
    if not timed_alike(manifest):
        note += (
            " They come from several runs whose machines differ, or are not known to be alike (Provenance "
            "names them): only times of one run can be compared."
        )
    return ["### Cost", _plain_table(lines, columns, manifest, interval=True), note]


def _other_scores(lines: Sequence[Line]) -> list[str]:
    """Columns of scores beyond the main ones that some line has, in the board's order."""
    columns = list(lines[0]) if lines else []
    scores = [column for column in columns if f"{column}_low" in columns and not column.endswith("_z")]
    taken = (*MAIN_SCORES, "rank")
    return [column for column in scores if column not in taken and _any(lines, column)]


def _plain_table(
    lines: Sequence[Line], columns: Sequence[str], manifest: Mapping[str, Any], interval: bool
) -> str:
    writers = [
        _best_marked(column, lines, manifest, interval and column.startswith("ms_")) for column in columns
    ]
    rows = [
        [code(line["explainer"]) if _is_method(line) else f"{code(line['explainer'])} ({line['status']})",
         *(write(line) for write in writers)]
        for line in lines if any(known(line[column]) for column in columns)
    ]  # fmt: skip
    return table(["Explainer", *(_title(column, manifest) for column in columns)], rows)


def _reversal_list(cell: CellFacts) -> list[str]:
    if len(cell.fills) < 2:
        return []
    if not cell.reversals:
        return ["### Does the order depend on the fill?", "No pair of ranked methods changes its order."]
    lines = [_reversal(found, cell.fill) for found in cell.reversals[:_REVERSALS]]
    rest = len(cell.reversals) - len(lines)
    if rest > 0:
        lines.append(f"- and {rest} more, none of them surer than these.")
    return [
        "### Does the order depend on the fill?",
        f"{count(len(cell.reversals), 'pair')} of ranked methods, by the mean AUC-D; an order is "
        "significant at 95% with all ranked pairs as one family.",
        "\n".join(lines),
    ]


def _reversal(found: Reversal, fill: str) -> str:
    sure = {True: "significant", False: "not significant"}
    return (
        f"- {code(found.first)} leads {code(found.second)} by {found.difference:.1f} under {fill} "
        f"({sure[found.significant]}), trails it by {-found.difference_there:.1f} under {found.fill} "
        f"({sure[found.significant_there]})."
    )


def _figures(cell: CellFacts, figures: Sequence[str]) -> list[str]:
    said = {
        f"heatmaps-{file_stem(cell.model, cell.dataset)}.png": "Heat maps",
        f"curves-{file_stem(cell.model, cell.dataset)}.png": "Perturbation curves",
        f"cost-{file_stem(cell.model, cell.dataset)}.png": "AUC-D against cost",
    }
    where = f"{cell.model} on {cell.dataset}"
    return [f"![{title}, {where}](figures/{name})" for name, title in said.items() if name in figures]
