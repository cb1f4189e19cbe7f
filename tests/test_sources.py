"""Several runs on one board: whose rows they are, what is refused, and what their times are worth."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Typed

import slow_rows
from faithmap import leaderboard
from faithmap.errors import RequestError
from faithmap.folders import publish, read_runs
from faithmap.sources import edited, joined, sources, timed_alike

N = 24
OURS, THEIRS = "scan", "gradcam"


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


def test_both_runs_are_named_on_the_board(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, typed: Typed
) -> None:
    code, said = typed("leaderboard", *pair, "--out", tmp_path / "both")
    assert code == 0, said
    text = (tmp_path / "both" / "leaderboard.md").read_text()
    runs = re.findall(r"^- \*\*run\*\* of (.*?) on .*?, commit `(.)", text, re.MULTILINE)
    assert runs == [("`scan`, `random-grid`", "a"), ("`gradcam`, `random-grid`", "b")]
    assert "CPU Chip 9000" in text and "CPU Chip 7" in text and "- **faithmap**" not in text
    assert "```\nfaithmap run ours.toml\nfaithmap run theirs.toml\n```" in text
    # Put together once more, it is still known to be of these runs, each of which stands once.
    third = put(rows, manifest("gradcam++", commit="c" * 40), tmp_path / "third")
    _, merged = read_runs([tmp_path / "both", pair[1], third])
    assert [source["commit"][0] for source in sources(merged)] == ["a", "b", "c"]


def test_times_of_unlike_machines_are_not_set_side_by_side(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, typed: Typed
) -> None:
    _, said = typed("leaderboard", *pair, "--out", tmp_path / "both")
    assert "only times of one run can be compared" in (tmp_path / "both" / "leaderboard.md").read_text()
    assert not list((tmp_path / "both" / "figures").glob("cost-*"))
    costs = (tmp_path / "both" / "leaderboard.md").read_text().partition("### Cost")[2].partition("They")[0]
    assert "| `scan` |" in costs and "**" not in costs.partition("Forwards")[0]
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


def test_times_of_a_few_images_may_join_the_scores_of_all(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """`cost` times the first images alone: a run of nothing else holds fewer of them by its nature."""
    few = rows[rows["spec"] == "cost-1"]
    assert 0 < few["image_id"].nunique() < N
    timed = put(few, manifest(OURS), tmp_path / "timed")
    found, _ = read_runs([put(rows[rows["spec"] != "cost-1"], manifest(OURS), tmp_path / "scored"), timed])
    assert found[found["spec"] == "cost-1"]["image_id"].nunique() < found["image_id"].nunique() == N
    fewer = rows[rows["image_id"].isin(sorted(rows["image_id"].unique())[: N - 1])]
    with pytest.raises(
        RequestError, match=f"holds {N - 1} images of 'shapes'.*{N}, of which {N - 1} are the"
    ):
        read_runs([pair[0], put(fewer, manifest(OURS), tmp_path / "fewer")])


def test_a_run_that_took_no_times_mixes_none() -> None:
    one, two = manifest(OURS), manifest(THEIRS, cpu="")
    two["metrics"] = [entry for entry in two["metrics"] if entry["name"] != "cost"]
    assert timed_alike(one | {"sources": joined([one, two])})
    assert len(joined([one, one, two])) == 2


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


def of_other_weights(made: dict[str, Any]) -> None:
    made["identity"]["weights"] = {"shapes/resnet": "others"}


def of_other_images(made: dict[str, Any]) -> None:
    made["datasets"]["shapes"]["revision"] = "2"


def of_another_metric(made: dict[str, Any]) -> None:
    made["metrics"][2]["version"] = 2


def under_another_label(made: dict[str, Any]) -> None:
    made["explainers"]["ours"] = made["explainers"].pop(OURS)
    made["request"]["explainers"] = ["ours", THEIRS, "random-grid"]


def of_an_edited_plugin(made: dict[str, Any]) -> None:
    made["explainers"][OURS] |= {"built_in": False, "file_sha256": "11" * 32}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (of_other_weights, "was run with other weights of model 'shapes/resnet'"),
        (of_other_images, "has 'shapes' with revision = '2', an earlier folder with '1'"),
        (of_another_metric, "has metric 'drop' with version = 2, an earlier folder with 1"),
        (under_another_label, "calls 'ours' what an earlier folder calls 'scan'"),
        (of_an_edited_plugin, "has 'scan' from another state of its file"),
    ],
)
def test_what_must_not_stand_together_is_refused_and_nothing_is_touched(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, typed: Typed,
    change: Callable[[dict[str, Any]], None], sentence: str,
) -> None:  # fmt: skip
    """Whichever run is named first; a third that shares nothing with them must not hide it."""
    ours = copy.deepcopy(manifest(OURS))
    ours["identity"]["weights"] = {"shapes/resnet": "ours"}
    other = copy.deepcopy(manifest(OURS, THEIRS))
    change(other)
    first = put(rows, ours, tmp_path / "first")
    second = put(rows, other, tmp_path / "second")
    assert typed("leaderboard", *pair, "--out", tmp_path / "both")[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "both").rglob("*") if file.is_file()}
    code, said = typed("leaderboard", pair[1], first, second, "--out", tmp_path / "both")
    assert code == 2 and sentence in said
    assert {file: file.read_bytes() for file in before} == before


def test_a_board_does_not_overwrite_a_run(
    rows: pd.DataFrame, pair: tuple[Path, Path], tmp_path: Path, typed: Typed
) -> None:
    code, said = typed("leaderboard", *pair, "--out", pair[0])
    assert code == 2 and "is one of the runs; several make one board in a folder of its own" in said
    run = put(rows, manifest("gradcam++"), tmp_path / "run")
    held = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(held.replace('"published"', '"0123456789"'))
    code, said = typed("leaderboard", *pair, "--out", run)
    assert code == 2 and "holds a run of its own" in said


def test_a_run_without_rows_is_told(pair: tuple[Path, Path], tmp_path: Path, typed: Typed) -> None:
    (pair[0] / "images.json").write_text('{"shapes": []}')
    for file in (pair[0] / "rows").rglob("*.parquet"):
        file.unlink()
    code, said = typed("leaderboard", pair[0])
    assert code == 2 and "holds no rows yet; run it first" in said


def test_labels_that_look_like_numbers_or_markup_are_printed_as_they_are(
    rows: pd.DataFrame, tmp_path: Path, typed: Typed
) -> None:
    made = manifest(OURS)
    made["models"] = {"[1e3": made["models"]["shapes/resnet"]}
    made["datasets"] = {"[/01]": made["datasets"]["shapes"]}
    made["request"] = made["request"] | {"models": ["[1e3"], "datasets": ["[/01]"]}
    run = put(rows.assign(model="[1e3", dataset="[/01]"), made, tmp_path / "run")
    code, said = typed("leaderboard", run)
    assert code == 0 and "[1e3 on [/01]" in said


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
