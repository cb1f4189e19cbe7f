"""The grid pointing game: which mosaics are made, what is asked of the explainer, and the share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import inside
from hues import HEIGHT, WIDTH, evidence_of, hue_batch, hue_images, hue_model
from torch import Tensor

import slow_metrics_again as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, bind
from faithmap.models import Model
from faithmap.pool import Pool
from faithmap.records import Sample, Spec
from faithmap.registry import default_metrics, get
from faithmap.scoring import score_maps, use_metric

Explain = Callable[[Model, Batch], Tensor]


def score(batch: Batch, explainer: Explain | None = None, **params: Any) -> Scored:
    batch = batch if explainer is None else replace(batch, explainer=explainer)
    plugin = get("metric", "grid-pointing")
    maps = torch.rand(len(batch), *batch.size)
    found: dict[str, Scored] = plugin.make(plugin.check(params))(batch.context.model, batch, maps)
    return found["grid_pg"]


def watched(batch: Batch, explain: Explain = evidence_of, **params: Any) -> tuple[Scored, list[Batch]]:
    """The score, and the batches that the explainer was given."""
    seen: list[Batch] = []

    def watching(model: Model, some: Batch) -> Tensor:
        seen.append(some)
        return explain(model, some)

    return score(batch, watching, **params), seen


@pytest.fixture(params=[False, True], ids=["any-size", "one-size"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """Ten images on a network that takes any size, and on one that is built for theirs."""
    return hue_batch(hue_model(fixed=request.param))


def is_fixed(batch: Batch) -> bool:
    return batch.context.model.module.size is not None  # type: ignore[union-attr]


def signed(model: Model, batch: Batch) -> Tensor:
    """A map of either sign that depends on image and class."""
    return (batch.images * torch.tensor([1.0, -0.4, 0.2])[:, None, None]).sum(1) - 0.1 * batch.targets.view(
        -1, 1, 1
    )


def test_mosaics_and_shares_are_their_definitions(batch: Batch) -> None:
    images, labels = hue_images(20)
    known = []
    for i in range(20):
        chances = batch.context.model(images[i : i + 1]).softmax(1)[0]
        known.append((f"hue-{i}", int(labels[i]), int(chances.argmax()), float(chances[labels[i]])))
    # A bar between two of them, so that rounding decides nothing; some images lie below.
    ranked = sorted(entry[3] for entry in known)
    bar = (ranked[5] + ranked[6]) / 2
    found, seen = watched(batch, signed, confidence=bar)
    mosaics = {name: (some, i) for some in seen for i, name in enumerate(some.ids)}
    assert set(mosaics) == {name for name in batch.ids if known[int(name[4:])][3] >= bar}
    assert 4 <= len(mosaics) < 10
    for i, name in enumerate(batch.ids):
        if name not in mosaics:
            continue
        some, k = mosaics[name]
        row, column = slow.place(name)
        others = slow.partners(name, int(labels[i]), known, bar)
        shown = [images[int(other.partition("-")[2])] for other in others]
        shown.insert(2 * row + column, images[i])
        expected = slow.mosaic([slow.halved(image) for image in shown] if is_fixed(batch) else shown)
        torch.testing.assert_close(some.images[k], expected, rtol=0, atol=1e-5)
        assert int(some.targets[k]) == int(labels[i])
        values = signed(
            batch.context.model, replace(some, images=expected[None], targets=some.targets[k : k + 1])
        )
        share = slow.quarter_share(values[0], row, column)
        assert found.values[i].item() == pytest.approx(share, abs=1e-3)


def test_the_truth_scores_everything_its_inverse_nothing_and_ignorance_a_quarter(batch: Batch) -> None:
    rest: Explain = lambda model, some: 1 - evidence_of(model, some).gt(0).float()  # noqa: E731
    # The border of a halved image is its own: nothing bleeds in from beside it.
    assert score(batch, evidence_of).values.tolist() == pytest.approx([100] * 10)
    assert score(batch, rest).values.tolist() == pytest.approx([0] * 10)
    even = score(batch, lambda model, some: 1 + 1e-6 * evidence_of(model, some))
    assert even.values.tolist() == pytest.approx([25] * 10, abs=1e-3)
    draws = [score(batch, bind(get("explainer", "random"), {"draw": draw})).values for draw in range(30)]
    assert float(torch.stack(draws).mean()) == pytest.approx(25, abs=1.0)


def test_the_oracle_finds_its_image_through_mask_and_box(batch: Batch) -> None:
    masks = torch.zeros(10, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 2:6, 4:10] = True
    boxes = [torch.tensor([[4.0, 2.0, 10.0, 6.0]])] * 10
    oracle = bind(get("explainer", "oracle"), {})
    for truths in ({"masks": masks}, {"boxes": boxes}, {"masks": masks, "boxes": boxes}):
        found, seen = watched(replace(batch, **truths), oracle)  # type: ignore[arg-type]
        assert found.values.tolist() == pytest.approx([100] * 10)
        for some in seen:
            region = some.region()
            assert region is not None
            assert region.flatten(1).sum(1).tolist() == [6 if is_fixed(batch) else 24] * len(some)


def test_the_run_s_grid_is_as_coarse_on_each_image(batch: Batch) -> None:
    for grid, doubled in (((4, 6), (8, 12)), (None, None)):
        _, seen = watched(replace(batch, grid=grid))
        assert {some.grid for some in seen} == {grid if is_fixed(batch) else doubled}
        assert {some.size for some in seen} == {
            (HEIGHT, WIDTH) if is_fixed(batch) else (2 * HEIGHT, 2 * WIDTH)
        }


def test_as_many_pixels_at_a_time_as_the_batch_has(batch: Batch) -> None:
    _, seen = watched(batch)
    assert max(some.images.numel() for some in seen) <= batch.images.numel()
    assert sum(len(some) for some in seen) == 10


def test_images_that_the_model_is_not_right_and_sure_of_are_left_out(batch: Batch) -> None:
    assert batch.labels is not None
    labels, targets = batch.labels.clone(), batch.targets.clone()
    labels[0], targets[1], labels[2] = -1, (targets[1] + 1) % 5, (labels[2] + 1) % 5
    found, seen = watched(replace(batch, labels=labels, targets=targets))
    assert list(found.reasons)[:4] == [
        "the image has no label",
        "the run explains another class than the label",
        "the model is wrong",
        "",
    ]
    assert found.values.isnan().tolist() == [True] * 3 + [False] * 7
    assert {name for some in seen for name in some.ids} == set(batch.ids[3:])
    chances = batch.logits.softmax(1).amax(1)
    bar = float(chances.median())
    left = score(batch, confidence=bar)
    sure = (chances >= bar).tolist()
    assert [not reason for reason in left.reasons] == sure
    assert all(" less than " in reason for reason, kept in zip(left.reasons, sure, strict=True) if not kept)


def test_too_few_classes_make_no_mosaic(batch: Batch) -> None:
    images, labels = hue_images(20)
    three = [Sample(f"hue-{i}", images[i], int(labels[i])) for i in range(20) if labels[i] < 3]
    pool = Pool(three, batch.context.model, split=lambda _: "")
    found, seen = watched(replace(batch, pool=pool))
    for i, label in enumerate(batch.targets.tolist()):
        alone = "fewer than three other classes have an image that the model is right and sure of"
        assert found.reasons[i] == (alone if label < 3 else "")
    assert {name for some in seen for name in some.ids} == {f"hue-{i}" for i in (3, 4, 8, 9)}


def test_no_positive_relevance_is_an_empty_map_and_a_failure_has_its_reason(batch: Batch) -> None:
    def moody(model: Model, some: Batch) -> Tensor:
        if "hue-4" in some.ids:
            raise ArithmeticError("not this one")
        sign = torch.tensor([-1.0 if name == "hue-5" else 1.0 for name in some.ids])
        return sign.view(-1, 1, 1) * evidence_of(model, some)

    maps = MapSet(torch.rand(10, 4, 4), ["ok"] * 10, [""] * 10)
    use = use_metric(Spec("grid-pointing"))
    (verdict,) = score_maps(use, batch.context.model, replace(batch, explainer=moody), maps)
    assert verdict.status[4:6] == ["failed", "empty"]
    assert verdict.reasons[4] == "the map of the mosaic: ArithmeticError: not this one"
    assert set(verdict.status[:4] + verdict.status[6:]) == {"ok"}


def test_neither_the_batch_nor_what_came_before_matters(batch: Batch) -> None:
    together = score(batch, signed).values
    fresh = hue_batch(batch.context.model)
    for i in (7, 2):
        alone = score(fresh.select([i]), signed).values
        assert alone[0].item() == pytest.approx(together[i].item(), abs=1e-4)


def test_sizes_may_be_named() -> None:
    free, fixed = hue_batch(hue_model()), hue_batch(hue_model(fixed=True))
    for batch, params, size in (
        (free, {"size": "half"}, (HEIGHT, WIDTH)),
        (free, {"size": "double"}, (2 * HEIGHT, 2 * WIDTH)),
        (fixed, {"size": "half"}, (HEIGHT, WIDTH)),
    ):
        found, seen = watched(batch, **params)
        assert {some.size for some in seen} == {size}
        assert found.values.tolist() == pytest.approx([100] * 10)
    with pytest.raises(RequestError, match='takes no images of 16 x 24 pixels; use size = "half"'):
        score(fixed, size="double")


def test_odd_sides_are_cut_without_a_gap() -> None:
    tiles = inside("grid-pointing", "metric").rectangles(7, 5)
    covered = torch.zeros(7, 5)
    for tile in tiles:
        covered[tile] += 1
    assert covered.eq(1).all()
    assert [(covered[tile].shape[0], covered[tile].shape[1]) for tile in tiles] == [
        (3, 2),
        (3, 3),
        (4, 2),
        (4, 3),
    ]


def test_places_are_all_taken() -> None:
    place_of = inside("grid-pointing", "metric").place_of
    counts = torch.bincount(torch.tensor([place_of(f"image-{i}") for i in range(400)]), minlength=4)
    assert int(counts.min()) > 70


def test_it_has_to_be_named_and_needs_a_run(cnn: Model) -> None:
    assert "grid-pointing" not in {plugin.name for plugin in default_metrics()}
    batch = hue_batch(hue_model())
    with pytest.raises(RequestError, match="sets an image among others of its dataset"):
        score(replace(batch, pool=None))
    with pytest.raises(RequestError, match="only maps were given"):
        score(replace(batch, explainer=None))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"confidence": 1.2}, "'confidence': got 1.2, expected a probability"),
        ({"pool": 3}, "'pool': got 3, expected at least 4"),
        ({"size": "full"}, "'size': got 'full'; known are: auto, double, half"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(hue_batch(hue_model()), **params)
