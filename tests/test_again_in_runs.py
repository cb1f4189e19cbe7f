"""Metrics that have to be named, in whole runs: stored rows, larger limits, other parts, and the board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hues import hue_images, hue_model

import faithmap
from faithmap import registry
from faithmap.data import part_of
from faithmap.errors import RequestError
from faithmap.records import Sample
from faithmap.store import KEY_COLUMNS

NAMED = ["max-sensitivity", "class-gap", "grid-pointing"]


@pytest.fixture(autouse=True)
def hues(own_plugins: None) -> None:
    """A dataset of fifty plain images, known while a test runs."""

    @registry.dataset(version=1, source="a test", license="CC0", revision="1")
    def hues() -> list[Sample]:
        """Images of one colour each."""
        images, labels = hue_images(50)
        return [Sample(f"hue-{i}", images[i], int(labels[i])) for i in range(50)]


def config(limit: int, **run: Any) -> dict[str, Any]:
    return {
        "run": {"limit": limit, "part": "all", "batch_size": 4, "device": "cpu", "threads": 1,
                "map_grid": "native", "own_nulls": [], **run},
        "datasets": ["hues"],
        "explainers": ["gradcam", "random"],
        "metrics": NAMED,
    }  # fmt: skip


def run(out: Path, limit: int, fixed: bool = False, **settings: Any) -> pd.DataFrame:
    done = faithmap.run(config(limit, **settings), models=[hue_model(fixed)], out=out, figures=False)
    return done.rows().sort_values(KEY_COLUMNS, ignore_index=True)


@pytest.mark.parametrize("fixed", [False, True], ids=["any-size", "one-size"])
def test_a_larger_limit_only_adds_rows(tmp_path: Path, fixed: bool) -> None:
    small = run(tmp_path / "grown", 6, fixed)
    grown, fresh = run(tmp_path / "grown", 10, fixed), run(tmp_path / "fresh", 10, fixed)
    assert len(small) < len(grown) == len(fresh)
    assert not (fresh["status"] == "failed").any()
    for rows in (grown, small):
        both = rows.merge(fresh, on=KEY_COLUMNS, suffixes=("", "_fresh"))
        assert len(both) == len(rows)
        assert (both["value"] - both["value_fresh"]).abs().max() < 1e-4
        assert (both["status"] == both["status_fresh"]).all()
    values = fresh.groupby(["explainer", "metric"])["value"].mean()
    assert values["gradcam", "grid_pg"] > 99
    assert 15 < values["random", "grid_pg"] < 35
    assert values["random", "class_gap"] == values["random-grid", "class_gap"] == 0
    assert values["gradcam", "max_sensitivity"] > values["random", "max_sensitivity"] == 0


def test_a_part_sees_only_itself_and_agrees_with_the_whole(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 12)
    part = run(tmp_path / "part", 12, part="eval")
    assert {part_of(name) for name in part["image_id"]} == {"eval"}
    both = part.merge(whole, on=KEY_COLUMNS, suffixes=("", "_whole"))
    assert both["image_id"].nunique() > 4
    assert (both["value"] - both["value_whole"]).abs().max() < 1e-4


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    run(tmp_path / "run", 6)
    model = hue_model()
    with model.counting() as meter:
        faithmap.run(config(6), models=[model], out=tmp_path / "run", figures=False)
    assert meter.forwards == 0


def test_columns_stand_behind_the_fixed_ones_and_none_is_ranked_by(tmp_path: Path) -> None:
    done = faithmap.run(config(6), models=[hue_model()], out=tmp_path / "run", figures=False)
    columns = [name for name in done.leaderboard().columns if not name.endswith(("_low", "_high", "_z"))]
    named = ["max_sensitivity", "class_gap", "class_gap_prob", "grid_pg"]
    start = columns.index(named[0])
    assert columns[start : start + 4] == named
    assert columns.index("peak_mb") < start < columns.index("rank")


def test_a_request_without_metrics_has_none_of_them(tmp_path: Path) -> None:
    plain = {key: value for key, value in config(4).items() if key != "metrics"}
    rows = faithmap.run(plain, models=[hue_model()], out=tmp_path / "run", figures=False).rows()
    assert "auc_d" in set(rows["metric"])
    scores = {score for name in NAMED for score in registry.get("metric", name).facts.scores}
    assert not scores & set(rows["metric"])


def test_maps_alone_are_refused() -> None:
    model = hue_model()
    images, _ = hue_images(2)
    for name in NAMED:
        with pytest.raises(RequestError, match="calls the explainer itself"):
            faithmap.score(model, images, images.mean(1), metrics=[name], labels=[0, 1])
