"""From what metrics return to rows: projection, statuses, failures of single images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_batch, make_cnn
from torch import Tensor

from faithmap.batch import Batch, Scored
from faithmap.explaining import MapSet, bind, explain_batch, judge
from faithmap.models import Model
from faithmap.plugin import Plugin
from faithmap.records import Facts, Spec
from faithmap.registry import get
from faithmap.resize import reduce_to_grid, upsample
from faithmap.scoring import Heading, MetricUse, project, rows_of, score_maps, skip_rows, use_metric

HEADING = Heading("m", "d", "e", "{}", "model", 0)


def toy_metric(function: Callable[..., Any], scores: tuple[str, ...] = ("s",), **facts: Any) -> MetricUse:
    declared = Facts(
        kind="metric", name="toy", version=1, source="here", scores=dict.fromkeys(scores, "higher"), **facts
    )
    return MetricUse(Plugin(declared, function, None, "test"), {}, function, "toy/1", "")


def toy_explainer(function: Callable[..., Any], **facts: Any) -> Plugin:
    return Plugin(
        Facts(kind="explainer", name="toy", version=1, source="here", **facts), function, None, "test"
    )


def test_maps_are_reduced_by_area_mean_and_enlarged_bilinearly() -> None:
    batch = make_batch(make_cnn(), grid=(4, 4))
    fine = torch.rand(4, 16, 16)
    means = torch.stack(
        [fine[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2)) for i in range(4) for j in range(4)], 1
    ).view(4, 4, 4)
    assert torch.allclose(reduce_to_grid(fine, (4, 4)), means, atol=1e-6)
    assert torch.equal(project(fine, batch), upsample(reduce_to_grid(fine, (4, 4)), (32, 32)))
    # A map that is coarser than the grid is not made finer before it is enlarged.
    coarse = torch.rand(4, 2, 2)
    assert torch.equal(project(coarse, batch), upsample(coarse, (32, 32)))
    assert torch.equal(project(fine, replace(batch, grid=None)), upsample(fine, (32, 32)))


def test_maps_are_judged() -> None:
    maps = torch.rand(4, 3, 3)
    maps[1] = 0.5
    maps[2, 0, 0] = float("nan")
    maps[3, 1, 1] = float("inf")
    found = judge(maps)
    assert found.status == ["ok", "empty", "failed", "failed"]
    assert found.usable == [0]
    assert bool(torch.isfinite(found.maps).all())


def test_values_become_rows_with_status_and_reason() -> None:
    model = make_cnn()
    batch = make_batch(model)
    nan = float("nan")

    def metric(model: Model, batch: Batch, maps: Tensor) -> dict[str, Any]:
        return {"s": Scored(torch.tensor([1.0, nan, nan, 4.0]), reasons=["", "no object", "", ""], empty=[3])}

    use = toy_metric(metric)
    (verdict,) = score_maps(use, model, batch, judge(torch.rand(4, 3, 3)))
    assert verdict.status == ["ok", "skipped", "failed", "empty"]
    assert verdict.values == [1.0, None, None, None]
    assert verdict.reasons[1] == "no object"
    assert all(verdict.reasons[i] for i in (1, 2, 3))
    rows = rows_of(HEADING, use, batch, [verdict])
    assert [row.image_id for row in rows] == list(batch.ids)
    assert [row.predicted for row in rows] == batch.predicted.tolist()


def test_scores_of_the_image_alone_are_kept_whatever_became_of_the_map() -> None:
    model = make_cnn()
    batch = make_batch(model)

    def metric(model: Model, batch: Batch, maps: Tensor) -> dict[str, Any]:
        return {"s": torch.arange(4.0), "share": torch.arange(4.0)}

    use = toy_metric(metric, ("s", "share"), map_free=frozenset({"share"}))
    verdicts = {v.metric: v for v in score_maps(use, model, batch, judge(torch.ones(4, 3, 3)))}
    assert verdicts["s"].status == ["empty"] * 4
    assert verdicts["share"].values == [0.0, 1.0, 2.0, 3.0]


def test_a_metric_that_raises_costs_only_the_images_that_raise() -> None:
    model = make_cnn()
    batch = make_batch(model)

    def metric(model: Model, batch: Batch, maps: Tensor) -> dict[str, Any]:
        if "image-2" in batch.ids:
            raise ZeroDivisionError("nothing to divide by")
        return {"s": torch.ones(len(batch))}

    (verdict,) = score_maps(toy_metric(metric), model, batch, judge(torch.rand(4, 3, 3)))
    assert verdict.status == ["ok", "ok", "failed", "ok"]
    assert "ZeroDivisionError: nothing to divide by" in verdict.reasons[2]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"other": torch.ones(1)}, "does not declare"),
        ([1.0], "returned a list"),
        ({"s": torch.ones(7)}, "shape"),
    ],
)
def test_a_metric_that_breaks_its_contract_fails_with_a_reason(returned: Any, words: str) -> None:
    model = make_cnn()
    use = toy_metric(lambda model, batch, maps: returned)
    (verdict,) = score_maps(use, model, make_batch(model, 2), judge(torch.rand(2, 3, 3)))
    assert verdict.status == ["failed", "failed"]
    assert words in verdict.reasons[0]


def test_an_explainer_that_raises_costs_only_the_images_that_raise() -> None:
    model = make_cnn()

    def explain(model: Model, batch: Batch) -> Tensor:
        if "image-1" in batch.ids:
            raise ValueError("no map for this one")
        return torch.rand(len(batch), 5, 7)

    found = explain_batch(bind(toy_explainer(explain), {}), model, make_batch(model))
    assert found.status == ["ok", "failed", "ok", "ok"]
    assert found.reasons[1] == "ValueError: no map for this one"
    assert found.maps.shape == (4, 5, 7)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.rand(4, 1, 7), r"returned \(4, 1, 7\)|returned \(1, 1, 7\)"),
        (torch.rand(3, 5, 5), "returned"),
        ("a map", "returned a str"),
    ],
)
def test_maps_of_a_wrong_shape_fail_with_a_reason(returned: Any, words: str) -> None:
    model = make_cnn()
    found = explain_batch(bind(toy_explainer(lambda model, batch: returned), {}), model, make_batch(model))
    assert found.status == ["failed"] * 4
    import re

    assert re.search(words, found.reasons[0])


def test_models_come_back_as_they_were() -> None:
    model = make_cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def rough(model: Model, batch: Batch) -> Tensor:
        model.module.register_forward_hook(lambda *_: None)
        model.train()
        model(batch.images).sum().backward()
        next(model.parameters()).requires_grad_(False)
        return torch.rand(len(batch), 4, 4)

    explain_batch(bind(toy_explainer(rough), {}), model, make_batch(model))
    assert not model.module._forward_hooks
    assert not model.training and not model.module.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_global_random_state_is_forked_for_plugins_that_use_it() -> None:
    model = make_cnn()
    batch = make_batch(model)
    noisy = toy_explainer(lambda model, batch: torch.rand(len(batch), 4, 4), per_image=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = bind(noisy, {})(model, batch)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, bind(noisy, {})(model, batch))
    assert torch.equal(first[2:3], bind(noisy, {})(model, batch.select([2])))


def test_variants_are_named_apart() -> None:
    plain = use_metric(Spec("perturbation"))
    blurred = use_metric(Spec("perturbation", {"fill": "blur"}))
    assert plain.title("auc_d@label") == "auc_d@label"
    assert blurred.title("auc_d") == "auc_d@blur"
    assert blurred.title("auc_d@label") == "auc_d@label-blur"
    assert plain.spec != blurred.spec
    assert use_metric(Spec("perturbation", {"fill": "black"})).spec == plain.spec


def test_skip_rows_carry_the_reason_and_no_value() -> None:
    model = make_cnn()
    use = toy_metric(lambda *_: None)
    from faithmap.records import Sample

    rows = skip_rows(HEADING, use, [Sample("a", torch.zeros(3, 4, 4), 1)], "not for cnn")
    assert [(row.image_id, row.metric, row.value, row.status, row.reason) for row in rows] == [
        ("a", "s", None, "skipped", "not for cnn")
    ]
    assert model.meter.forwards == 0


def test_metrics_see_only_what_was_found() -> None:
    model = make_cnn()
    batch = make_batch(model, 2)
    use = MetricUse(get("metric", "perturbation"), {}, get("metric", "perturbation").make({}), "p/1", "")
    found = MapSet(torch.zeros(2, 4, 4), ["failed", "empty"], ["x", "y"])
    verdicts = score_maps(use, model, batch, found)
    assert all(verdict.values == [None, None] for verdict in verdicts)
    assert {tuple(verdict.status) for verdict in verdicts} == {("failed", "empty")}
