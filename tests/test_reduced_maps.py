"""`map_grid` of one explainer: its maps are reduced as soon as they are made, the others' are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import faithmap
from faithmap.errors import RequestError
from faithmap.registry import get


@pytest.fixture(scope="module")
def model() -> faithmap.Model:
    return faithmap.load_model("shapes/resnet")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("given", "cells"), [(8, (8, 8)), ("model", (12, 12)), (96, (96, 96))])
def test_maps_are_area_means(model: faithmap.Model, images: torch.Tensor, given: Any, cells: Any) -> None:
    whole = faithmap.explain(model, images, explainer="saliency")
    maps = faithmap.explain(model, images, explainer="saliency", map_grid=given)
    assert torch.allclose(maps, F.adaptive_avg_pool2d(whole[:, None], cells)[:, 0], atol=1e-6)


def test_coarser_maps_stay(model: faithmap.Model, images: torch.Tensor) -> None:
    whole = faithmap.explain(model, images, explainer="gradcam")
    assert torch.equal(faithmap.explain(model, images, explainer="gradcam", map_grid=40), whole)


def test_what_is_drawn_stays_the_same(model: faithmap.Model, images: torch.Tensor) -> None:
    whole = faithmap.explain(model, images, explainer="rise", n_masks=20)
    maps = faithmap.explain(model, images, explainer="rise", n_masks=20, map_grid=12)
    assert torch.allclose(maps, F.adaptive_avg_pool2d(whole[:, None], (12, 12))[:, 0], atol=1e-6)


def test_one_run_holds_both(tmp_path: Path) -> None:
    request = {
        "run": {"limit": 4, "own_nulls": [], "null_draws": 1, "threads": 1, "map_grid": "native"},
        "models": [{"name": "shapes/resnet"}],
        "datasets": [{"name": "shapes"}],
        "explainers": [{"name": "saliency"}, {"name": "saliency", "map_grid": 12}],
        "metrics": [{"name": "energy-pointing-game"}],
    }
    done = faithmap.run(request, out=tmp_path / "run", figures=False)
    rows = done.rows()
    values = (
        rows[(rows["metric"] == "energy_pg") & (rows["explainer"] == "saliency")]
        .groupby("params")["value"]
        .mean()
    )
    assert list(values.index) == ['{"abs":true,"map_grid":12}', '{"abs":true}']
    assert values.iloc[0] != values.iloc[1]
    assert {"saliency", "saliency[map_grid=12]"} <= set(done.leaderboard()["explainer"])
    assert set(rows["map_grid"]) == {"native"}


@pytest.mark.parametrize("given", [1, 0, -3, "native", 7.5, True])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match=r'map_grid: got .*expected "model" or a side of at least 2'):
        get("explainer", "saliency").check({"map_grid": given})


def test_only_explainers_have_it() -> None:
    with pytest.raises(RequestError, match="has no parameter 'map_grid'"):
        get("metric", "perturbation").check({"map_grid": 7})
