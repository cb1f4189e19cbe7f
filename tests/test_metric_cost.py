"""The cost metric: cold contexts, counts, repetitions and rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import make_batch
from torch import Tensor

import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, explain_batch
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.registry import get
from faithmap.scoring import score_maps, use_metric

Explain = Callable[[Model, Batch], Tensor]


def score(batch: Batch, explain: Explain | None, **params: object) -> dict[str, Scored]:
    plugin = get("metric", "cost")
    batch = replace(batch, explainer=explain)
    found = plugin.make(plugin.check(params))(batch.context.model, batch, torch.zeros(len(batch), 32, 32))
    return {key: value if isinstance(value, Scored) else Scored(value) for key, value in found.items()}


def gradients(model: Model, batch: Batch) -> Tensor:
    """What a Grad-CAM computes: activations and gradients of the target layer."""
    return (batch.activations() * batch.gradients()).sum(1)


def six_forwards(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return (
            torch.stack([model(batch.images / k).sum(1) for k in range(1, 7)])
            .sum(0)
            .view(-1, 1, 1)
            .expand(-1, 4, 4)
        )


def nothing(model: Model, batch: Batch) -> Tensor:
    return batch.images.mean(1)


@pytest.fixture
def batch(cnn: Model) -> Batch:
    return slow.batch_of(
        cnn, slow.random_images(10, 32), labels=torch.zeros(10, dtype=torch.long), grid=(8, 8)
    )


@pytest.mark.parametrize(
    ("explain", "forwards", "backwards"), [(gradients, 1, 1), (six_forwards, 6, 0), (nothing, 0, 0)]
)
def test_passes_are_counted_on_a_cold_context(
    batch: Batch, explain: Explain, forwards: int, backwards: int
) -> None:
    _ = batch.logits, batch.activations(), batch.gradients()  # a warm context must not help
    found = score(batch, explain)
    assert list(found["forwards"].only or []) == list(range(8))
    assert found["forwards"].values[:8].tolist() == [forwards] * 8
    assert found["backwards"].values[:8].tolist() == [backwards] * 8


def test_repetitions_and_their_curves(batch: Batch) -> None:
    sizes: list[int] = []

    def explain(model: Model, some: Batch) -> Tensor:
        sizes.append(len(some))
        return nothing(model, some)

    found = score(batch.select(range(3)), explain)
    # A warm-up and 3 x 3 >= 7 timings alone, a warm-up and three timings of the whole batch.
    assert sizes == [1] + [1] * 9 + [3] + [3] * 3
    singles, whole = found["ms_per_image"], found["ms_per_image_batch"]
    assert singles.curves is not None
    assert singles.curves.shape == (3, 3)
    assert torch.equal(singles.values, singles.curves.median(1).values)
    assert whole.curves is not None
    assert whole.curves.shape == (3, 3)
    assert torch.equal(whole.values, whole.curves.median(1).values)
    assert len(set(whole.values.tolist())) == 1


def test_eight_images_of_a_larger_batch_are_timed_and_get_rows(batch: Batch) -> None:
    found = score(batch, nothing)
    assert found["ms_per_image"].curves is not None
    assert found["ms_per_image"].curves.shape == (10, 1)
    verdicts = score_maps(
        use_metric(Spec("cost")), batch.context.model, replace(batch, explainer=nothing),
        MapSet(torch.rand(10, 32, 32), ["ok"] * 10, [""] * 10),
    )  # fmt: skip
    assert {verdict.metric for verdict in verdicts} == {
        "ms_per_image",
        "ms_per_image_batch",
        "forwards",
        "backwards",
    }
    for verdict in verdicts:
        assert [verdict.status[i] for i in verdict.only] == ["ok"] * 8


def test_times_are_milliseconds_of_the_explainer_alone(batch: Batch) -> None:
    def explain(model: Model, some: Batch) -> Tensor:
        time.sleep(0.02)
        return nothing(model, some)

    found = score(batch.select(range(4)), explain, images=1, repetitions=3)
    assert 20 <= found["ms_per_image"].values[0].item() < 40
    assert 5 <= found["ms_per_image_batch"].values[0].item() < 10
    assert list(found["ms_per_image"].only or []) == [0]


def test_memory_is_left_out_where_the_device_does_not_say(batch: Batch) -> None:
    assert "peak_mb" not in score(batch, nothing, images=1, repetitions=1)


def test_hooks_flags_and_the_collector_are_restored(batch: Batch) -> None:
    model = batch.context.model

    def careless(model: Model, some: Batch) -> Tensor:
        model.layer().register_forward_hook(lambda *_: None)
        model.requires_grad_(False)
        return nothing(model, some)

    before = len(model.layer()._forward_hooks)
    score(batch, careless, images=1, repetitions=2)
    assert len(model.layer()._forward_hooks) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert gc.isenabled()


def test_a_failing_explainer_fails_loudly_and_leaves_the_collector_on(batch: Batch) -> None:
    def failing(model: Model, some: Batch) -> Tensor:
        raise ArithmeticError("no map today")

    with pytest.raises(ArithmeticError, match="no map today"):
        score(batch, failing)
    assert gc.isenabled()


def test_an_image_that_fails_leaves_the_measure_as_it_is(cnn: Model) -> None:
    """Eleven of twelve maps: eight are timed one by one, and the others with them, not one by one."""
    calls: list[int] = []

    def moody(model: Model, batch: Batch) -> Tensor:
        calls.append(len(batch))
        if "image-2" in batch.ids:
            raise ValueError("not this one")
        return gradients(model, batch)

    batch = replace(make_batch(cnn, count=12), explainer=moody)
    found = explain_batch(moody, cnn, batch)
    calls.clear()
    verdicts = {v.metric: v for v in score_maps(use_metric(Spec("cost")), cnn, batch, found)}
    assert calls.count(11) == 4 and set(calls) == {1, 11}
    timed = verdicts["ms_per_image"]
    assert list(timed.only) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert all(timed.status[i] == "ok" for i in timed.only)


def test_the_model_s_own_count_is_kept(batch: Batch) -> None:
    model = batch.context.model
    with model.counting() as meter:
        score(batch.select([0]), six_forwards, repetitions=2, batch_repetitions=5)
    assert meter.forwards == 6 * (1 + 2 + 1 + 5)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"images": 0}, "'images': got 0, expected 1 to 8"), ({"images": 9}, "'images': got 9"),
     ({"repetitions": 0}, "'repetitions': got 0, expected at least 1"),
     ({"batch_repetitions": 0}, "'batch_repetitions': got 0, expected at least 1")],
)  # fmt: skip
def test_wrong_parameters_are_refused(batch: Batch, params: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(batch, nothing, **params)


def test_maps_alone_cannot_be_timed(batch: Batch) -> None:
    with pytest.raises(RequestError, match="only maps were given; name the explainer"):
        score(batch, None)
