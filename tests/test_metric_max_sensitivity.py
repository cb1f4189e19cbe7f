"""Max-sensitivity against its definition, against captum, and on models where it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_batch, make_linear, pixel_weights
from torch import Tensor

import slow_metrics_again as slow
from faithmap.batch import Batch, Scored, seed_of
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import bind, explain_batch
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.registry import default_metrics, get
from faithmap.scoring import project, score_maps, use_metric

Explain = Callable[[Model, Batch], Tensor]


def explained(batch: Batch, name: str | Explain, **params: Any) -> Batch:
    """The batch with an explainer, as in a run."""
    if callable(name):
        return replace(batch, explainer=name)
    plugin = get("explainer", name)
    return replace(batch, explainer=bind(plugin, plugin.check(params)))


def score(batch: Batch, **params: Any) -> Scored:
    model, plugin = batch.context.model, get("metric", "max-sensitivity")
    assert batch.explainer is not None
    maps = project(batch.explainer(model, batch).float(), batch)
    found: dict[str, Scored] = plugin.make(plugin.check(params))(model, batch, maps)
    return found["max_sensitivity"]


@pytest.mark.parametrize("name", ["gradcam", "saliency", "input-x-gradient"])
def test_it_is_its_definition(model: Model, name: str) -> None:
    batch = replace(explained(make_batch(model, 3, grid=(4, 4)), name), seed=7)
    found = score(batch, samples=4, radius=0.05)
    for i in range(3):

        def explain(image: Tensor, i: int = i) -> Tensor:
            single = replace(batch.select([i]), images=image[None], context=Context(model, image[None]))
            assert batch.explainer is not None
            return project(batch.explainer(model, single), single)[0]

        image = batch.images[i]
        moves = slow.shifts(7, batch.ids[i], image.shape, 0.05, 4)
        expected = slow.sensitivity(explain, image, moves)
        assert found.curves is not None
        assert found.curves[i].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert found.values[i].item() == pytest.approx(max(expected), rel=2e-3, abs=1e-5)


def test_it_is_captum_s_on_the_same_shifts(cnn: Model) -> None:
    from captum.metrics import sensitivity_max

    batch = explained(make_batch(cnn, 3, grid=(8, 8)), "input-x-gradient")
    # No shift leaves [0, 1], where the two would differ.
    images = 0.1 + 0.8 * batch.images
    batch = replace(batch, images=images, context=Context(cnn, images))
    moves = torch.stack([torch.stack(slow.shifts(0, name, images.shape[1:], 0.02, 10)) for name in batch.ids])

    def attribute(inputs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor]:
        given = inputs[0] if isinstance(inputs, tuple) else inputs
        names = tuple(f"copy-{i}" for i in range(len(given)))
        some = replace(batch, images=given, targets=target, ids=names, context=Context(cnn, given))
        assert batch.explainer is not None
        return (project(batch.explainer(cnn, some), some),)

    theirs = sensitivity_max(
        attribute,
        batch.images,
        perturb_func=lambda inputs: inputs + moves.flatten(0, 1),
        n_perturb_samples=10,
        target=batch.targets,
    )
    ours = score(batch)
    assert float(theirs.min()) > 0.01
    torch.testing.assert_close(ours.values.float(), theirs.float(), rtol=1e-3, atol=1e-6)


def test_a_linear_model_is_known_in_closed_form() -> None:
    """Its gradient never moves; the image times the gradient moves by the shift times the gradient."""
    model = make_linear()
    images = 0.2 + 0.6 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.tensor([0, 2]), ("a", "b"), Context(model, images))
    assert score(explained(batch, "saliency")).values.tolist() == pytest.approx([0, 0], abs=1e-6)
    found, weights = score(explained(batch, "input-x-gradient"), radius=0.1), pixel_weights(model)
    for i, target in enumerate((0, 2)):
        weight = weights[target].double()
        first = torch.linalg.vector_norm((images[i] * weight).sum(0))
        moved = [
            torch.linalg.vector_norm((move.double() * weight).sum(0)) / first
            for move in slow.shifts(0, batch.ids[i], images.shape[1:], 0.1, 10)
        ]
        assert found.values[i].item() == pytest.approx(float(max(moved)), rel=1e-4)


def test_more_samples_only_raise_it_and_a_larger_ball_does_too(cnn: Model) -> None:
    batch = explained(make_batch(cnn, 3), "input-x-gradient")
    few, many = score(batch, samples=3), score(batch, samples=6)
    assert few.curves is not None and many.curves is not None
    assert torch.equal(few.curves, many.curves[:, :3])
    assert bool((many.values >= few.values).all())
    assert bool((score(batch, samples=3, radius=0.2).values > few.values).all())


@pytest.mark.parametrize(("name", "params"), [("random-grid", {"draw": 1}), ("random", {}), ("centre", {})])
def test_maps_that_ignore_the_image_do_not_move(cnn: Model, name: str, params: dict[str, Any]) -> None:
    assert score(explained(make_batch(cnn, 3), name, **params), samples=2).values.tolist() == [0, 0, 0]


def test_shifts_stay_in_the_ball_and_among_images(cnn: Model) -> None:
    seen: list[Tensor] = []

    def watching(model: Model, some: Batch) -> Tensor:
        seen.append(some.images)
        return some.images.mean(1)

    batch = explained(make_batch(cnn, 2), watching)
    score(batch, samples=3, radius=0.3)
    assert len(seen) == 4  # the map itself, and each sample
    for shifted in seen[1:]:
        assert 0 <= float(shifted.min()) and float(shifted.max()) <= 1
        assert 0.2 < float((shifted - batch.images).abs().max()) <= 0.3 + 1e-6
    assert not torch.equal(seen[1], seen[2])


def test_scale_does_not_matter_and_places_do(cnn: Model) -> None:
    def scaled(factor: float) -> Explain:
        return lambda model, some: factor * some.images.mean(1)

    batch = make_batch(cnn, 3)
    plain, large = (score(explained(batch, scaled(factor)), samples=3).values for factor in (1.0, 1e15))
    assert torch.allclose(plain, large)
    assert bool((plain > 0).all())


def test_an_image_scores_alike_in_any_company(model: Model) -> None:
    batch = explained(make_batch(model, 3), "saliency")
    together, alone = score(batch, samples=3), score(batch.select([1]), samples=3)
    assert alone.values[0].item() == pytest.approx(together.values[1].item(), rel=1e-2, abs=1e-4)


def test_a_map_that_fails_on_a_shifted_image_is_a_failure_with_a_reason(cnn: Model) -> None:
    batch = make_batch(cnn, 3)
    first = batch.images.clone()

    def fragile(model: Model, some: Batch) -> Tensor:
        maps = some.images.mean(1)
        for i, name in enumerate(some.ids):
            if name == "image-1" and not torch.equal(some.images[i], first[1]):
                raise ArithmeticError("not this one")
        return maps

    own = explained(batch, fragile)
    use = use_metric(Spec("max-sensitivity", {"samples": 2}))
    (verdict,) = score_maps(use, cnn, own, explain_batch(fragile, cnn, own))
    assert verdict.status == ["ok", "failed", "ok"]
    assert verdict.reasons[1] == "the map of a shifted image: ArithmeticError: not this one"
    assert verdict.values[1] is None and verdict.curves[1] is None


def test_nothing_stands_in_and_it_has_to_be_named() -> None:
    facts = get("metric", "max-sensitivity").facts
    assert facts.fallback == {"max_sensitivity": ""}
    assert "max-sensitivity" not in {plugin.name for plugin in default_metrics()}
    assert seed_of(0, "max-sensitivity", "a") != seed_of(1, "max-sensitivity", "a")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"radius": 0.0}, "'radius': got 0.0, expected a number above 0, up to 1"),
        ({"radius": float("nan")}, "'radius': got nan"),
        ({"samples": 0}, "'samples': got 0, expected at least 1"),
    ],
)
def test_wrong_parameters_are_refused(cnn: Model, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(explained(make_batch(cnn, 1), "centre"), **params)


def test_maps_alone_cannot_be_asked(cnn: Model) -> None:
    plugin = get("metric", "max-sensitivity")
    with pytest.raises(RequestError, match="only maps were given; name the explainer"):
        plugin.make(plugin.parameters)(cnn, make_batch(cnn, 1), torch.rand(1, 32, 32))
