"""Labels beside points that do not cover each other, by the simple means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg

_GAP = 7.0
_STEP = 13.0
#: How far a label may move away, in steps, and how much of it may lie on something else, in square points:
#: about half of what an error bar hides.
_MOST_STEPS, _MOST_HIDDEN = 2, 60.0


def place_labels(
    panel: Axes,
    texts: Sequence[str],
    points: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, float]],
    colours: Sequence[str],
) -> None:
    """Write a text beside each point (data coordinates), near and where nothing lies yet.

    `bars` are the vertical extents that labels keep clear of. Labels are set one by one from the
    top, each at the free place nearest to its point; one that had to move away gets a thin line. Those for
    which there is no free place stand in a column beside the panel, for which the figure grows.
    """
    figure = panel.figure
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer: RendererAgg = canvas.get_renderer()  # type: ignore[no-untyped-call]
    scale = figure.dpi / 72.0
    taken = [_obstacle(panel, x, bar, scale) for (x, _), bar in zip(points, bars, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: (-points[i][1], points[i][0]))
    crowded = [
        index for index in order
        if not _place(panel, renderer, texts[index], points[index], colours[index], taken, scale)
    ]  # fmt: skip
    if crowded:
        _set_aside(panel, renderer, [(texts[i], points[i], colours[i]) for i in crowded], scale)


def _set_aside(
    panel: Axes,
    renderer: RendererAgg,
    labels: Sequence[tuple[str, tuple[float, float], str]],
    scale: float,
) -> None:
    """Labels, from the top, in a column at the right of the panel, each with a line to its point."""
    figure, frame = panel.figure, panel.get_window_extent(renderer)
    assert isinstance(figure, Figure)
    wanted = [float(panel.transData.transform(point)[1]) - frame.y0 for _, point, _ in labels]
    step = min(_STEP * scale, frame.height / len(labels))
    # As near to the points' mean as the panel's height lets the whole column be.
    reach = step * (len(labels) - 1) / 2
    middle = min(max(sum(wanted) / len(wanted), reach), max(frame.height - reach, reach))
    widest = 0.0
    for place, (text, point, colour) in enumerate(labels):
        label = panel.annotate(
            text, point, xytext=(1.02, (middle + reach - place * step) / frame.height),
            textcoords="axes fraction", fontsize=8.5, color=colour, va="center", ha="left",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.6, "relpos": (0, 0.5),
                        "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip
        widest = max(widest, _extent(label, renderer).width / figure.dpi)
    # The figure grows and the panel keeps its size.
    held, before = panel.get_position(), figure.get_figwidth()
    figure.set_figwidth(before + widest + 0.2)
    share = before / figure.get_figwidth()
    panel.set_position((held.x0 * share, held.y0, held.width * share, held.height))


def _obstacle(panel: Axes, x: float, bar: tuple[float, float], scale: float) -> Bbox:
    (left, low), (_, high) = panel.transData.transform([(x, bar[0]), (x, bar[1])])
    half = 4.5 * scale
    return Bbox([[left - half, low - half], [left + half, high + half]])


def _place(
    panel: Axes, renderer: RendererAgg, text: str, point: tuple[float, float], colour: str,
    taken: list[Bbox], scale: float,
) -> bool:  # fmt: skip
    """Write it at the best place; False where too much of it would be hidden, and then it is not written."""
    frame = panel.get_window_extent(renderer)
    label = panel.annotate(
        text, point, xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=colour, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    )  # fmt: skip
    best: tuple[float, float, float, float, str, str] | None = None
    for cost, (x, y, side, rise) in enumerate(_places()):
        label.set(position=(x, y), ha=side, va=rise)
        box = _extent(label, renderer)
        outside = not (
            frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        )
        hidden = sum(_overlap(box, other) for other in taken) / (scale * scale) + 1e5 * outside
        badness = cost + 10.0 * hidden
        if best is None or badness < best[0]:
            best = (badness, hidden, x, y, side, rise)
    assert best is not None
    _, hidden, x, y, side, rise = best
    if hidden > _MOST_HIDDEN:
        label.remove()
        return False
    label.set(position=(x, y), ha=side, va=rise)
    if label.arrow_patch is not None:
        label.arrow_patch.set_visible(abs(x) + abs(y) > 1.5 * _GAP)
    box = _extent(label, renderer)
    taken.append(Bbox([[box.x0 - scale, box.y0 - scale], [box.x1 + scale, box.y1 + scale]]))
    return True


def _extent(label: Annotation, renderer: RendererAgg) -> Bbox:
    """The text's own extent in pixels, without that of the line to its point."""
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points with the alignment that goes with them, the most wanted first."""
    for ring in range(_MOST_STEPS + 1):
        rise = ring * _STEP
        for y in (rise, -rise) if ring else (0.0,):
            yield (_GAP + ring, y, "left", "center")
            yield (-_GAP - ring, y, "right", "center")
        yield (0.0, _GAP + rise, "center", "bottom")
        yield (0.0, -_GAP - rise, "center", "top")


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))
