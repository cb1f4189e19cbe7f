"""What is drawn into the stand-ins comes out of them, and the figures in the guide are of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import stand_ins
from copies import boxes_of, by_id, listed, mask_of
from stand_ins import STAND_INS, Scene

from faithmap.records import Sample

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
ONE, TWO = stand_ins.scenes(), stand_ins.scenes(2)


@pytest.fixture
def samples(request: pytest.FixtureRequest, tmp_path: Path) -> Mapping[str, Sample]:
    """The samples of a stand-in, by id."""
    if request.param == "huggingface":
        pytest.importorskip("datasets")
    STAND_INS[request.param](tmp_path)
    return by_id(
        listed(request.param, root=tmp_path, **tomllib.loads(stand_ins.ASKED.get(request.param, "")))
    )


def boxes(sample: Sample) -> list[tuple[float, ...]]:
    return sorted(tuple(box) for box in boxes_of(sample))


def void_of(sample: Sample) -> np.ndarray:
    assert callable(sample.void)
    found: np.ndarray = sample.void().numpy()
    return found


def edges(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The slow way: the first row and column that hold a pixel, and those after the last."""
    columns = [x for x in range(mask.shape[1]) if any(mask[:, x])]
    rows = [y for y in range(mask.shape[0]) if any(mask[y])]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def by_class(scene: Scene) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The masks of each class in a scene."""
    for kind in sorted({kind for kind, _ in scene.things}):
        yield kind, [mask for other, mask in scene.things if other == kind]


@pytest.mark.parametrize("samples", ["imagenet"], indirect=True)
def test_imagenet(samples: Mapping[str, Sample]) -> None:
    assert len(samples) == len(TWO)
    assert {len(boxes(sample)) for sample in samples.values()} == {1, 2}
    for number, scene in enumerate(TWO, 1):
        kind = scene.things[0][0]
        sample = samples[f"ILSVRC2012_val_{number:08d}"]
        assert boxes(sample) == sorted(edges(mask) for mask in dict(by_class(scene))[kind])


@pytest.mark.parametrize("samples", ["tiny-imagenet"], indirect=True)
def test_tiny_imagenet(samples: Mapping[str, Sample]) -> None:
    scenes = stand_ins.scenes(1, [(64, 64)])
    assert len(samples) == len(scenes)
    for number, scene in enumerate(scenes):
        assert boxes(samples[f"val_{number}"]) == [edges(scene.things[0][1])]


@pytest.mark.parametrize("samples", ["voc2012"], indirect=True)
def test_voc2012(samples: Mapping[str, Sample]) -> None:
    """Every class of an image is a sample, with the boxes and pixels of its objects, less the void."""
    seen = 0
    for number, scene in enumerate(TWO, 1):
        for kind, masks in by_class(scene):
            sample = samples[f"2012_{number:06d}/{stand_ins.VOC[kind]}"]
            assert boxes(sample) == sorted(edges(mask) for mask in masks)
            void = void_of(sample)
            rims = [stand_ins.rim(mask, 2, 3) for _, mask in scene.things]
            assert np.array_equal(void, np.logical_or.reduce(rims))
            assert np.array_equal(mask_of(sample).numpy(), np.logical_or.reduce(masks) & ~void)
            seen += 1
    assert seen == len(samples)


@pytest.mark.parametrize("samples", ["cub-200-2011"], indirect=True)
def test_cub(samples: Mapping[str, Sample]) -> None:
    """Three of five votes are a majority, two are not."""
    assert len(samples) == len(ONE)
    for sample in samples.values():
        scene = ONE[int(sample.id.split("_")[-2]) - 1]
        assert boxes(sample) == [edges(scene.things[0][1])]
        assert np.array_equal(mask_of(sample).numpy(), scene.things[0][1])


@pytest.mark.parametrize("samples", ["oxford-iiit-pet"], indirect=True)
def test_pets(samples: Mapping[str, Sample]) -> None:
    """What lies within six steps of the outline is void, the rest of the pet is its mask."""
    assert len(samples) == len(ONE)
    for sample in samples.values():
        mask = ONE[int(Path(sample.id).stem.split("_")[-1]) - 1].things[0][1]
        void = void_of(sample)
        assert np.array_equal(void, stand_ins.rim(mask, 6, 6))
        assert np.array_equal(mask_of(sample).numpy(), mask & ~void)


@pytest.mark.parametrize("samples", ["huggingface"], indirect=True)
def test_huggingface(samples: Mapping[str, Sample]) -> None:
    """Images, labels, boxes and masks of each row; words are numbered in their sorted order."""
    words = sorted(stand_ins.OUTLINES)
    assert len(samples) == len(ONE)
    for number, scene in enumerate(ONE):
        (kind, mask), sample = scene.things[0], samples[f"test/{number:06d}"]
        assert sample.label == words.index(stand_ins.OUTLINES[kind])
        assert boxes(sample) == [edges(mask)]
        assert np.array_equal(mask_of(sample).numpy(), mask)


@pytest.mark.parametrize(
    ("samples", "place", "labels"),
    [
        ("food-101", "{food}/{one}.jpg", [sorted(stand_ins.FOOD).index(dish) for dish in stand_ins.FOOD]),
        ("dogs-vs-cats", "{pet}.{nought}.jpg", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("imagenette", "val/{wnid}/{wnid}_{one}.JPEG", [574, 566, 701, 0, 491, 571, 497, 482]),
    ],
    indirect=["samples"],
)
def test_without_boxes(samples: Mapping[str, Sample], place: str, labels: list[int]) -> None:
    """Each image comes with its label, and up to the JPEG's noise it is the one that was drawn."""
    assert len(samples) == len(ONE)
    for nought, scene in enumerate(ONE):
        kind = scene.things[0][0]
        names = {"food": stand_ins.FOOD[kind], "pet": "cat" if kind < 4 else "dog", "nought": nought}
        names |= {"wnid": stand_ins.IMAGENETTE[kind], "one": nought + 1}
        sample = samples[place.format(**names)]
        assert sample.label == labels[kind] and sample.boxes is None and sample.mask is None
        assert callable(sample.image)
        assert np.abs(np.asarray(sample.image(), float) - scene.image).mean() < 1


def test_rims_keep_to_their_side() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:7, 0:5] = True
    inner, outer = stand_ins.rim(mask, 1, 0), stand_ins.rim(mask, 0, 1)
    assert not (inner & ~mask).any() and not (outer & mask).any()
    # The image's edge is no outline.
    assert inner.sum() == 25 - 3 * 4
    assert outer.sum() == 5 + 5 + 5


@pytest.mark.parametrize("name", STAND_INS)
def test_every_stand_in_has_its_figure(name: str) -> None:
    guide = (FIGURES.parent / "datasets.md").read_text(encoding="utf-8")
    assert f"(figures/{name}.png)" in guide
    with PIL.Image.open(FIGURES / f"{name}.png") as figure:
        assert figure.size == (968, 1144)


def test_a_figure_is_drawn_again(tmp_path: Path) -> None:
    """The command that the guide names draws what the guide shows, up to the hinting of its fonts."""
    stand_ins.show("voc2012", tmp_path)
    drawn, kept = (
        np.asarray(PIL.Image.open(folder / "voc2012.png").convert("RGB"), float)
        for folder in (tmp_path, FIGURES)
    )
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 1
