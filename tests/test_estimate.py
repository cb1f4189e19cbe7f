"""Dry runs: what is left to compute, without anything being written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from small_runs import call

import faithmap
from faithmap.config import Config, load_config
from faithmap.errors import RequestError
from faithmap.estimate import DEAREST, estimate
from faithmap.plan import Task, make_grid, plan_tasks


def test_the_dry_run_writes_nothing(place: Path) -> None:
    done = call("small.toml", "--dry-run", "--out", "run", place=place)
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout and "forwarded" in done.stdout
    assert not (place / "run").exists() and not (place / "runs").exists()


def test_the_dry_run_leaves_out_what_is_stored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    config = load_config("small.toml")
    whole = estimate(config, "run")
    faithmap.run(config, out="run", figures=False)
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    done = estimate(config, "run")
    assert (done.stored, done.forwards, done.seconds) == (whole.units, 0, 0)
    assert done.units == whole.units and whole.stored == 0
    assert estimate(config, "run", fresh=True).forwards == whole.forwards
    # One explainer's rows are lost: it alone is due, with its moved maps.
    lost = {task.cell.key for task in tasks_of(config) if task.plugin.name == "gradcam"}
    for key in lost:
        shutil.rmtree(Path("run") / "rows" / key)
    left = estimate(config, "run")
    assert left.units - left.stored == len(lost) * whole.units // len(tasks_of(config))
    assert 0 < left.forwards < whole.forwards
    said = call("small.toml", "--dry-run", "--out", "run", place=place).stdout
    assert f"{left.stored} of them stored already; for the others about {left.forwards:,.0f} images" in said
    for file, content in before.items():
        assert file.parent.name in lost or file.read_bytes() == content
    with pytest.raises(RequestError, match="holds a run of seed = 0, asked for 5"):
        estimate(config.with_run(seed=5), "run")


def test_the_dry_run_refuses_a_folder_that_the_run_would_refuse(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    Path("thesis").mkdir()
    Path("thesis", "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RequestError, match="thesis is not empty and holds no run"):
            estimate(load_config("small.toml"), "thesis", fresh=fresh)


def test_the_dry_run_says_that_timings_are_not_in_its_figures(place: Path) -> None:
    timed = call("small.toml", "--dry-run", "--metrics", "cost", place=place)
    assert timed.stdout.startswith("cost times a few images of each cell"), timed.stderr
    assert "images forwarded" in timed.stdout
    scored = call("small.toml", "--dry-run", "--metrics", "drop", place=place)
    assert "cost" not in scored.stdout


def test_the_dry_run_names_the_dearest_of_many_lines(place: Path) -> None:
    few = call("small.toml", "--dry-run", place=place)
    assert "forwarded" in few.stdout and "dearest" not in few.stdout
    cheap = "gradcam,saliency,random,random-grid,centre"
    many = call("small.toml", "--dry-run", "--explainers", f"{cheap},rise[n_masks=20000]", place=place)
    shares = re.search(r"ms an image \(dearest: (.+)\)\n", many.stdout)
    assert shares is not None, many.stdout
    labels, percents = zip(*(item.rsplit(" ", 1) for item in shares[1].split(", ")), strict=True)
    values = [int(percent.removesuffix("%")) for percent in percents]
    assert labels[0] == "rise" and len(set(labels)) == DEAREST
    assert values == sorted(values, reverse=True) and 50 < values[0] and sum(values) <= 102


def tasks_of(config: Config) -> list[Task]:
    grid = make_grid(config)
    ((dataset, _),) = grid.datasets
    return plan_tasks(grid, grid.models[0], dataset)
