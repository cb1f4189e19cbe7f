"""The class gap against its definition, and on models whose classes rest on known pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import slow_metrics as slow
import slow_metrics_removal as removal
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import bind, explain_batch
from faithmap.models import Model
from faithmap.perturb import STEPS, make_fill
from faithmap.records import Spec
from faithmap.registry import default_metrics, get
from faithmap.scoring import project, score_maps, use_metric

SIDE = 12
NAMES = ("class_gap", "class_gap@probability")
Explain = Callable[[Model, Batch], Tensor]


def score(batch: Batch, explainer: str | Explain, **params: Any) -> dict[str, Scored]:
    """The scores of an explainer's maps, as in a run."""
    if isinstance(explainer, str):
        explainer = bind(get("explainer", explainer), get("explainer", explainer).parameters)
    batch, model, plugin = (
        replace(batch, explainer=explainer),
        batch.context.model,
        get("metric", "class-gap"),
    )
    maps = project(explainer(model, batch).float(), batch)
    found: dict[str, Scored] = plugin.make(plugin.check(params))(model, batch, maps)
    return found


class TwoPatchSums(nn.Module):
    """Two classes, each a weighted sum of the brightness of 4 x 4 patches."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.weights = nn.Buffer(torch.stack([first, second]))

    def forward(self, images: Tensor) -> Tensor:
        patches = F.adaptive_avg_pool2d(images.mean(1), 4)
        return torch.einsum("byx,kyx->bk", patches, self.weights)


def evidence(model: Model, batch: Batch) -> Tensor:
    """The weights of the class explained: the truth."""
    weights = model.module.weights[batch.targets]  # type: ignore[index]
    return weights.repeat_interleave(4, 1).repeat_interleave(4, 2)


def halves() -> Batch:
    """The first class rests on the upper half of a white image, the second on the lower one."""
    first = torch.linspace(0.6, 2.0, 16).view(4, 4).flip(0)
    first[2:] = 0
    second = 0.9 * first.flip(0)
    model = Model(TwoPatchSums(first, second), mean=0.0, std=1.0, input_size=16, family="cnn")
    return slow.batch_of(model, torch.ones(1, 3, 16, 16), grid=(4, 4))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["black", "mean", "blur"]))
def test_it_is_its_definition(seed: int, fill: str) -> None:
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = slow.random_images(2, SIDE, seed)
    batch = slow.batch_of(model, images, grid=(6, 6))
    found = score(batch, "input-x-gradient", fill=fill)
    call = bind(get("explainer", "input-x-gradient"), get("explainer", "input-x-gradient").parameters)
    logits, colours = model(images), make_fill(fill, images)
    assert colours is not None
    for i in range(2):
        order = logits[i].argsort(descending=True)
        areas = []
        for target in order[:2]:
            single = replace(batch.select([i]), targets=target.view(1))
            values = project(call(model, single), single)[0]
            areas.append(
                removal.auc_d(
                    model, images[i], int(order[0]), values, batch.ties()[i],
                    colours[i].expand(3, SIDE, SIDE), STEPS,
                )
            )  # fmt: skip
        for reading in ("", "@probability"):
            expected = areas[0][reading] - areas[1][reading]
            assert found[f"class_gap{reading}"].values[i].item() == pytest.approx(expected, abs=1e-3)


def test_the_true_maps_of_two_classes_are_far_apart() -> None:
    """The map of the second class removes its own half first, which only makes the first surer."""
    batch = halves()
    true, turned = score(batch, evidence), score(batch, lambda m, b: -evidence(m, b))
    for name in NAMES:
        assert float(true[name].values) > 30
        assert float(turned[name].values) < -30
    # Known on the way: with its evidence gone first the prediction falls at once, else only at the end.
    assert float(score(batch, evidence, span=1.0, steps=2)["class_gap"].values) == pytest.approx(100.0)


def test_of_another_class_than_the_predicted_one_its_probability_alone_tells() -> None:
    """The agreement curve is the prediction's: by it the true map of the second class would look worst."""
    batch = halves()
    second = replace(batch, targets=1 - batch.targets)
    found = score(second, evidence)
    assert bool(found["class_gap"].values.isnan().all())
    assert found["class_gap"].reasons == [
        "the map explains another class than the predicted one, whose curve this is"
    ]
    assert float(found["class_gap@probability"].values) > 30
    assert float(score(second, lambda m, b: -evidence(m, b))["class_gap@probability"].values) < -30


def test_a_map_that_knows_no_class_scores_zero_and_costs_no_pass(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))
    _ = batch.logits
    for name in ("random-grid", "eigencam", "centre"):
        warm = replace(batch, explainer=bind(get("explainer", name), get("explainer", name).parameters))
        assert warm.explainer is not None
        warm.explainer(cnn, warm)
        with cnn.counting() as meter:
            found = score(batch, name)
        assert meter.forwards == 0
        for scored in found.values():
            assert scored.values.tolist() == [0, 0, 0]


def test_images_whose_two_maps_are_equal_score_exactly_zero_beside_others(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))

    def partly(model: Model, some: Batch) -> Tensor:
        maps = some.images.mean(1)
        own = torch.tensor([name != "image-1" for name in some.ids]).float()
        return maps + (own * some.targets)[:, None, None] * maps.flip(2)

    for scored in score(batch, partly).values():
        assert scored.values[1].item() == 0
        assert not scored.values[0].isnan()


def test_the_runner_up_is_the_best_class_beside_the_target(cnn: Model) -> None:
    images = slow.random_images(3, 32)
    order = cnn(images).argsort(1, descending=True)
    seen: list[Tensor] = []

    def watching(model: Model, some: Batch) -> Tensor:
        seen.append(some.targets)
        return some.images.mean(1)

    score(slow.batch_of(cnn, images), watching)
    assert torch.equal(seen[1], order[:, 1])
    score(slow.batch_of(cnn, images, targets=order[:, 2]), watching)
    assert torch.equal(seen[3], order[:, 0])


def test_passes_are_counted_and_the_shared_ones_are_made_once(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    _ = batch.logits
    with cnn.counting() as meter:
        found = score(batch, "gradcam", steps=3)
    # Two directions of two maps at three steps; a graph for each of the two classes, the first of
    # which the clean pass has left behind.
    assert meter.forwards == 2 * (2 * 2 * 3 + 1)
    assert meter.backwards == 2 * 2
    assert not any(scored.values.requires_grad for scored in found.values())


def test_a_constant_map_of_the_runner_up_is_ranked_by_ties_and_a_failed_one_fails(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))
    first = batch.targets.clone()

    def moody(model: Model, some: Batch) -> Tensor:
        maps = some.images.mean(1)
        for i, name in enumerate(some.ids):
            again = int(some.targets[i]) != int(first[int(name[-1])])
            if again and name == "image-1":
                maps[i] = 0.5
            if again and name == "image-2":
                raise ArithmeticError("no second map")
        return maps

    own = replace(batch, explainer=moody)
    verdicts = score_maps(use_metric(Spec("class-gap")), cnn, own, explain_batch(moody, cnn, own))
    for verdict in verdicts:
        assert verdict.status == ["ok", "ok", "failed"]
        assert verdict.values[0] == 0
        assert verdict.reasons[2] == "the map of the runner-up class: ArithmeticError: no second map"


def test_an_image_scores_alike_in_any_company(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    together, alone = score(batch, "saliency", steps=4), score(batch.select([1]), "saliency", steps=4)
    name = "class_gap@probability"
    assert alone[name].values[0].item() == pytest.approx(together[name].values[1].item(), abs=0.05)


def test_a_single_class_has_no_runner_up() -> None:
    class One(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3)).unsqueeze(1)

    batch = slow.batch_of(slow.model_of(One(), SIDE), slow.random_images(2, SIDE))
    for scored in score(batch, "centre").values():
        assert scored.values.isnan().all()
        assert set(scored.reasons) == {"the model has no second class"}


def test_it_has_to_be_named() -> None:
    assert "class-gap" not in {plugin.name for plugin in default_metrics()}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"span": 1.5}, "metric 'class-gap', parameter 'span': got 1.5"),
        ({"steps": 0}, "metric 'class-gap', parameter 'steps': got 0"),
        ({"fill": "grey"}, "unknown fill 'grey'"),
    ],
)
def test_wrong_parameters_are_refused(cnn: Model, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(slow.batch_of(cnn, slow.random_images(1, 32)), "saliency", **params)


def test_maps_alone_cannot_be_asked(cnn: Model) -> None:
    plugin = get("metric", "class-gap")
    with pytest.raises(RequestError, match="only maps were given; name the explainer"):
        plugin.make(plugin.parameters)(
            cnn, slow.batch_of(cnn, slow.random_images(1, 32)), torch.rand(1, 32, 32)
        )
