"""The dataset `dogs-vs-cats` on small copies in Kaggle's and in Microsoft's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from copies import assert_passes_the_kit, listed, paint, red

from faithmap.errors import DataError, RequestError

NAME = "dogs-vs-cats"
#: The images held out of the first forty cats.
PINNED = ["cat.5.jpg", "cat.7.jpg", "cat.10.jpg", "cat.16.jpg", "cat.23.jpg", "cat.31.jpg", "cat.37.jpg"]


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """train/cat.0.jpg and so on, beside test images that have no labels."""
    for number in (0, 1, 2, 10):
        paint(tmp_path / "train" / f"cat.{number}.jpg", (4, 4, 40, 40))
        paint(tmp_path / "train" / f"dog.{number}.jpg", (50, 4, 90, 40))
    paint(tmp_path / "test1" / "1.jpg", (4, 4, 40, 40))
    (tmp_path / "train" / "Thumbs.db").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def microsoft(tmp_path: Path) -> Path:
    """PetImages/Cat and PetImages/Dog, one file empty and one cut off, as published ones are."""
    for number in (0, 2, 10, 666):
        paint(tmp_path / "PetImages" / "Cat" / f"{number}.jpg", (4, 4, 40, 40))
    for number in (1, 5, 11702):
        paint(tmp_path / "PetImages" / "Dog" / f"{number}.jpg", (50, 4, 90, 40))
    (tmp_path / "PetImages" / "Cat" / "666.jpg").write_bytes(b"")
    cut = tmp_path / "PetImages" / "Dog" / "11702.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    (tmp_path / "PetImages" / "Dog" / "Thumbs.db").write_bytes(b"no image")
    return tmp_path


def test_kaggles_copy_passes_the_kit(kaggle: Path) -> None:
    assert_passes_the_kit(NAME, kaggle, truths=False)


def test_microsofts_copy_passes_the_kit(microsoft: Path) -> None:
    assert_passes_the_kit(NAME, microsoft, truths=False)


def test_kaggles_layout(kaggle: Path) -> None:
    samples = listed(NAME, root=kaggle)
    expected = [
        (f"{kind}.{n}.jpg", label, kind) for label, kind in enumerate(("cat", "dog")) for n in (0, 1, 2, 10)
    ]
    assert [(sample.id, sample.label, sample.name) for sample in samples] == expected
    assert samples.class_names == ("cat", "dog")
    # Cats were painted on the left.
    assert [bool(red(sample)[:, :45].any()) for sample in samples] == [True] * 4 + [False] * 4
    assert listed(NAME, root=kaggle / "train").revision == samples.revision


def test_microsofts_layout_and_its_broken_files(microsoft: Path) -> None:
    samples = listed(NAME, root=microsoft)
    assert [(sample.id, sample.label) for sample in samples] == [
        ("Cat/0.jpg", 0), ("Cat/2.jpg", 0), ("Cat/10.jpg", 0), ("Cat/666.jpg", 0),
        ("Dog/1.jpg", 1), ("Dog/5.jpg", 1), ("Dog/11702.jpg", 1),
    ]  # fmt: skip
    for sample in samples:
        if sample.id in ("Cat/666.jpg", "Dog/11702.jpg"):
            with pytest.raises(DataError, match=f"{sample.id} cannot be read as an image"):
                red(sample)
        else:
            assert red(sample).any()
    assert listed(NAME, root=microsoft / "PetImages").revision == samples.revision


def test_the_splits_are_the_same_everywhere(tmp_path: Path) -> None:
    for number in range(40):
        paint(tmp_path / "train" / f"cat.{number}.jpg", (0, 0, 2, 2), size=(4, 4))
    split = {
        name: [sample.id for sample in listed(NAME, root=tmp_path, split=name)] for name in ("train", "test")
    }
    assert not set(split["train"]) & set(split["test"])
    assert len(split["train"]) + len(split["test"]) == 40
    # Pinned: another split would mix training images into what is tested.
    assert split["test"] == PINNED


def test_a_fifth_is_held_out() -> None:
    import importlib

    module = importlib.import_module("faithmap.datasets.dogs_vs_cats")
    held = sum(
        module._split_of(f"{kind}.{n}.jpg") == "test" for kind in ("cat", "dog") for n in range(12_500)
    )
    assert abs(held / 25_000 - 0.2) < 0.01


def test_no_data_says_where_to_get_them(tmp_path: Path) -> None:
    for params in ({}, {"root": tmp_path / "none"}, {"root": tmp_path}):
        with pytest.raises(RequestError, match=r"kaggle\.com.*microsoft\.com.*give root"):
            listed(NAME, **params)


def test_half_a_download_and_an_empty_split(microsoft: Path, tmp_path: Path) -> None:
    for file in (microsoft / "PetImages" / "Cat").iterdir():
        file.unlink()
    with pytest.raises(RequestError, match="Cat holds no images such as"):
        listed(NAME, root=microsoft)
    (microsoft / "PetImages" / "Cat").rmdir()
    with pytest.raises(RequestError, match=r"holds no cat\.N\.jpg"):
        listed(NAME, root=microsoft)
    paint(tmp_path / "one" / "cat.0.jpg", (0, 0, 2, 2))
    other = "train" if "cat.0.jpg" in PINNED else "test"
    with pytest.raises(RequestError, match=f"the split '{other}' holds none"):
        listed(NAME, root=tmp_path / "one", split=other)
    with pytest.raises(RequestError, match="split: got 'val', expected one of 'all', 'train', 'test'"):
        listed(NAME, root=tmp_path / "one", split="val")
