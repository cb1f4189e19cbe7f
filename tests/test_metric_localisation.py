"""The two pointing games: the region, the images that are scored, and the scores themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.registry import get
from faithmap.scoring import score_maps, use_metric

HEIGHT, WIDTH = 10, 14


def score(name: str, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", name)
    found = plugin.make(plugin.check(params))(batch.context.model, batch, maps)
    return {key: value if isinstance(value, Scored) else Scored(value) for key, value in found.items()}


def energy(batch: Batch, maps: Tensor, **params: object) -> Scored:
    return score("energy-pointing-game", batch, maps, **params)["energy_pg"]


def pointing(batch: Batch, maps: Tensor, **params: object) -> Scored:
    return score("pointing-game", batch, maps, **params)["pointing"]


class Bright(torch.nn.Module):
    """Class 1 for bright images, class 0 for dark ones."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-bright, bright], 1)


@pytest.fixture
def batch() -> Batch:
    """Four bright images of class 1, each with two overlapping boxes and no mask."""
    model = Model(Bright(), mean=0.0, std=1.0, input_size=(HEIGHT, WIDTH))
    boxes = torch.tensor([[2.0, 1.0, 8.0, 5.0], [6.0, 3.0, 12.0, 6.0]])
    images = torch.full((4, 3, HEIGHT, WIDTH), 0.9)
    return slow.batch_of(
        model, images, labels=torch.ones(4, dtype=torch.long), boxes=[boxes] * 4, grid=(5, 7)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.floats(0, 80))
def test_scores_are_their_definitions(seed: int, tied: bool, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Model(Bright(), mean=0.0, std=1.0, input_size=(HEIGHT, WIDTH))
    corners = torch.rand(3, 2, 2, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    boxes = list(torch.cat([corners.amin(2), corners.amax(2)], 2))
    images = torch.full((3, 3, HEIGHT, WIDTH), 0.9)
    batch = slow.batch_of(model, images, labels=torch.ones(3, dtype=torch.long), boxes=boxes)
    maps = torch.randn(3, HEIGHT, WIDTH, generator=generator)
    maps = maps.round() if tied else maps
    open_gate = {"least_share": 0.0, "most_share": 1.0}
    found = score("energy-pointing-game", batch, maps, **open_gate)
    hits = pointing(batch, maps, tolerance=tolerance, **open_gate)
    for i in range(3):
        region = slow.union_of_boxes(boxes[i].tolist(), HEIGHT, WIDTH)
        area = 100 * sum(map(sum, region)) / (HEIGHT * WIDTH)
        if area == 0:
            assert found["energy_pg"].reasons[i] == hits.reasons[i] == "no object in the image"
            continue
        assert found["object_share"].values[i].item() == pytest.approx(area)
        assert found["energy_pg"].values[i].item() == pytest.approx(slow.energy(maps[i], region), nan_ok=True)
        reach = tolerance * HEIGHT / 224
        assert hits.values[i].item() == slow.pointing(maps[i], batch.ties()[i], region, reach)


def test_boxes_are_united_not_summed(batch: Batch) -> None:
    found = score("energy-pointing-game", batch, torch.ones(4, HEIGHT, WIDTH))
    # 6x4 and 6x3 pixels that share 2x2.
    assert found["object_share"].values.tolist() == pytest.approx([100 * 38 / 140] * 4)


def test_boxes_hold_x_before_y(batch: Batch) -> None:
    inside, outside = torch.zeros(4, HEIGHT, WIDTH), torch.zeros(4, HEIGHT, WIDTH)
    inside[:, 1, 7] = 1  # row 1, column 7
    outside[:, 7, 1] = 1
    assert energy(batch, inside).values.tolist() == [100] * 4
    assert energy(batch, outside).values.tolist() == [0] * 4
    assert pointing(batch, inside, tolerance=0.0).values.tolist() == [100] * 4
    assert pointing(batch, outside, tolerance=0.0).values.tolist() == [0] * 4


def test_a_constant_map_scores_the_object_s_share(batch: Batch) -> None:
    found = score("energy-pointing-game", batch, torch.full((4, HEIGHT, WIDTH), 0.3))
    assert torch.allclose(found["energy_pg"].values, found["object_share"].values)


@pytest.mark.parametrize("scale", [1e-30, 0.5, 3.0, 1e30])
def test_scale_does_not_matter(batch: Batch, scale: float) -> None:
    maps = torch.randn(4, HEIGHT, WIDTH)
    assert torch.allclose(energy(batch, maps * scale).values, energy(batch, maps).values, rtol=1e-5)
    assert torch.equal(pointing(batch, maps * scale).values, pointing(batch, maps).values)


def test_negative_relevance_does_not_count_and_is_not_turned(batch: Batch) -> None:
    maps = torch.randn(4, HEIGHT, WIDTH)
    assert torch.equal(energy(batch, maps).values, energy(batch, maps.clamp_min(0)).values)


def test_a_map_without_positive_relevance_takes_the_object_s_share(batch: Batch) -> None:
    maps = torch.randn(4, HEIGHT, WIDTH)
    maps[2] = -maps[2].abs()
    found = energy(batch, maps)
    assert list(found.empty) == [2]
    verdicts = score_maps(use_metric(Spec("energy-pointing-game")), batch.context.model, batch,
                          MapSet(maps, ["ok"] * 4, [""] * 4))  # fmt: skip
    by_name = {verdict.metric: verdict for verdict in verdicts}
    assert by_name["energy_pg"].status == ["ok", "ok", "empty", "ok"]
    assert by_name["object_share"].status == ["ok"] * 4
    assert get("metric", "energy-pointing-game").facts.fallback == {"energy_pg": "object_share"}


def test_masks_come_before_boxes_unless_asked_otherwise(batch: Batch) -> None:
    masks = torch.zeros(4, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 8:, :7] = True
    both = replace(batch, masks=masks, cache={})
    share = {
        region: score("energy-pointing-game", both, torch.ones(4, HEIGHT, WIDTH), region=region)[
            "object_share"
        ]
        for region in ("auto", "mask", "box")
    }
    assert share["auto"].values[0].item() == share["mask"].values[0].item() == pytest.approx(10.0)
    assert share["box"].values[0].item() == pytest.approx(100 * 38 / 140)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_void_pixels_are_in_neither_sum(seed: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Model(Bright(), mean=0.0, std=1.0, input_size=(HEIGHT, WIDTH))
    kinds = torch.randint(0, 3, (3, HEIGHT, WIDTH), generator=generator)
    masks, void = kinds == 0, kinds == 1
    images = torch.full((3, 3, HEIGHT, WIDTH), 0.9)
    batch = slow.batch_of(
        model, images, labels=torch.ones(3, dtype=torch.long), masks=masks, void=void, grid=(5, 7)
    )
    maps = torch.randn(3, HEIGHT, WIDTH, generator=generator)
    maps = maps.round() if tied else maps
    found = score("energy-pointing-game", batch, maps, most_share=1.0)
    hits = pointing(batch, maps, tolerance=0.0, most_share=1.0)
    for i in range(3):
        region, left = masks[i].tolist(), void[i].tolist()
        assert found["energy_pg"].values[i].item() == pytest.approx(slow.energy(maps[i], region, left))
        area = 100 * masks[i].sum().item() / (~void[i]).sum().item()
        assert found["object_share"].values[i].item() == pytest.approx(area)
        assert hits.values[i].item() == slow.pointing(maps[i], batch.ties()[i], region, 0.0, left)
    elsewhere = torch.where(void, 1e6 * torch.rand(void.shape, generator=generator), maps)
    assert torch.equal(energy(batch, elsewhere, most_share=1.0).values, found["energy_pg"].values)
    assert torch.equal(pointing(batch, elsewhere, tolerance=0.0, most_share=1.0).values, hits.values)


def test_void_pixels_matter_to_masks_alone(batch: Batch) -> None:
    masks = torch.zeros(4, HEIGHT, WIDTH, dtype=torch.bool)
    masks[:, 8:, :7] = True
    void = torch.zeros_like(masks)
    void[:, :5] = True
    both = replace(batch, masks=masks, void=void, cache={})
    ones = torch.ones(4, HEIGHT, WIDTH)
    share = {
        region: score("energy-pointing-game", both, ones, region=region)["object_share"].values[0].item()
        for region in ("auto", "mask", "box")
    }
    assert share == {
        "auto": pytest.approx(20.0), "mask": pytest.approx(20.0), "box": pytest.approx(100 * 38 / 140)
    }  # fmt: skip
    nothing = replace(both, masks=masks & False, void=torch.ones_like(void), cache={})
    assert energy(nothing, ones).reasons == ["no object in the image"] * 4
    assert pointing(nothing, ones).reasons == ["no object in the image"] * 4
    on_void = score("energy-pointing-game", both, void.float())["energy_pg"]
    assert list(on_void.empty) == [0, 1, 2, 3]


def test_the_gate_leaves_out_images_with_a_reason(batch: Batch) -> None:
    boxes = [
        torch.tensor([[0.0, 0.0, 7.0, 8.0]]),  # 40%
        torch.tensor([[0.0, 0.0, 14.0, 8.0]]),  # 80%: too large
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),  # under 1%: too small
    ]
    batch = replace(batch, boxes=boxes, cache={})
    maps = torch.rand(4, HEIGHT, WIDTH)
    expected = ["", "the object covers 80.0% of the image", "no object in the image",
                "the object covers 0.7% of the image"]  # fmt: skip
    for name in ("energy-pointing-game", "pointing-game"):
        for scored in score(name, batch, maps).values():
            assert list(scored.reasons) == expected
            assert scored.values.isnan().tolist() == [False, True, True, True]
    assert energy(batch, maps, most_share=0.9, least_share=0.0).values.isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_empty_masks_are_no_hits(batch: Batch) -> None:
    empty = replace(batch, masks=torch.zeros(4, HEIGHT, WIDTH, dtype=torch.bool), cache={})
    for found in (energy(empty, torch.rand(4, HEIGHT, WIDTH)), pointing(empty, torch.rand(4, HEIGHT, WIDTH))):
        assert found.values.isnan().all()
        assert set(found.reasons) == {"no object in the image"}


def test_wrong_images_and_other_classes_are_left_out(batch: Batch) -> None:
    maps = torch.rand(4, HEIGHT, WIDTH)
    mixed = replace(batch, labels=torch.tensor([1, 0, -1, 1]), targets=torch.tensor([1, 1, 1, 0]), cache={})
    reasons = list(energy(mixed, maps).reasons)
    assert reasons == [
        "", "the model is wrong", "the image has no label",
        "the map explains another class than the object's",
    ]  # fmt: skip
    explained = replace(mixed, targets=torch.tensor([1, 0, 1, 0]), cache={})
    assert list(pointing(explained, maps).reasons)[:2] == ["", "the model is wrong"]
    assert list(pointing(explained, maps, only_correct=False).reasons)[:2] == ["", ""]


def test_without_labels_the_region_belongs_to_the_target(batch: Batch) -> None:
    found = energy(replace(batch, labels=None, cache={}), torch.rand(4, HEIGHT, WIDTH))
    assert found.values.isfinite().all()


def test_the_tolerance_is_fifteen_pixels_at_224() -> None:
    model = Model(Bright(), mean=0.0, std=1.0, input_size=224)
    images = torch.full((4, 3, 224, 224), 0.9)
    batch = slow.batch_of(model, images, labels=torch.ones(4, dtype=torch.long),
                          boxes=[torch.tensor([[100.0, 100.0, 160.0, 160.0]])] * 4)  # fmt: skip
    maps = torch.zeros(4, 224, 224)
    maps[0, 130, 85] = 1  # fifteen columns left of the object's first
    maps[1, 130, 84] = 1
    maps[2, 100 - 12, 100 - 9] = 1  # fifteen pixels off its corner
    maps[3, 100 - 12, 100 - 10] = 1
    assert pointing(batch, maps).values.tolist() == [100, 0, 100, 0]
    half = slow.batch_of(model, images[:2, :, :112, :112], labels=torch.ones(2, dtype=torch.long),
                         boxes=[torch.tensor([[50.0, 50.0, 80.0, 80.0]])] * 2)  # fmt: skip
    shown = torch.zeros(2, 112, 112)
    shown[0, 60, 43] = 1  # seven columns away, the tolerance is 7.5
    shown[1, 60, 42] = 1
    assert pointing(half, shown).values.tolist() == [100, 0]


def test_ties_of_the_highest_value_are_broken_by_the_image_s_field(batch: Batch) -> None:
    plateau = torch.zeros(4, HEIGHT, WIDTH)
    plateau[:, :, ::2] = 1
    expected = [
        slow.pointing(
            plateau[i], batch.ties()[i], slow.union_of_boxes(batch.boxes[i].tolist(), HEIGHT, WIDTH), 0
        )
        for i in range(4)
        if batch.boxes
    ]
    assert pointing(batch, plateau, tolerance=0.0).values.tolist() == expected
    turned = plateau.transpose(1, 2).contiguous().transpose(1, 2)
    assert pointing(batch, turned, tolerance=0.0).values.tolist() == expected


@pytest.mark.parametrize("name", ["energy-pointing-game", "pointing-game"])
def test_wrong_regions_are_refused(batch: Batch, name: str) -> None:
    maps = torch.rand(4, HEIGHT, WIDTH)
    with pytest.raises(RequestError, match="parameter 'region': got 'circle'; known are: auto, box, mask"):
        score(name, batch, maps, region="circle")
    with pytest.raises(RequestError, match="got 'mask', but the images come without masks"):
        score(name, batch, maps, region="mask")
    with pytest.raises(RequestError, match="without masks or boxes"):
        score(name, replace(batch, boxes=None, cache={}), maps)


@pytest.mark.parametrize("name", ["energy-pointing-game", "pointing-game"])
def test_it_needs_the_kind_of_region_that_is_asked_for(name: str) -> None:
    """So that it is left out of a dataset that gives the other kind alone."""
    needs = {kind: use_metric(Spec(name, {"region": kind})).needs for kind in ("auto", "mask", "box")}
    assert needs == {"auto": {"region"}, "mask": {"mask"}, "box": {"box"}}
    assert use_metric(Spec("perturbation")).needs == frozenset()


def test_no_forward_pass_beyond_the_prediction(batch: Batch) -> None:
    _ = batch.logits
    with batch.context.model.counting() as meter:
        energy(batch, torch.rand(4, HEIGHT, WIDTH))
        pointing(batch, torch.rand(4, HEIGHT, WIDTH))
    assert meter.forwards == 0
