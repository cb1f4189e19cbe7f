"""The figures of a board: perturbation curves, and quality against cost.

Drawn with matplotlib's Agg canvas and nothing of the user's style, so equal boards give equal
bytes under one version of matplotlib. matplotlib is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from faithmap._curves import CURVE_SCORES, Curves
from faithmap.report._format import by_rank, file_stem, known, number, records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]

#: Okabe and Ito's palette, told apart by readers of every kind of colour vision; yellow and black
#: are left out (one too faint on white, the other too near to the controls' grey).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: When the colours are used up they come round again with another stroke and marker.
STROKES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)),
    (0, (12, 3)),
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY, INK = "#8A8A8A", "#333333"
_CONTROL_STROKES: tuple[Any, ...] = (
    (0, (4, 2)), (0, (1, 1.5)), (0, (8, 2)), (0, (4, 1.5, 1, 1.5)), (0, (4, 1.5, 1, 1.5, 1, 1.5)),
    (0, (2, 4)),
)  # fmt: skip
_NULL_TEXT = "reference null, 95%"
#: Inches that the two panels of the curves take, without their legend.
_PANELS_WIDTH = 7.4
_RC: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": "#555555", "ytick.color": "#555555",
    "axes.grid": True, "grid.color": "#E8E8E8", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip
_TITLES = {
    "neg_auc": "Least relevant pixels removed first\n(higher is better)",
    "pos_auc": "Most relevant pixels removed first\n(lower is better)",
}


def cell_figures(
    board: pd.DataFrame, curves: Curves, model: str, dataset: str, *, costs: bool = True
) -> dict[str, Callable[[], bytes]]:
    """The figures that the cell's data allows: file name -> a function that draws the PNG.

    `costs` is False where the board's times must not be set beside each other.
    """
    here = records(board[(board["model"] == model) & (board["dataset"] == dataset)])
    lines = sorted(here, key=by_rank)
    where, stem = f"{model} on {dataset}", file_stem(model, dataset)
    made: dict[str, Callable[[], bytes]] = {}
    if _with_curves(lines, curves):
        made[f"curves-{stem}.png"] = partial(curves_figure, lines, curves, where)
    if costs and any(known(line["auc_d"]) and known(line["ms_per_image"]) for line in lines):
        made[f"cost-{stem}.png"] = partial(cost_figure, lines, where)
    return made


def curves_figure(lines: Sequence[Line], curves: Curves, where: str) -> bytes:
    """Mean agreement against the share of pixels removed, a panel for each order, as a PNG."""
    shown = _with_curves(lines, curves)
    return drawn(partial(_draw_curves, shown, curves, where), height=max(4.2, 1.6 + 0.18 * len(shown)))


def _with_curves(lines: Sequence[Line], curves: Curves) -> list[Line]:
    """The lines with something to draw: a method that is not defined here has curves without a value."""
    return [
        line
        for line in lines
        if any(np.isfinite(curve).any() for curve in curves.lines.get(line["explainer"], {}).values())
    ]


def cost_figure(lines: Sequence[Line], where: str) -> bytes:
    """AUC-D with its interval against the time of one explanation, as a PNG."""
    shown = [line for line in lines if known(line["auc_d"]) and known(line["ms_per_image"])]
    return drawn(partial(_draw_cost, shown, where), height=4.8)


def drawn(draw: Callable[[Figure], None], height: float) -> bytes:
    """A figure of a board as a PNG, of so many inches in height."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(9.2, height), dpi=150, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        picture = io.BytesIO()
        canvas.print_png(picture, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return picture.getvalue()


def _looks(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Colour, stroke and marker of each line: ranked ones in colour by rank, the rest in grey."""
    looks: dict[str, dict[str, Any]] = {}
    coloured = [line["explainer"] for line in lines if line["status"] not in ("control", "null")]
    for place, label in enumerate(coloured):
        turn, colour = divmod(place, len(PALETTE))
        looks[label] = {"color": PALETTE[colour], "linestyle": STROKES[turn % len(STROKES)],
                        "marker": MARKERS[turn % len(MARKERS)]}  # fmt: skip
    grey = [line["explainer"] for line in lines if line["explainer"] not in looks]
    for place, label in enumerate(grey):
        stroke = _CONTROL_STROKES[place % len(_CONTROL_STROKES)]
        looks[label] = {"color": GREY, "linestyle": stroke, "marker": "x"}
    return looks


def _draw_curves(lines: Sequence[Line], curves: Curves, where: str, figure: Figure) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    looks = _looks(lines)
    for panel, score in zip(panels, CURVE_SCORES, strict=True):
        _draw_band(panel, curves, score)
        for line in reversed(lines):
            curve = curves.lines[line["explainer"]].get(score)
            if curve is not None:
                look, grey = looks[line["explainer"]], line["status"] in ("control", "null")
                panel.plot(
                    100 * np.arange(len(curve)) / len(curve), 100 * curve, color=look["color"],
                    linestyle=look["linestyle"], linewidth=1.2 if grey else 1.9,
                    label=_legend_text(line), zorder=2 if grey else 3,
                )  # fmt: skip
        panel.set(xlim=(0, 90), ylim=(0, 102), xticks=range(0, 91, 15), xlabel="Pixels removed (%)")
        panel.set_title(_TITLES[score])
    panels[0].set_ylabel("Agreement with the clean prediction (%)")
    figure.suptitle(f"Perturbation curves: {where}", x=0.012, ha="left", fontsize=11)
    _draw_legend(figure, panels, lines)


def _legend_text(line: Line) -> str:
    place = f"{line['rank']}. " if known(line["rank"]) else ""
    score = f"  {number('auc_d', line['auc_d'])}" if known(line["auc_d"]) else ""
    return f"{place}{line['explainer']}{score}"


def _draw_band(panel: Axes, curves: Curves, score: str) -> None:
    if score in curves.band:
        mean, low, high = 100 * curves.band[score]
        share = 100 * np.arange(len(mean)) / len(mean)
        panel.fill_between(share, low, high, color="#D9D9D9", linewidth=0, label=_NULL_TEXT, zorder=1)


def _draw_legend(figure: Figure, panels: Sequence[Axes], lines: Sequence[Line]) -> None:
    """One legend beside the panels, in the order of the board, whatever the order of drawing.

    The figure grows by the legend's width, so that long names take nothing from the panels.
    """
    found: dict[str, Any] = {}
    for panel in panels:
        handles, texts = panel.get_legend_handles_labels()
        found.update(zip(texts, handles, strict=True))
    order = [text for text in [*map(_legend_text, lines), _NULL_TEXT] if text in found]
    legend = figure.legend(
        [found[text] for text in order], order, loc="upper left", title="Explainer, AUC-D", frameon=False,
        handlelength=2.6, alignment="left", fontsize=8.5, title_fontsize=8.5, borderaxespad=0,
    )  # fmt: skip
    width = legend.get_window_extent().width / figure.dpi + 0.25
    figure.set_figwidth(_PANELS_WIDTH + width)
    edge = _PANELS_WIDTH / (_PANELS_WIDTH + width)
    figure.tight_layout(rect=(0, 0, edge, 1), w_pad=2.0)
    legend.set_bbox_to_anchor((edge, panels[0].get_position().y1))


def _draw_cost(lines: Sequence[Line], where: str, figure: Figure) -> None:
    from faithmap.report._labels import place_labels

    panel = figure.subplots()
    looks = _looks(lines)
    panel.set_xscale("log")
    for line in lines:
        look, x, y = looks[line["explainer"]], line["ms_per_image"], line["auc_d"]
        if known(line["auc_d_low"]):
            panel.plot(
                [x, x],
                [line["auc_d_low"], line["auc_d_high"]],
                color=look["color"],
                linewidth=1.6,
                alpha=0.55,
            )
        panel.plot(
            [x], [y], color=look["color"], marker=look["marker"], markersize=6.5, linestyle="none", zorder=4
        )
    _draw_front(panel, lines)
    panel.axhline(0, color="#BBBBBB", linewidth=1, zorder=1)
    panel.set_xlabel("Time of one explanation (ms, median, logarithmic)", loc="left")
    panel.set_ylabel("AUC-D (%, with 95% interval)")
    panel.set_title(f"Faithfulness against cost: {where}", pad=14)
    _pad_limits(panel, lines)
    figure.tight_layout()
    points = [(line["ms_per_image"], line["auc_d"]) for line in lines]
    bars = [(line["auc_d_low"], line["auc_d_high"]) if known(line["auc_d_low"]) else (line["auc_d"],) * 2
            for line in lines]  # fmt: skip
    inks = [INK if line["status"] not in ("control", "null") else "#6E6E6E" for line in lines]
    place_labels(panel, [line["explainer"] for line in lines], points, bars, inks)


def _pad_limits(panel: Axes, lines: Sequence[Line]) -> None:
    """Room for the labels, and at least a decade and a half of time, or noise looks like a trend."""
    times = np.log10([max(line["ms_per_image"], 1e-6) for line in lines])
    middle, reach = (times.min() + times.max()) / 2, max((times.max() - times.min()) * 0.6, 0.75)
    panel.set_xlim(10 ** (middle - reach), 10 ** (middle + reach * 1.15))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    low, high = panel.get_ylim()
    panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _draw_front(panel: Axes, lines: Sequence[Line]) -> None:
    """A thin line through the ranked methods that no other beats on both axes."""
    ranked = sorted(
        ((line["ms_per_image"], -line["auc_d"]) for line in lines if line["status"] == "ok"),
    )
    front: list[tuple[float, float]] = []
    for time, loss in ranked:
        if not front or loss < front[-1][1]:
            front.append((time, loss))
    if len(front) > 1:
        x, y = [time for time, _ in front], [-loss for _, loss in front]
        panel.step(x, y, where="post", color="#AAAAAA", linewidth=1, linestyle=(0, (2, 2)), zorder=1,
                   label="no ranked method is both faster and better")  # fmt: skip
        panel.legend(
            loc="upper right", bbox_to_anchor=(1.0, -0.085), frameon=False, fontsize=8, borderaxespad=0
        )
