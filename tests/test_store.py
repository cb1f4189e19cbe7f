"""Run folders: atomic files, the lock, damage, and reading back."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from faithmap.errors import FaithmapError, RequestError
from faithmap.folders import publish, read_run, read_runs
from faithmap.records import Row
from faithmap.store import ESSENTIAL, KEY_COLUMNS, RunStore


def row(image: str = "a", metric: str = "auc_d", value: float | None = 1.5, **changes: object) -> Row:
    fields = {
        "model": "m", "dataset": "d", "explainer": "e", "params": "{}", "map_grid": "model", "seed": 0,
        "spec": "perturbation/1", "image_id": image, "label": 1, "predicted": 2, "target": 2,
        "metric": metric, "value": value, "status": "ok", "reason": "", "curve": (1.0, 0.5),
    }  # fmt: skip
    return Row(**{**fields, **changes})  # type: ignore[arg-type]


def manifest(**identity: object) -> dict[str, object]:
    whole = {
        "seed": 0,
        "precision": "fp32",
        "map_grid": "model",
        "target": "predicted",
        "weights": {"m": "w"},
    }
    return {
        "identity": {**whole, **identity}, "models": {"m": {}}, "datasets": {"d": {}},
        "explainers": {"e": {}}, "metrics": [{"spec": "perturbation/1"}], "cells": ["cell"],
        "settings": {}, "request": {"models": ["m"], "datasets": ["d"], "explainers": ["e"]},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    made = RunStore(tmp_path / "run")
    made.create()
    made.write_manifest(manifest())
    return made


def test_rows_come_back_as_they_were_written(store: RunStore) -> None:
    store.write("cell", "one", [row("a"), row("b", value=None, status="failed", reason="broken", curve=None)])
    rows = store.rows()
    assert list(rows.columns) == list(Row.__dataclass_fields__)
    assert rows["value"].tolist()[0] == 1.5
    assert rows["value"].isna().tolist() == [False, True]
    assert list(rows["curve"][0]) == [1.0, 0.5]
    assert rows["reason"].tolist() == ["", "broken"]
    assert store.done(["cell", "none"]) == {
        "cell": {("a", "perturbation/1"), ("b", "perturbation/1")},
        "none": set(),
    }


def test_a_key_is_read_once(store: RunStore) -> None:
    store.write("cell", "one", [row("a")])
    store.write("cell", "two", [row("a"), row("b")])
    assert not store.rows().duplicated(KEY_COLUMNS).any()
    assert len(store.rows()) == 2


def test_half_written_files_are_neither_read_nor_kept(store: RunStore) -> None:
    store.write("cell", "one", [row("a")])
    leftover = store.rows_path / "cell" / "two.parquet.123.unfinished"
    leftover.write_bytes(b"PAR1 half")
    assert len(store.rows()) == 1
    store.clean()
    assert not leftover.exists()


def test_damage_is_named(store: RunStore) -> None:
    store.write("cell", "one", [row("a")])
    file = store.rows_path / "cell" / "one.parquet"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(FaithmapError, match=r"one\.parquet is damaged"):
        store.done(["cell"])
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(FaithmapError, match=r"manifest\.json is damaged"):
        store.manifest()
    whole = {key: kind() for key, kind in ESSENTIAL.items()}
    spoiled = [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    for content in ("{}", "[]", '{"identity": {}}', *spoiled, json.dumps({**whole, "cells": None})):
        (store.path / "manifest.json").write_text(content)
        with pytest.raises(FaithmapError, match=r"manifest\.json is no manifest of a run"):
            store.manifest()


def test_a_second_process_is_kept_out(store: RunStore) -> None:
    code = f"""
from faithmap.store import RunStore
from faithmap.errors import RequestError
try:
    with RunStore({str(store.path)!r}).locked():
        print("free")
except RequestError as error:
    print("held:", error)
"""
    with store.locked():
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    freed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held.stdout.startswith("held: another process is writing")
    assert freed.stdout == "free\n"


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match="is not empty and holds no run"):
        RunStore(tmp_path).create()
    with pytest.raises(RequestError, match=r"thesis\.tex \(it is a file\)"):
        RunStore(tmp_path / "thesis.tex").create()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_may_lie_beside_its_request(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]")
    RunStore(tmp_path).create()
    assert (tmp_path / "rows").is_dir() and (tmp_path / "run.toml").read_text() == "[run]"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RequestError, match="cannot write to"):
        RunStore(tmp_path / "run").create()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write to"):
        RunStore(tmp_path / "file" / "run").create()


def test_the_board_shows_the_cells_and_images_of_the_request(store: RunStore) -> None:
    store.write("cell", "one", [row("a"), row("b")])
    store.write("older", "one", [row("a", value=9.0)])
    (store.path / "images.json").write_text(json.dumps({"d": ["a"]}))
    rows, _ = read_run(store.path)
    assert rows["image_id"].tolist() == ["a"]
    assert rows["value"].tolist() == [1.5]


def test_runs_that_must_not_stand_together_are_refused(store: RunStore, tmp_path: Path) -> None:
    for key, value in (("seed", 1), ("precision", "bf16"), ("weights", {"m": "others"})):
        other = RunStore(tmp_path / key)
        other.create()
        other.write_manifest(manifest(**{key: value}))
        with pytest.raises(RequestError, match=key):
            read_runs([store.path, other.path])


def test_two_runs_make_one_board(store: RunStore, tmp_path: Path) -> None:
    store.write("cell", "one", [row("a")])
    other = RunStore(tmp_path / "other")
    other.create()
    other.write_manifest(
        {
            **manifest(),
            "explainers": {"f": {}},
            "request": {"models": ["m"], "datasets": ["d"], "explainers": ["f"]},
        }
    )
    other.write("cell", "one", [row("a", explainer="f")])
    rows, merged = read_runs([store.path, other.path])
    assert rows["explainer"].tolist() == ["e", "f"]
    assert merged["request"]["explainers"] == ["e", "f"]


def test_a_published_folder_is_a_run_folder(store: RunStore, tmp_path: Path) -> None:
    store.write("cell", "one", [row("a"), row("b")])
    rows, held = read_run(store.path)
    publish(rows, held, tmp_path / "published")
    again, _ = read_run(tmp_path / "published")
    assert again.drop(columns="curve").equals(rows.drop(columns="curve"))


def test_a_published_folder_keeps_the_curves_of_its_board(store: RunStore, tmp_path: Path) -> None:
    store.write(
        "cell", "one", [row(metric=name) for name in ("pos_auc", "ms_per_image", "pos_auc@probability")]
    )
    publish(*read_run(store.path), tmp_path / "published")
    again, _ = read_run(tmp_path / "published")
    kept = {line["metric"] for line in again.to_dict("records") if line["curve"] is not None}
    assert kept == {"pos_auc", "ms_per_image"} and len(again) == 3


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no run"):
        read_run(tmp_path)
