"""The order of images, parts, limits and labels; transforms with their boxes and masks."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_cnn

from faithmap import pictures, transforms
from faithmap.data import (
    LoadedDataset,
    check_labels,
    check_target,
    choose,
    held_out,
    load_dataset,
    make_batch,
    part_of,
    pick_targets,
    read_shard,
    shards,
    traces,
)
from faithmap.errors import DataError, RequestError
from faithmap.models import Model, Transform
from faithmap.records import Sample, Spec
from faithmap.registry import get
from faithmap.transforms import geometry, prepare

SAMPLES = [Sample(f"image-{i}", torch.zeros(3, 4, 4), label=i % 5 if i < 150 else 5) for i in range(200)]


def test_a_larger_limit_only_adds_images() -> None:
    whole = choose(SAMPLES, "all", None)
    assert sorted(s.id for s in whole) == sorted(s.id for s in SAMPLES)
    for limit in (1, 7, 60, 199):
        assert choose(SAMPLES, "all", limit) == whole[:limit]


def test_a_limit_is_balanced_over_the_classes() -> None:
    counts = collections.Counter(sample.label for sample in choose(SAMPLES, "all", 60))
    assert set(counts.values()) == {10}


def test_the_order_does_not_depend_on_the_order_given() -> None:
    assert choose(SAMPLES, "all", 50) == choose(SAMPLES[::-1], "all", 50)


def test_parts_split_the_images_a_quarter_to_three() -> None:
    dev, held = choose(SAMPLES, "dev", None), choose(SAMPLES, "eval", None)
    assert {s.id for s in dev}.isdisjoint(s.id for s in held)
    assert len(dev) + len(held) == len(SAMPLES)
    shares = [part_of(f"{i}") == "dev" for i in range(4000)]
    assert abs(np.mean(shares) - 0.25) < 0.03


def test_an_empty_part_is_refused() -> None:
    lone = next(s for s in SAMPLES if part_of(s.id) == "eval")
    with pytest.raises(RequestError, match="part 'dev' holds none"):
        choose([lone], "dev", None)


def test_labels_out_of_range_are_refused() -> None:
    dataset = LoadedDataset("mine", get("dataset", "shapes"), {}, tuple(SAMPLES), frozenset({"label"}), "1")
    with pytest.raises(
        RequestError, match="has label 5, out of range for model 'tiny-cnn', which has 5 classes"
    ):
        check_labels(dataset, SAMPLES, make_cnn(classes=5))
    check_labels(dataset, SAMPLES, make_cnn(classes=6))


def test_targets() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 4.0]])
    labels = torch.tensor([2, 1])
    assert pick_targets("predicted", logits, labels).tolist() == [1, 0]
    assert pick_targets("second", logits, labels).tolist() == [2, 2]
    assert pick_targets("label", logits, labels).tolist() == [2, 1]
    with pytest.raises(RequestError, match="needs a label"):
        pick_targets("label", logits, None)


def test_broken_images_leave_the_others_alone(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    PIL.Image.new("RGB", (40, 40), (255, 0, 0)).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    model = make_cnn()
    (shard,) = shards(
        (Sample("good", good, 0), Sample("bad", bad, 1), Sample("gone", tmp_path / "x.png", 1)), 8
    )
    read, unreadable = read_shard(shard, model)
    assert [sample.id for sample, _ in read] == ["good"]
    assert set(unreadable) == {"bad", "gone"}
    assert all("cannot be read" in reason for reason in unreadable.values())
    batch = make_batch(read, model, "predicted", model.grid, 0)
    assert batch.images.shape == (1, 3, 32, 32)
    assert batch.labels is not None and batch.labels.tolist() == [0]


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (20, 30), (1, 50)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
def test_the_geometry_is_timms(size: tuple[int, int], crop_pct: float) -> None:
    from timm.data import create_transform

    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    reference = create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=crop_pct, mean=(0,) * 3, std=(1,) * 3
    )
    ours = prepare(Sample("a", picture), Transform((32, 32), crop_pct, "bicubic")).image
    assert torch.allclose(ours, reference(picture), atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (40, 30)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_geometry_is_timms_for_what_is_no_square(size: tuple[int, int], crop_pct: float) -> None:
    from timm.data import create_transform

    small = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    reference = create_transform(
        (3, 24, 32), interpolation="bicubic", crop_pct=crop_pct, mean=(0,) * 3, std=(1,) * 3
    )
    ours = prepare(Sample("a", picture), Transform((24, 32), crop_pct, "bicubic")).image
    assert torch.allclose(ours, reference(picture), atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (20, 30)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.7])
def test_squashing_is_timms(size: tuple[int, int], crop_pct: float) -> None:
    from timm.data import create_transform

    small = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    reference = create_transform(
        (3, 32, 32),
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode="squash",
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    ours = prepare(Sample("a", picture), Transform((32, 32), crop_pct, "bicubic", "squash")).image
    assert torch.allclose(ours, reference(picture), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (3, 1200)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_long_images_are_resized_within_the_crop_alone(size: tuple[int, int], crop_pct: float) -> None:
    """Which is the same as resizing all of them, and does not take the memory of that."""
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    picture, transform = PIL.Image.fromarray(noise), Transform((32, 32), crop_pct, "bicubic")
    plan = geometry(size, transform)
    assert np.prod(plan.resized) > transforms.LONG * 32 * 32
    whole = np.asarray(picture.resize(plan.resized[::-1], PIL.Image.Resampling.BICUBIC))
    (top, left), mask = plan.offset, torch.from_numpy(noise[..., 0] > 127)
    prepared = prepare(Sample("a", picture, mask=mask), transform)
    expected = torch.from_numpy(whole[top : top + 32, left : left + 32].copy()).permute(2, 0, 1) / 255
    assert (prepared.image - expected).abs().max() <= 1.01 / 255  # coefficients are rounded otherwise
    assert (prepared.image != expected).float().mean() < 0.05
    rows, columns = ((torch.arange(n) + 0.5) * o / n for n, o in zip(plan.resized, size, strict=True))
    moved = mask[rows.long()][:, columns.long()][top : top + 32, left : left + 32]
    assert prepared.mask is not None and torch.equal(prepared.mask, moved)
    without = prepare(Sample("a", picture, mask=mask, void=~mask), transform)
    # Beyond the image there is background: black, and not undecided.
    assert without.void is not None and not (without.void & moved).any()
    endless = PIL.Image.new("RGB", (1, 60000), "teal")  # 9 GB if all of it were resized
    seen = prepare(Sample("b", endless), Transform((224, 224))).image
    assert seen.shape == (3, 224, 224) and torch.allclose(seen[:, 0, 0] * 255, torch.tensor([0.0, 128, 128]))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_is_read_as_a_viewer_shows_it(tmp_path: Path, lazy: bool) -> None:
    """Upright, in 8 bits, on white, or refused: whoever gives its path, as `faithmap explain` does."""
    colour = np.zeros((20, 40, 3), np.uint8)
    colour[:, :10] = (255, 0, 0)  # a red stripe on the left, which lies on top once the image is upright
    exif = PIL.Image.Exif()
    exif[pictures.ORIENTATION] = 6
    PIL.Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)
    grey = np.full((8, 8), 20000, np.uint16)
    PIL.Image.fromarray(grey).save(tmp_path / "sixteen.png")
    PIL.Image.new("RGBA", (8, 8), (0, 200, 0, 0)).save(tmp_path / "clear.png")
    PIL.Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "floats.tif")

    def read(name: str, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
        file = tmp_path / name
        return prepare(Sample(name, (lambda: file) if lazy else file), Transform(size)).image

    upright = read("turned.png", (40, 20))
    assert (upright[0, :10] == 1).all() and (upright[0, 10:] == 0).all()
    assert torch.allclose(read("sixteen.png"), torch.tensor(20000 / 65535), atol=0.5 / 255)
    assert (read("clear.png") == 1).all()
    with pytest.raises(DataError, match=r"'floats\.tif' cannot be read: .*unknown range"):
        read("floats.tif")
    with pytest.raises(DataError, match=r"'gone\.png' cannot be read: .*gone\.png"):
        read("gone.png")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (100, 100), (40, 37)])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_boxes_and_masks_follow_the_image(size: tuple[int, int], mode: str) -> None:
    height, width = size
    x0, y0, x1, y1 = width // 4, height // 3, width // 4 + width // 3, height // 3 + height // 4
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    image = mask.float().expand(3, -1, -1)
    sample = Sample("a", image, boxes=torch.tensor([[x0, y0, x1, y1]]), mask=mask)
    prepared = prepare(sample, Transform((64, 64), 0.875, "bilinear", mode))
    assert prepared.mask is not None and prepared.boxes is not None
    # The white rectangle of the image, its mask and its box must lie on each other but for the rim.
    seen = prepared.image[0] > 0.5
    assert (seen != prepared.mask).float().mean() < 0.03
    ys, xs = torch.nonzero(prepared.mask, as_tuple=True)
    drawn = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
    assert (drawn - prepared.boxes[0]).abs().max() <= 1.0


def test_a_truth_does_not_depend_on_the_other_images(model: Model) -> None:
    """An image with a box alone, beside one with a mask, beside one with neither; and each by itself."""
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:8, :8] = True
    image = torch.rand(3, 32, 32)
    samples = [
        Sample("box", image, 0, boxes=torch.tensor([[4, 4, 12, 20]])),
        Sample("mask", image, 0, mask=mask),
        Sample("none", image),
        Sample("void", image, 0, mask=mask, void=~mask),
    ]
    gives = frozenset({"label", "box", "mask"})
    read = [(sample, prepare(sample, Transform((32, 32), 1.0))) for sample in samples]
    together = make_batch(read, model, "predicted", None, 0, gives)
    region = together.region()
    assert region is not None and region.sum((1, 2)).tolist() == [8 * 16, 64, 0, 64]
    assert together.void is not None and together.void.sum((1, 2)).tolist() == [0, 0, 0, 32 * 32 - 64]
    chosen = together.select([3]).void
    assert chosen is not None and torch.equal(chosen[0], ~mask)
    assert together.showing({"region"}).void is not None and together.showing({"label"}).void is None
    for i, one in enumerate(read):
        alone = make_batch([one], model, "predicted", None, 0, gives)
        assert alone.labels is not None and alone.boxes is not None and alone.masks is not None
        assert torch.equal(alone.region(), region[i : i + 1])  # type: ignore[arg-type]
        assert torch.equal(together.select([i]).region(), region[i : i + 1])  # type: ignore[arg-type]


def test_labels_are_explained_only_where_all_images_have_one() -> None:
    samples = [Sample("a", torch.zeros(3, 8, 8), 1), Sample("b", torch.zeros(3, 8, 8))]
    shapes = load_dataset(Spec("shapes", {"n": 8}))
    check_target("predicted", shapes, samples)
    check_target("label", shapes, samples[:1])
    with pytest.raises(RequestError, match=r"image 'b' has no label, and target = \"label\" explains it"):
        check_target("label", shapes, samples)


def test_a_photograph_is_known_in_another_list(tmp_path: Path) -> None:
    shapes = load_dataset(Spec("shapes", {"n": 8}))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"12345")
    one, two = (Sample(f"{n}/x", tmp_path / n / "photo.jpg") for n in ("one", "two"))
    other = tmp_path / "one" / "other.jpg"
    other.write_bytes(b"12345")
    assert traces(shapes, [one]) == traces(shapes, [two]) != traces(shapes, [Sample("x", other)])
    (tmp_path / "two" / "photo.jpg").write_bytes(b"123456")
    assert traces(shapes, [one]) != traces(shapes, [two])
    drawn = [Sample("a", torch.zeros(3, 8, 8)), Sample("b", torch.zeros(3, 8, 8))]
    assert len(set(traces(shapes, drawn))) == 2


def test_samples_of_one_file_stay_together(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(40)]
    samples = [Sample(f"{i}/{name}", file, 0) for i, file in enumerate(files) for name in ("cat", "dog")]
    kept, held = held_out(samples, 0.3)
    assert len(kept) + len(held) == 80 and 8 < len(held) < 40
    assert not {s.image for s in kept} & {s.image for s in held}


def test_boxes_are_clipped_and_those_outside_are_gone() -> None:
    image = torch.zeros(3, 100, 200)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 100.0], [40.0, -10.0, 400.0, 300.0]])
    prepared = prepare(Sample("a", image, boxes=boxes), Transform((100, 100)))
    assert prepared.boxes is not None
    assert prepared.boxes.tolist() == [[0.0, 0.0, 100.0, 100.0]]


def test_fields_may_be_lazy() -> None:
    sample = Sample("a", lambda: torch.ones(3, 8, 8), mask=lambda: torch.ones(8, 8))
    prepared = prepare(sample, Transform((8, 8)))
    assert prepared.image.min() == 1
    assert prepared.mask is not None and bool(prepared.mask.all())


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (Sample("odd", torch.zeros(1, 8, 8)), "float tensor"),
        (Sample("odd", torch.full((3, 8, 8), float("nan"))), "NaN"),
        (Sample("odd", torch.zeros(3, 8, 8), mask=torch.zeros(4, 4)), "mask has shape"),
        (Sample("odd", torch.zeros(3, 8, 8), mask=torch.ones(8, 8), void=torch.zeros(4, 4)), "its void has"),
        (Sample("odd", torch.zeros(3, 8, 8), void=torch.ones(8, 8)), "no mask that they could be void in"),
    ],
)
def test_images_that_make_no_sense_are_named(sample: Sample, words: str) -> None:
    with pytest.raises(DataError, match=f"image 'odd' cannot be read: .*{words}"):
        prepare(sample, Transform((8, 8)))


def test_the_geometry_of_a_crop_larger_than_the_image() -> None:
    plan = geometry((10, 20), Transform((16, 16), 1.0))
    assert plan.resized == (16, 32)
    assert plan.offset == (0, 8)
