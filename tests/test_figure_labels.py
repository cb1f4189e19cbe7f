"""Labels beside points: each is written once, none covers another, and the figure holds them all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from faithmap.report._labels import _extent, _overlap, place_labels


def labels_of(count: int, spread: float) -> tuple[Figure, list[Annotation]]:
    """A figure with points around one time, whose values are so far apart in all."""
    figure = Figure(figsize=(9, 4.5), dpi=100)
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set(xscale="log", xlim=(0.01, 1000), ylim=(0, 60))
    points = [(100 * 1.01**i, 30 + spread * i / count) for i in range(count)]
    names = [f"scorecam++ (variant {i})" for i in range(count)]
    place_labels(panel, names, points, [(y - 5, y + 5) for _, y in points], ["black"] * count)
    found = [text for text in panel.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in found) == sorted(names)
    return figure, found


@pytest.mark.parametrize(("count", "spread"), [(1, 0.0), (6, 20.0), (18, 3.0)])
def test_labels_do_not_cover_each_other(count: int, spread: float) -> None:
    figure, labels = labels_of(count, spread)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [_extent(label, renderer) for label in labels]
    # In square points, as the module counts; a tenth of a word at most.
    covered = [_overlap(a, b) * (72 / 100) ** 2 for a, b in itertools.combinations(boxes, 2)]
    assert max(covered, default=0.0) < 60
    width, height = figure.get_size_inches() * figure.dpi
    edges = np.array([[box.x0, box.y0, width - box.x1, height - box.y1] for box in boxes])
    assert edges.min() >= 0


def test_a_crowd_is_listed_beside_the_panel_from_the_top() -> None:
    figure, labels = labels_of(18, 3.0)
    (panel,) = figure.axes
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    right = panel.get_window_extent(renderer).x1
    aside = [label for label in labels if _extent(label, renderer).x0 > right]
    assert len(aside) > 6 and figure.get_figwidth() > 9
    heights = [_extent(label, renderer).y0 for label in aside]
    assert np.diff([label.xy[1] for label in sorted(aside, key=lambda label: label.xyann[1])]).min() >= 0
    assert len(set(heights)) == len(heights)


def test_a_label_with_room_stays_where_its_point_is() -> None:
    figure, (label,) = labels_of(1, 0.0)
    assert figure.get_figwidth() == 9
    assert label.arrow_patch is not None and not label.arrow_patch.get_visible()
