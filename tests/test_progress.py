"""What is told of how a run and a fit go on."""

from __future__ import annotations

import io

import pytest

from faithmap import progress
from faithmap.progress import FitLines, Lines


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    monkeypatch.setattr(progress.time, "monotonic", turned)
    return turned


def test_the_time_left_of_a_fit_is_told_once_there_is_a_pace(clock: Clock) -> None:
    log = io.StringIO()
    lines = FitLines(log)
    lines.begin("scan", 100, 0)
    clock.now += 0.001  # the first step was made before the clock started
    lines.step(1, {"loss": 0.5})
    for step in range(2, 11):
        clock.now += 2
        lines.step(step, {"loss": 0.5})
    said = log.getvalue().splitlines()
    assert said[:2] == ["scan: 100 steps", "1/100 loss 0.5"]
    # 10 seconds for 6 steps, and 94 steps are left.
    assert said[2] == f"6/100 loss 0.5, {progress.clock(94 * 10 / 6)} left"


def test_the_time_left_of_a_run_counts_what_this_run_has_done(clock: Clock) -> None:
    log = io.StringIO()
    lines = Lines(log, every=0)
    lines.begin(10, 5)
    lines.group("shapes/vit", "shapes")
    clock.now += 1
    lines.unit("gradcam", 16, 1.0)
    clock.now += 3
    lines.unit("rise", 16, 3.0)
    clock.now += 0.1
    for _ in range(3):
        lines.unit("scan", 16, 1.0)
    said = log.getvalue().splitlines()
    assert said[0] == "10 units, 5 of them done before"
    assert said[1] == "6/10 shapes/vit, shapes, gradcam: 16 images/s"
    assert said[2].endswith("images/min, 0:06 left")
    assert said[-1].startswith("10/10") and said[-1].endswith(", 0:00 left")
