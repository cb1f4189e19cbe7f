"""Explaining once more: the same explainer, seeds, fit and view, and failures of single images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_batch, make_cnn
from torch import Tensor

import slow_rows
from faithmap import evidence
from faithmap.again import explain_again, failures, for_classes, with_images
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, bind, judge
from faithmap.models import Model
from faithmap.plugin import Plugin
from faithmap.records import Facts, Spec
from faithmap.registry import get
from faithmap.scoring import MetricUse, project, score_maps, use_metric


def batch_with(name: str, model: Model | None = None, **params: Any) -> Batch:
    """A batch that comes with an explainer, as in a run."""
    plugin = get("explainer", name)
    batch = make_batch(model or make_cnn(), grid=(4, 4))
    return replace(batch, explainer=bind(plugin, plugin.check(params)))


def test_the_same_images_and_classes_give_the_same_maps_on_the_run_s_grid(model: Model) -> None:
    batch = batch_with("gradcam", model)
    assert batch.explainer is not None
    first = project(batch.explainer(model, batch), batch)
    for other in (with_images(batch, batch.images), for_classes(batch, batch.targets)):
        found = explain_again(model, other, "toy")
        assert found.maps.shape == (4, 32, 32)
        torch.testing.assert_close(found.maps, first, rtol=0, atol=1e-5)
        assert found.status == ["ok"] * 4


def test_a_refusal_costs_the_maps_and_not_the_run(model: Model) -> None:
    def only_small(_: Model, batch: Batch) -> Tensor:
        if batch.size != (32, 32):
            raise RequestError("statistics of features (6, 8, 8), the images have (6, 16, 16)")
        return batch.images.mean(1)

    batch = replace(make_batch(model), explainer=only_small)
    found = explain_again(model, with_images(batch, torch.rand(4, 3, 64, 64)), "toy")
    assert found.status == ["failed"] * 4 and found.maps.shape == (4, 64, 64)
    assert set(failures(found, "the mosaic").values()) == {
        "the mosaic: statistics of features (6, 8, 8), the images have (6, 16, 16)"
    }
    with pytest.raises(RequestError, match="only maps were given"):
        explain_again(model, make_batch(model), "toy")


@pytest.mark.parametrize(
    ("name", "params"),
    [("random", {}), ("random-grid", {"draw": 1}), ("rise", {"n_masks": 8}), ("lime", {"n_samples": 12})],
)
def test_random_numbers_are_those_of_the_first_maps(name: str, params: dict[str, Any]) -> None:
    """Whether an explainer draws from the batch's generators or, per image, from the global state."""
    batch = batch_with(name, **params)
    model = batch.context.model
    once = explain_again(model, with_images(batch, batch.images), "toy").maps
    again = explain_again(model, with_images(batch, batch.images), "toy").maps
    assert torch.equal(once, again)
    if name.startswith("random"):
        other = explain_again(model, with_images(batch, 1 - batch.images), "toy").maps
        assert torch.equal(once, other), "the draws belong to the id, not to the pixels"


def test_global_random_numbers_are_those_of_the_first_maps_too() -> None:
    def careless(model: Model, batch: Batch) -> Tensor:
        return torch.rand(len(batch), 4, 4)

    facts = Facts(kind="explainer", name="careless", version=1, source="here", per_image=True)
    batch = replace(make_batch(make_cnn()), explainer=bind(Plugin(facts, careless, None, "test"), {}))
    model = batch.context.model
    once = explain_again(model, batch, "toy").maps
    assert torch.equal(explain_again(model, with_images(batch, 1 - batch.images), "toy").maps, once)


def test_other_images_share_nothing_with_the_first_and_other_classes_share_all() -> None:
    batch = batch_with("gradcam")
    _ = batch.logits, batch.ties()
    images = with_images(batch, batch.images.flip(3), grid=(2, 2))
    assert images.context is not batch.context and not images.cache
    assert images.grid == (2, 2) and images.ids == batch.ids and images.explainer is batch.explainer
    classes = for_classes(batch, torch.zeros(4, dtype=torch.long))
    with batch.context.model.counting() as meter:
        _ = classes.logits
    assert meter.forwards == 0
    assert classes.ties() is batch.ties()


def test_one_failure_costs_one_image_and_is_named() -> None:
    batch = make_batch(make_cnn())

    def fragile(model: Model, some: Batch) -> Tensor:
        if "image-2" in some.ids:
            raise ArithmeticError("no map today")
        maps = some.images.mean(1)
        maps[0] = maps[0] if len(some) > 1 or some.ids[0] != "image-1" else 0.5
        return maps

    found = explain_again(batch.context.model, replace(batch, explainer=fragile), "toy")
    assert found.status == ["ok", "empty", "failed", "ok"]
    assert failures(found, "the other map") == {2: "the other map: ArithmeticError: no map today"}


def test_maps_alone_cannot_be_made_again() -> None:
    batch = make_batch(make_cnn())
    with pytest.raises(RequestError, match="metric 'toy' calls the explainer, but only maps were given"):
        explain_again(batch.context.model, batch, "toy")


def test_a_metric_may_say_that_a_score_failed() -> None:
    """It stands below what became of the map itself, and above a note of the map's explainer."""

    def metric(model: Model, batch: Batch, maps: Tensor) -> dict[str, Any]:
        values = torch.tensor([1.0, torch.nan, torch.nan, torch.nan])
        return {
            "s": Scored(values, reasons=["", "", "", "undefined"], failed=dict.fromkeys((1, 2, 3), "why"))
        }

    facts = Facts(kind="metric", name="toy", version=1, source="here", scores={"s": "higher"})
    use = MetricUse(Plugin(facts, metric, None, "test"), {}, metric, "toy/1", "")
    batch = make_batch(make_cnn())
    maps = MapSet(torch.rand(4, 3, 3), ["ok", "ok", "failed", "ok"], ["", "a note", "broken", ""])
    for found in (
        score_maps(use, batch.context.model, batch, maps),
        score_maps(use, batch.context.model, batch, judge(maps.maps)),
    ):
        assert found[0].values == [1.0, None, None, None]
        assert found[0].status[:2] == ["ok", "failed"]
        assert found[0].status[3] == "skipped"
        assert found[0].reasons[1] == "why" and found[0].reasons[3] == "undefined"
    assert score_maps(use, batch.context.model, batch, maps)[0].reasons[2] == "broken"


def test_where_nothing_may_stand_in_a_failed_map_has_no_value() -> None:
    rows = slow_rows.Rows()
    for image in range(3):
        for explainer, value in (("scan", 5.0), ("random-grid", 0.0)):
            status = "failed" if (explainer, image) == ("scan", 1) else "ok"
            given = None if status == "failed" else value
            for score in ("alone", "usual"):
                params = '{"draw":0}' if explainer == "random-grid" else "{}"
                rows.add(explainer, f"img{image}", score, given, "toy-1", status, params, "broken")
    manifest = slow_rows.manifest(methods=("scan",), controls=("random-grid",), images=3)
    manifest["metrics"] = [
        {"name": "toy", "spec": "toy-1", "params": {}, "version": 1, "fill": None,
         "scores": {"alone": "lower", "usual": "lower"}, "fallback": {"alone": ""}}
    ]  # fmt: skip
    (cell,) = evidence.read_evidence(pd.DataFrame(rows.rows), manifest)
    assert cell.score("scan", "usual").tolist() == [5, 0, 5]
    assert np.isnan(cell.score("scan", "alone")).tolist() == [False, True, False]
    assert cell.failed["scan"] == 1


def test_the_manifest_keeps_that_nothing_stands_in() -> None:
    from faithmap.provenance import describe_metric

    use = use_metric(Spec("energy-pointing-game", {"region": "box"}))
    assert describe_metric(use)["fallback"] == {"energy_pg@box": "object_share@box"}
    facts = replace(use.plugin.facts, fallback={"energy_pg": ""})
    alone = replace(use, plugin=replace(use.plugin, facts=facts))
    assert describe_metric(alone)["fallback"] == {"energy_pg@box": ""}
