"""The rendered dataset: the same everywhere, exact in its truth, and fair to every place and class."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
import pytest
import torch

import slow_shapes
from faithmap import registry
from faithmap.errors import RequestError

shapes = importlib.import_module("faithmap.datasets.shapes")

#: SHA-256, shortened, of the images and masks that the first test renders.
PINNED = ["edf804c92861ee50be5297c79984b84d", "09d310ec403c9be9f52c098b22e93a31"]


@pytest.fixture(scope="module")
def many() -> Any:
    return shapes.render(range(400), split="val", size=48)


def test_pixels_are_the_same_on_every_machine() -> None:
    rendered = shapes.render([0, 1, 2, 3, 11, 4095])
    pair = shapes.render([5, 14], split="train", seed=7, objects=2, shortcut=1.0, difficulty=1.0)
    digests = [
        hashlib.sha256(r.images.tobytes() + np.packbits(r.masks).tobytes()).hexdigest()[:32]
        for r in (rendered, pair)
    ]
    assert digests == PINNED


def test_an_image_is_the_same_in_any_company() -> None:
    alone = [shapes.render([index]) for index in (9, 2, 30)]
    together = shapes.render([30, 9, 2, 77])
    for row, one in zip((1, 2, 0), alone, strict=True):
        assert np.array_equal(one.images[0], together.images[row])
        assert np.array_equal(one.masks[0], together.masks[row])


def test_seeds_and_splits_give_other_images() -> None:
    kinds = [{"seed": 0}, {"seed": 1}, {"split": "train"}, {"split": "val"}]
    assert len({shapes.render([3], size=32, **kind).images.tobytes() for kind in kinds}) == 4


@pytest.mark.parametrize("label", range(8), ids=shapes.CLASSES)
def test_masks_are_the_pixels_half_covered(label: int) -> None:
    told = shapes.describe(f"test-0-{16 + label:05d}", size=40)["objects"][0]
    assert told["name"] == shapes.CLASSES[label]
    slow = slow_shapes.coverage(told["name"], told["centre"], told["scale"], told["angle"], 40, 12)
    # Where the shares are too close to a half for either grid of points to tell, both are right.
    clear = np.abs(slow - 0.5) > 0.04
    assert np.array_equal(told["mask"][clear], (slow >= 0.5)[clear])
    assert clear.mean() > 0.97
    assert abs(told["mask"].sum() - slow.sum()) < 0.03 * slow.sum() + 2


@pytest.mark.parametrize("label", range(8), ids=shapes.CLASSES)
def test_declared_areas_and_reaches(label: int) -> None:
    ticks = (np.arange(800) + 0.5) / 200 - 2
    inside = np.array(shapes.OUTLINES[label].field(*np.meshgrid(ticks, ticks))) < 0
    assert inside.mean() * 16 == pytest.approx(shapes.OUTLINES[label].area, rel=2e-3)
    rows, columns = np.nonzero(inside)
    reach = shapes._reach(label, 0.0)
    assert [ticks[columns].min(), ticks[rows].min()] == pytest.approx(list(reach[0]), abs=0.011)
    assert [ticks[columns].max(), ticks[rows].max()] == pytest.approx(list(reach[1]), abs=0.011)


def test_samples_give_image_mask_and_box_of_the_label() -> None:
    plugin = registry.get("dataset", "shapes")
    assert plugin.facts.gives == {"label", "box", "mask"}
    samples = list(plugin.make(plugin.check({"n": 24}))())
    assert [sample.id for sample in samples[:2]] == ["test-0-00000", "test-0-00001"]
    assert len({sample.id for sample in samples}) == 24
    rendered = shapes.render(range(24))
    for row, sample in enumerate(samples):
        image, mask, boxes = sample.image(), sample.mask(), sample.boxes()
        assert image.shape == (3, 96, 96)
        assert image.dtype == torch.float32
        assert np.array_equal((image * 255).round().to(torch.uint8).numpy(), rendered.images[row])
        assert np.array_equal(mask.numpy(), rendered.masks[row])
        assert sample.label == rendered.labels[row]
        assert sample.name == shapes.CLASSES[sample.label]
        ((x0, y0, x1, y1),) = boxes.int().tolist()
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_an_image_is_rendered_once_for_all_that_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    background = shapes.background
    monkeypatch.setattr(shapes, "background", lambda *given: calls.append(1) or background(*given))
    shapes._scene.cache_clear()
    samples = list(registry.get("dataset", "shapes").make({"n": 2, "seed": 5})())
    assert not calls
    for sample in samples:
        sample.image(), sample.mask(), sample.boxes()
    assert len(calls) == 2


def test_classes_are_balanced(many: Any) -> None:
    assert np.bincount(many.labels, minlength=8).tolist() == [50] * 8


def test_areas_run_from_4_to_25_percent(many: Any) -> None:
    areas = many.masks.mean(axis=(1, 2))
    assert areas.min() > 0.038
    assert areas.max() < 0.25
    assert np.quantile(areas, 0.1) < 0.06
    assert np.quantile(areas, 0.9) > 0.15
    # No class is told by its size.
    means = [areas[many.labels == label].mean() for label in range(8)]
    assert max(means) < 1.4 * min(means)


def test_places_are_spread_over_the_frame(many: Any) -> None:
    cover = many.masks.mean(axis=0)
    assert cover[20:28, 20:28].mean() < 2.5 * cover.mean()
    blocks = cover.reshape(4, 12, 4, 12).mean(axis=(1, 3))
    assert blocks[1:3, 1:3].mean() < 2.5 * blocks[[0, 0, 3, 3, 1, 2, 1, 2], [1, 2, 1, 2, 0, 0, 3, 3]].mean()
    assert many.masks[:, :8].any() and many.masks[:, -8:].any()
    assert not many.masks[:, [0, -1]].any() and not many.masks[:, :, [0, -1]].any()


def test_two_objects_of_two_classes_apart() -> None:
    rendered = shapes.render(range(96), objects=2, size=48)
    assert (rendered.others != rendered.labels).all()
    assert set(rendered.others.tolist()) == set(range(8))
    assert not (rendered.masks & rendered.other_masks).any()
    assert rendered.masks.mean(axis=(1, 2)).min() > 0.035
    assert rendered.other_masks.mean(axis=(1, 2)).min() > 0.035
    told = shapes.describe("test-0-00012", objects=2, size=48)["objects"]
    assert [one["label"] for one in told] == [rendered.labels[12], rendered.others[12]]
    assert np.array_equal(told[1]["mask"], rendered.other_masks[12])
    assert (shapes.render([0], size=48).others == -1).all()


def test_a_shortcut_is_a_tag_in_the_colour_of_the_class() -> None:
    always = shapes.render(range(32), shortcut=1.0)
    never = shapes.render(range(32))
    assert not never.tags.any()
    assert (always.tags.sum(axis=(1, 2)) == always.tags[0].sum()).all()
    assert not (always.tags & always.masks).any()
    assert np.array_equal(always.masks, never.masks)
    changed = (always.images != never.images).any(axis=1)
    assert not (changed & ~always.tags).any()
    for image, tag, label in zip(always.images, always.tags, always.labels, strict=True):
        colour = np.median(image[:, tag], axis=1) / 255
        distances = [np.abs(colour - shapes.tag_colour(other)).sum() for other in range(8)]
        assert int(np.argmin(distances)) == label
    sometimes = shapes.render(range(120), shortcut=0.3, size=32).tags.any(axis=(1, 2)).mean()
    assert 0.15 < sometimes < 0.45
    assert shapes.describe("test-0-00003", shortcut=1.0)["tag"].any()
    assert shapes.describe("test-0-00003")["tag"] is None


def test_difficulty_is_mixed_unless_given() -> None:
    mixed = shapes.render(range(40), size=32)
    assert mixed.difficulties.min() < 0.2 and mixed.difficulties.max() > 0.8
    easy, hard = (shapes.render(range(16), difficulty=level) for level in (0.0, 1.0))
    assert np.array_equal(easy.masks, hard.masks)

    def contrast(rendered: Any) -> float:
        pixels = rendered.images.transpose(0, 2, 3, 1) / 255.0
        gaps = [
            np.abs(image[mask].mean(axis=0) - image[~mask].mean(axis=0)).sum() / image[~mask].std()
            for image, mask in zip(pixels, rendered.masks, strict=True)
        ]
        return float(np.mean(gaps))

    assert contrast(easy) > 1.5 * contrast(hard)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("split", "tset"), ("n", 0), ("seed", -1), ("size", 8), ("difficulty", 1.5), ("objects", 3),
        ("shortcut", -0.1),
    ],
)  # fmt: skip
def test_wrong_knobs_are_named(knob: str, value: Any) -> None:
    with pytest.raises(RequestError, match=knob):
        registry.get("dataset", "shapes").make({knob: value})()


def test_wrong_ids_and_indices_are_refused() -> None:
    for wrong in ("test-0", "dev-0-00001", "test-0-x"):
        with pytest.raises(RequestError, match="id"):
            shapes.describe(wrong)
    with pytest.raises(RequestError, match="index"):
        shapes.render([-1])
