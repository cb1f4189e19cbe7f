"""The dataset `food-101` on a small copy in its official layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from copies import assert_passes_the_kit, listed, packed, paint, red, served

from faithmap.errors import DataError, RequestError

NAME = "food-101"
DISHES = ("apple_pie", "baby_back_ribs", "waffles")
LISTS = {
    "train": {dish: [f"{dish}/{1000 + i}" for i in range(2)] for dish in reversed(DISHES)},
    "test": {dish: [f"{dish}/{2000 + i}" for i in (3, 1)] for dish in reversed(DISHES)},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """food-101/ with meta/ and images/."""
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, content in LISTS.items():
        (base / "meta" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        paths = [path for listing in content.values() for path in listing]
        (base / "meta" / f"{split}.txt").write_text("\n".join(paths) + "\n", encoding="utf-8")
        for place, path in enumerate(paths):
            paint(base / "images" / f"{path}.jpg", (10, 10, 40 + 2 * place, 40))
    (base / "meta" / "classes.txt").write_text("\n".join(DISHES), encoding="utf-8")
    return tmp_path


def test_it_passes_the_kit(root: Path) -> None:
    assert_passes_the_kit(NAME, root, truths=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_lists_the_same(root: Path, split: str) -> None:
    from torchvision.datasets import Food101

    theirs = Food101(root, split=split)
    ours = listed(NAME, root=root, split=split)
    images = [file.relative_to(root / "food-101" / "images").as_posix() for file in theirs._image_files]
    labels = dict(zip(images, theirs._labels, strict=True))
    assert {sample.id: sample.label for sample in ours} == labels
    assert theirs.class_to_idx == {dish: label for label, dish in enumerate(DISHES)}
    assert ours.class_names == ("apple pie", "baby back ribs", "waffles")


def test_samples_and_the_folder_itself(root: Path) -> None:
    samples = listed(NAME, root=root / "food-101")
    assert [(sample.id, sample.label, sample.name) for sample in samples][:3] == [
        ("apple_pie/2003.jpg", 0, "apple pie"),
        ("apple_pie/2001.jpg", 0, "apple pie"),
        ("baby_back_ribs/2003.jpg", 1, "baby back ribs"),
    ]
    assert all(sample.boxes is None and sample.mask is None for sample in samples)
    assert red(samples[0]).any()
    assert samples.revision == listed(NAME, root=str(root)).revision


def test_text_lists_do_where_there_are_no_others(root: Path) -> None:
    before = listed(NAME, root=root)
    (root / "food-101" / "meta" / "test.json").unlink()
    after = listed(NAME, root=root)
    assert [sample.id for sample in after] == [sample.id for sample in before]
    assert after.revision == before.revision


def test_no_data_says_where_to_get_them(tmp_path: Path) -> None:
    for params in ({}, {"root": tmp_path / "none"}, {"root": tmp_path}):
        with pytest.raises(RequestError, match=r"food-101\.tar\.gz.*ethz\.ch.*give root"):
            listed(NAME, **params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"apple_pie": ', r"test\.json is not JSON: .*line 1"),
        ("[]", r"test\.json lists no classes; expected {\"class\""),
        ('{"apple_pie": "apple_pie/1"}', r"test\.json: the class 'apple_pie' has apple_pie/1; expected"),
        ('{"apple_pie": ["waffles/1"]}', r"the class 'apple_pie' has \['waffles/1'\]"),
        ('{"apple_pie": ["apple_pie/1", "apple_pie/1"]}', "the image 'apple_pie/1' occurs twice"),
    ],
)
def test_a_malformed_list_is_named(root: Path, text: str, message: str) -> None:
    (root / "food-101" / "meta" / "test.json").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        listed(NAME, root=root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apple_pie/1\napple_pie\n", r"test\.txt, line 2: expected 'class/image', got 'apple_pie'"),
        ("apple_pie/1\n\napple_pie/1\n", r"test\.txt, line 3: the image 'apple_pie/1' occurs twice"),
        ("\n", r"test\.txt lists no images"),
    ],
)
def test_a_malformed_text_list_is_named(root: Path, text: str, message: str) -> None:
    (root / "food-101" / "meta" / "test.json").unlink()
    (root / "food-101" / "meta" / "test.txt").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        listed(NAME, root=root)


def test_missing_lists_splits_and_images(root: Path) -> None:
    with pytest.raises(RequestError, match="split: got 'validation', expected one of 'test', 'train'"):
        listed(NAME, root=root, split="validation")
    for ending in ("json", "txt"):
        (root / "food-101" / "meta" / f"test.{ending}").unlink()
    with pytest.raises(RequestError, match=r"test\.json cannot be read: No such file"):
        listed(NAME, root=root)
    for file in (root / "food-101" / "images").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(RequestError, match=r"none of the 6 images .* is there"):
        listed(NAME, root=root, split="train")


def test_broken_images_cost_themselves_alone(root: Path) -> None:
    images = root / "food-101" / "images" / "apple_pie"
    (images / "2003.jpg").write_bytes(b"")
    (images / "2001.jpg").unlink()
    empty, gone, sound, *_ = listed(NAME, root=root)
    for sample, name in ((empty, "2003"), (gone, "2001")):
        with pytest.raises(DataError, match=rf"{name}\.jpg cannot be read"):
            red(sample)
    assert red(sound).any()


def test_torchvision_downloads_and_checks(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import Food101

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    new = tmp_path_factory.mktemp("new")
    md5 = packed(root / "food-101.tar.gz", root, "food-101")
    with served(root) as address:
        monkeypatch.setattr(Food101, "_URL", f"{address}/food-101.tar.gz")
        monkeypatch.setattr(Food101, "_MD5", "0" * 32)
        with pytest.raises(RequestError, match=r"cannot be downloaded: .*corrupted.*give root"):
            listed(NAME, root=new, download=True)
        monkeypatch.setattr(Food101, "_MD5", md5)
        assert listed(NAME, root=new, download=True).revision == listed(NAME, root=root).revision
    assert listed(NAME, root=new, download=True).revision == listed(NAME, root=root).revision
