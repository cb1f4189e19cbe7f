"""Several runs on one board: whose rows they are, what is refused, and what their times are worth."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import slow_rows
from faithmap import cli, leaderboard
from faithmap.errors import RequestError
from faithmap.folders import publish, read_runs
from faithmap.sources import edited, sources, timed_alike

Typed = Callable[..., tuple[int, str]]
N = 24
OURS, THEIRS = "scan", "gradcam"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Type a command: its exit code and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        stream = io.StringIO()
        console = Console(file=stream, width=200)
        monkeypatch.setattr(cli, "OUT", console)
        monkeypatch.setattr(cli, "ERR", console)
        return cli.main([str(word) for word in words]), stream.getvalue()

    return run


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return slow_rows.run(images=N)


def manifest(*methods: str, **changes: Any) -> dict[str, Any]:
    """The manifest of a run of some methods and the null."""
    made = slow_rows.manifest(methods, ("random-grid",), images=N)
    identity = {"seed": 0, "precision": "fp32", "map_grid": "model", "target": "predicted", "weights": {}}
    settings = made["settings"] | {"device": "cpu", "threads": 2, "batch_size": 16}
    return made | {"identity": identity, "settings": settings, "cpu": "Chip 9000", "cells": []} | changes


def put(rows: pd.DataFrame, made: dict[str, Any], folder: Path) -> Path:
    """A published folder of those of the rows that the manifest names."""
    names = made["request"]["explainers"]
    publish(rows[rows["explainer"].isin(names) & (rows["params"] == "{}")], made, folder)
    return folder


@pytest.fixture
def pair(rows: pd.DataFrame, tmp_path: Path) -> tuple[Path, Path]:
    ours = manifest(OURS, commit="a" * 40, command="faithmap run ours.toml")
    theirs = manifest(THEIRS, commit="b" * 40, command="faithmap run theirs.toml", cpu="Chip 7")
    return put(rows, ours, tmp_path / "ours"), put(rows, theirs, tmp_path / "theirs")


def test_both_runs_are_named_on_the_board(pair: tuple[Path, Path], tmp_path: Path, typed: Typed) -> None:
    code, said = typed("leaderboard", *pair, "--out", tmp_path / "both")
    assert code == 0, said
    text = (tmp_path / "both" / "leaderboard.md").read_text()
    runs = re.findall(r"^- \*\*run\*\* of (.*?) on .*?, commit `(.)", text, re.MULTILINE)
    assert runs == [("`scan`, `random-grid`", "a"), ("`gradcam`, `random-grid`", "b")]
    assert "CPU Chip 9000" in text and "CPU Chip 7" in text and "- **faithmap**" not in text
    assert "```\nfaithmap run ours.toml\nfaithmap run theirs.toml\n```" in text
    # Put together once more, it is still known to be of three runs.
    _, merged = read_runs([tmp_path / "both", pair[1]])
    assert [source["commit"][0] for source in sources(merged)] == ["a", "b", "b"]


def test_times_of_unlike_machines_are_not_set_side_by_side(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, typed: Typed
) -> None:
    _, said = typed("leaderboard", *pair, "--out", tmp_path / "both")
    assert "only times of one run can be compared" in (tmp_path / "both" / "leaderboard.md").read_text()
    assert not list((tmp_path / "both" / "figures").glob("cost-*"))
    (line,) = [line for line in said.splitlines() if " scan " in line]
    fields = [field.strip() for field in line.split("│")]
    assert fields[1].startswith("1 (1–") and fields[-2] == ""

    alike = put(rows, manifest(THEIRS, commit="b" * 40), tmp_path / "alike")
    _, said = typed("leaderboard", pair[0], alike, "--out", tmp_path / "one-kind")
    assert "only times of one run" not in (tmp_path / "one-kind" / "leaderboard.md").read_text()
    assert list((tmp_path / "one-kind" / "figures").glob("cost-*"))
    (line,) = [line for line in said.splitlines() if " scan " in line]
    assert float(line.split("│")[-2]) > 0


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"cpu": "Chip 7"}, False),
        ({"cpu": ""}, False),
        ({"platform": "Darwin arm64"}, False),
        ({"settings": {"device": "cpu", "threads": 8}}, False),
        ({"settings": {"device": "cuda", "threads": 2}, "gpu": "Card 1"}, False),
    ],
)
def test_machines_are_told_apart(changes: dict[str, Any], alike: bool) -> None:
    one, two = manifest(OURS), manifest(THEIRS, **changes)
    assert timed_alike(one | {"sources": [*sources(one), *sources(two)]}) is alike


def test_cards_and_not_processors_count_on_a_gpu() -> None:
    cuda = {"settings": {"device": "cuda:0", "threads": 2}, "gpu": "Card 1, CUDA 13.0"}
    one, two = manifest(OURS, **cuda), manifest(THEIRS, **cuda, cpu="Chip 7")
    assert timed_alike(one | {"sources": [*sources(one), *sources(two)]})


def test_a_run_alone_says_what_it_said(rows: pd.DataFrame, tmp_path: Path) -> None:
    made = manifest(OURS)
    assert timed_alike(made) and timed_alike({**made, "cpu": ""})
    leaderboard.write_boards(rows, made, tmp_path, figures=False)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "- **faithmap** 0.1.0, commit" in text and "CPU Chip 9000" in text and "**run**" not in text


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("version", 2, "has 'scan' with version = 2, an earlier folder with 1"),
        ("params", {"alpha": 2}, "has 'scan' with params = {'alpha': 2}, an earlier folder with {}"),
        ("name", "scan-untrained", "has 'scan' with name = 'scan-untrained'"),
    ],
)
def test_one_label_for_two_things_is_refused(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, key: str, value: Any, sentence: str
) -> None:
    other = copy.deepcopy(manifest(OURS, THEIRS))
    other["explainers"][OURS][key] = value
    with pytest.raises(RequestError) as caught:
        read_runs([pair[0], put(rows, other, tmp_path / "other")])
    assert sentence in str(caught.value) and "labels of their own" in str(caught.value)


def test_each_cell_has_the_lines_that_a_run_was_asked_for(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = slow_rows.manifest([THEIRS], ("random-grid",), models=["net"], datasets=["photos"], images=N)
    other |= {"identity": manifest()["identity"], "cells": []}
    moved = rows.assign(model="net", dataset="photos")
    found, merged = read_runs([pair[0], put(moved, other, tmp_path / "elsewhere")])
    board = leaderboard.build_board(found, merged)
    cells = board.groupby(["model", "dataset"])["explainer"].agg(list).to_dict()
    assert cells == {
        ("shapes/resnet", "shapes"): [OURS, "random-grid"], ("net", "photos"): ["random-grid", THEIRS],
    }  # fmt: skip
    assert (board["status"] != "not ranked: no rows").all()


def test_an_edited_file_is_told(rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = copy.deepcopy(manifest(OURS, THEIRS))
    other["explainers"][OURS]["file_sha256"] = "11" * 32
    found, merged = read_runs([pair[0], put(rows, other, tmp_path / "other")])
    assert edited(merged) == [OURS]
    leaderboard.write_boards(found, merged, tmp_path / "board", figures=False)
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    assert "- **edited between the runs** (the file, not its version): `scan`; the run named first" in text
