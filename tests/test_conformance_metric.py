"""The kit's checks of metrics: for each a metric that breaks one promise, and is told which."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from faithmap import conformance, registry
from faithmap._planted import IMAGES, planted_batch, planted_maps, planted_model, turned
from faithmap.batch import Batch, Scored
from faithmap.models import Model
from faithmap.perturb import removal_ranks

Score = Callable[[Model, Batch, Tensor], Any]
STREAM = torch.Generator()


pytestmark = pytest.mark.usefixtures("own_plugins")


def inside(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    """A well-behaved score: the share of the highest pixels that lie on the object, in percent."""
    assert batch.masks is not None
    best = removal_ranks(maps, batch.ties()) < 64
    values = 100.0 * (best & batch.masks.flatten(1)).sum(1) / best.sum(1)
    missing = ~batch.masks.flatten(1).any(1)
    reasons = ["no object" if here else "" for here in missing.tolist()]
    return {"inside": Scored(values.masked_fill(missing, torch.nan), reasons=reasons)}


def checked(score: Score, **facts: Any) -> tuple[conformance.Result, ...]:
    """The kit on a metric, with facts of a well-behaved one but for those given."""

    def planted(model: Model, batch: Batch, maps: Tensor) -> dict[str, Any]:
        """A metric that a test plants."""
        found: dict[str, Any] = score(model, batch, maps)
        return found

    facts = {
        "version": 1,
        "source": "a test",
        "scores": {"inside": "higher"},
        "needs": {"mask"},
        "bounds": {"inside": (0, 100)},
    } | facts
    registry.metric(name="planted", **facts)(planted)
    return conformance.check_metric(planted)


def failing(results: tuple[conformance.Result, ...]) -> dict[str, str]:
    return {result.check: result.message for result in results if result.status == "failed"}


def test_a_good_metric_passes_everything() -> None:
    results = checked(inside)
    assert {result.status for result in results} == {"passed"}, results
    assert [result.check for result in results] == conformance.check_names("metric")


# --- one broken promise each -------------------------------------------------------------------


def undeclared(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    found = inside(model, batch, maps)
    return {**found, "outside": found["inside"]}


def averaging(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {"inside": inside(model, batch, maps)["inside"].values.mean()}


def silent(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {"inside": torch.full((len(batch),), torch.nan)}


def empty(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {}


def raising(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    raise KeyError("masks")


def short_of_reasons(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    return {"inside": replace(inside(model, batch, maps)["inside"], reasons=[""])}


def one_curve(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    return {"inside": replace(inside(model, batch, maps)["inside"], curves=torch.zeros(10))}


def brightness(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {"inside": maps.flatten(1).mean(1)}


def made_up(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {"inside": inside(model, batch, maps)["inside"].values.nan_to_num(0.0)}


def unexplained(model: Model, batch: Batch, maps: Tensor) -> dict[str, Tensor]:
    return {"inside": inside(model, batch, maps)["inside"].values}


def failing_where_it_lacks(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    found = inside(model, batch, maps)
    if found["inside"].values.isnan().any():
        raise ValueError("no object")
    return found


def first_of_the_highest(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    found = inside(model, batch, maps)["inside"]
    assert batch.masks is not None
    best = maps.flatten(1).argmax(1, keepdim=True)
    hits = 100.0 * batch.masks.flatten(1).gather(1, best)[:, 0]
    return {"inside": replace(found, values=hits.masked_fill(found.values.isnan(), torch.nan))}


def relative(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    found = inside(model, batch, maps)["inside"]
    return {"inside": replace(found, values=found.values * (1 - 0.01 * len(batch)))}


def drawing(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    found = inside(model, batch, maps)["inside"]
    return {"inside": replace(found, values=found.values * (1 - torch.rand(1, generator=STREAM) / 100))}


def rectifying(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    maps.relu_()
    return inside(model, batch, maps)


def leaving_a_hook(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    model.layer().register_forward_hook(lambda *_: None)
    return inside(model, batch, maps)


def reseeding(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    torch.manual_seed(0)
    return inside(model, batch, maps)


def warning(model: Model, batch: Batch, maps: Tensor) -> dict[str, Scored]:
    warnings.warn("this will go away", FutureWarning, stacklevel=2)
    return inside(model, batch, maps)


BROKEN: list[tuple[str, Score, dict[str, Any], str]] = [
    ("check_facts", inside, {"scores": {"inside": "up"}}, "Say which way is better"),
    ("check_facts", inside, {"bounds": {"insde": (0, 100)}}, "Add it to scores="),
    ("check_facts", inside, {"fallback": {"inside": "share"}}, "fallback names 'share'"),
    ("check_scores", undeclared, {}, "the score 'outside' is returned"),
    ("check_scores", averaging, {}, "not their mean"),
    ("check_scores", silent, {}, "a NaN without a reason counts as a failure"),
    ("check_scores", empty, {}, "an empty dictionary"),
    ("check_scores", raising, {}, "KeyError"),
    ("check_scores", short_of_reasons, {}, "1 reasons for"),
    ("check_scores", one_curve, {}, "a curve for each image"),
    ("check_direction", inside, {"scores": {"inside": "lower"}}, "Turn the direction"),
    ("check_direction", brightness, {"needs": (), "bounds": {}}, "oracle 0.112, random 0.5"),
    ("check_bounds", inside, {"bounds": {"inside": (0, 1)}}, "Mend the formula or bounds="),
    ("check_undefined", made_up, {}, "a made-up number would enter the mean"),
    ("check_undefined", unexplained, {}, "without a reason"),
    ("check_undefined", failing_where_it_lacks, {}, "must not cost the others"),
    ("check_undefined", inside, {"needs": {"mask", "label"}}, "or drop the need"),
    ("check_ties", first_of_the_highest, {}, "removal_ranks"),
    ("check_batch", relative, {}, "no mean, rank or seed over the batch"),
    ("check_same_twice", drawing, {}, "seed_of"),
    ("check_inputs", rectifying, {}, "written to: maps"),
    ("check_model", leaving_a_hook, {}, "hooks changed"),
    ("check_model", reseeding, {}, "random state changed"),
    ("check_warnings", warning, {}, "FutureWarning: this will go away"),
]


@pytest.mark.parametrize(
    ("check", "score", "facts", "advice"),
    [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}-{i}") for i, case in enumerate(BROKEN)],
)
def test_a_broken_promise_is_told_by_its_check_alone(
    check: str, score: Score, facts: dict[str, Any], advice: str
) -> None:
    found = failing(checked(score, **facts))
    assert set(found) == {check}, found
    assert advice in found[check]


def test_every_check_has_a_metric_that_breaks_it() -> None:
    assert {case[0] for case in BROKEN} == set(conformance.check_names("metric"))


def test_metrics_that_call_the_explainer_are_spared_the_order() -> None:
    results = {result.check: result for result in conformance.check_metric("cost")}
    assert results["check_direction"].status == results["check_ties"].status == "skipped"
    assert results["check_scores"].status == "passed"


# --- the planted truth -------------------------------------------------------------------------


def test_the_planted_model_reads_its_patch() -> None:
    model = planted_model()
    batch = planted_batch(model)
    assert batch.labels is not None and batch.masks is not None
    assert torch.equal(batch.predicted, batch.labels)
    confidence = batch.logits.softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert bool((confidence > 0.8).all()) and bool((confidence < 0.95).all())
    gone = batch.images.masked_fill(batch.masks[:, None], 0.0)
    assert model(gone).argmax(1).tolist() == [0] * IMAGES
    alone = batch.images * batch.masks[:, None]
    surer = model(alone).softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert bool((surer > confidence).all())


def test_all_turned_is_the_same_question() -> None:
    model = planted_model()
    batch = planted_batch(model)
    maps = planted_maps(batch)["tied"]
    other, back = turned(batch, maps)
    torch.testing.assert_close(other.logits, batch.logits, rtol=1e-5, atol=1e-5)
    assert other.masks is not None and batch.masks is not None and other.boxes is not None
    assert torch.equal(other.masks.flip(1, 2), batch.masks)
    assert torch.equal(replace(other, masks=None).region(), other.masks)
    assert torch.equal(back.flip(1, 2), maps)
    assert bool(batch.masks.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True)).all())
