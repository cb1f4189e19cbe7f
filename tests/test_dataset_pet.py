"""The dataset `oxford-iiit-pet` on a small copy in its official layout."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import inside as inside_plugin
from copies import (
    SIZE,
    assert_exact_after_the_transform,
    assert_passes_the_kit,
    boxes_of,
    by_id,
    inside,
    listed,
    mask_of,
    packed,
    paint,
    red,
    save_grey,
    served,
)

from faithmap.errors import DataError, RequestError

NAME = "oxford-iiit-pet"
#: Lines of list.txt with the split: cats begin with a capital. Classes need not be complete.
TEST = ("Abyssinian_201 1 1 1", "american_bulldog_203 2 2 1", "Bengal_100 6 1 2")
TRAINVAL = ("Abyssinian_100 1 1 1", "american_bulldog_100 2 2 1")
BOX = (20, 12, 60, 44)
XML = """<annotation><folder>OXIIIT</folder><filename>{name}.jpg</filename>
<size><width>96</width><height>64</height><depth>3</depth></size>
<object><name>cat</name><pose>Frontal</pose><bndbox><xmin>23</xmin><ymin>15</ymin><xmax>40</xmax>
<ymax>30</ymax></bndbox></object></annotation>"""


def grown(by: int) -> np.ndarray:
    x0, y0, x1, y1 = BOX
    return inside((x0 - by, y0 - by, x1 + by, y1 + by))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """oxford-iiit-pet/: the red pet with two pixels of border around it, and inside it for Bengals."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations" / "xmls").mkdir(parents=True)
    header = "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n"
    lists = {"list": (*TRAINVAL, *TEST), "test": TEST, "trainval": TRAINVAL}
    for name, rows in lists.items():
        text = (header if name == "list" else "") + "\n".join(rows) + "\n"
        (base / "annotations" / f"{name}.txt").write_text(text, encoding="utf-8")
    for row in (*TEST, *TRAINVAL):
        name = row.split()[0]
        paint(base / "images" / f"{name}.jpg", BOX)
        trimap = np.where(grown(0), 1, np.where(grown(2), 3, 2))
        if name.startswith("Bengal"):
            trimap = np.where(grown(-2), 1, np.where(grown(0), 3, 2))
        save_grey(base / "annotations" / "trimaps" / f"{name}.png", trimap, "P" if "bull" in name else "L")
    for row in TRAINVAL:
        name = row.split()[0]
        (base / "annotations" / "xmls" / f"{name}.xml").write_text(XML.format(name=name), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("more", ["", ",labels=species", ",border=pet", ",split=trainval"])
def test_it_passes_the_kit(root: Path, more: str) -> None:
    assert_passes_the_kit(NAME, root, more)


@pytest.mark.parametrize("split", ["test", "trainval"])
def test_torchvision_lists_the_same(root: Path, split: str) -> None:
    from torchvision.datasets import OxfordIIITPet

    theirs = OxfordIIITPet(root, split=split, target_types=["category", "binary-category", "segmentation"])
    ours = listed(NAME, root=root, split=split)
    kinds = listed(NAME, root=root, split=split, labels="species")
    assert len(theirs) == len(ours)
    for (image, (breed, species, trimap)), sample, kind in zip(theirs, ours, kinds, strict=True):
        assert (sample.label, kind.label) == (breed, species)
        assert callable(sample.image)
        assert np.array_equal(np.asarray(sample.image()), np.asarray(image))
        assert np.array_equal(mask_of(sample).numpy(), np.asarray(trimap) == 1)
        assert callable(sample.void)
        assert np.array_equal(sample.void().numpy(), np.asarray(trimap) == 3)
    named = [name for name in ours.class_names or () if name]
    assert named == theirs.classes
    assert kinds.class_names == tuple(theirs.bin_classes)


def test_labels_and_names(root: Path) -> None:
    samples = listed(NAME, root=root / "oxford-iiit-pet")
    assert [(sample.id, sample.label, sample.name) for sample in samples] == [
        ("Abyssinian_201.jpg", 0, "Abyssinian"),
        ("american_bulldog_203.jpg", 1, "American Bulldog"),
        ("Bengal_100.jpg", 5, "Bengal"),
    ]
    assert samples.class_names == ("Abyssinian", "American Bulldog", "", "", "", "Bengal")
    species = listed(NAME, root=root, labels="species")
    assert [(sample.label, sample.name) for sample in species] == [(0, "Cat"), (1, "Dog"), (0, "Cat")]


def test_breeds_that_imagenet_knows(root: Path) -> None:
    with pytest.raises(RequestError, match="none of the images is of a breed that ImageNet has"):
        listed(NAME, root=root, labels="imagenet")
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "test.txt").write_text("\n".join((*TEST, "Siamese_7 34 1 12", "pug_3 27 2 18")))
    for name in ("Siamese_7", "pug_3"):
        paint(base / "images" / f"{name}.jpg", BOX)
        save_grey(base / "annotations" / "trimaps" / f"{name}.png", np.where(grown(0), 1, 2))
    samples = listed(NAME, root=root, labels="imagenet")
    assert [(sample.id, sample.label, sample.name) for sample in samples] == [
        ("Siamese_7.jpg", 284, "Siamese"), ("pug_3.jpg", 254, "Pug"),
    ]  # fmt: skip
    assert samples.class_names is not None and samples.class_names[254].startswith("pug")
    assert_exact_after_the_transform(samples[0])


def test_every_breed_is_the_class_of_that_name() -> None:
    from faithmap.imagenet_classes import imagenet_classes

    classes, wnids = imagenet_classes(), inside_plugin(NAME, "dataset").WNIDS
    assert len(wnids) == len(set(wnids.values())) == 24
    for breed, wnid in wnids.items():
        words = classes.names[classes.labels[wnid]].lower().replace("-", "")
        first = {"Japanese Chin": "japanese", "Wheaten Terrier": "wheaten"}.get(
            breed, breed.split()[0].lower()
        )
        assert first.removesuffix("er") in words, (breed, words)


def test_the_border_is_void_or_belongs_to_the_pet_or_to_the_background(root: Path) -> None:
    void, counted, left_out = (
        by_id(listed(NAME, root=root, border=border)) for border in ("void", "pet", "background")
    )
    for name, least, most in (
        ("Abyssinian_201", 0, 2),
        ("american_bulldog_203", 0, 2),
        ("Bengal_100", -2, 0),
    ):
        assert np.array_equal(mask_of(counted[f"{name}.jpg"]).numpy(), grown(most))
        assert np.array_equal(mask_of(left_out[f"{name}.jpg"]).numpy(), grown(least))
        assert np.array_equal(mask_of(void[f"{name}.jpg"]).numpy(), grown(least))
        around = void[f"{name}.jpg"].void
        assert callable(around)
        assert np.array_equal(around().numpy(), grown(most) & ~grown(least))
    assert all(sample.void is None for sample in (*counted.values(), *left_out.values()))
    with pytest.raises(RequestError, match="border: got 'true'"):
        listed(NAME, root=root, border="true")
    assert_exact_after_the_transform(left_out["Abyssinian_201.jpg"])
    assert_exact_after_the_transform(left_out["american_bulldog_203.jpg"])
    assert_exact_after_the_transform(counted["Bengal_100.jpg"])
    assert all(sample.boxes is None for sample in counted.values())


def test_a_pet_that_exif_turns_keeps_its_mask(root: Path) -> None:
    paint(root / "oxford-iiit-pet" / "images" / "Abyssinian_201.jpg", BOX, turn=8)
    sample = listed(NAME, root=root)[0]
    assert callable(sample.void) and sample.void().shape == SIZE
    assert mask_of(sample).shape == SIZE
    assert torch.equal(mask_of(sample), red(sample))


def test_head_boxes_count_pixels_from_one(root: Path) -> None:
    samples = listed(NAME, root=root, split="trainval", truth="head")
    assert [boxes_of(sample) for sample in samples] == [[[22.0, 14.0, 40.0, 30.0]]] * 2
    assert all(sample.mask is None for sample in samples)
    (root / "oxford-iiit-pet" / "annotations" / "xmls" / "Abyssinian_100.xml").unlink()
    without, with_head = listed(NAME, root=root, split="trainval", truth="head")
    assert without.boxes is None
    assert with_head.boxes is not None


def test_test_images_have_no_heads(root: Path) -> None:
    with pytest.raises(RequestError, match=r"no image of the split 'test' has its head's box.*\"trainval\""):
        listed(NAME, root=root, truth="head")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><bndbox>", r"Abyssinian_100\.xml is not XML"),
        (XML.replace("<xmin>23</xmin>", ""), r"Abyssinian_100\.xml: expected numbers as xmin"),
        (XML.replace(">40<", ">wide<"), r"Abyssinian_100\.xml: expected numbers as xmin"),
    ],
)
def test_a_malformed_head_is_named(root: Path, text: str, message: str) -> None:
    (root / "oxford-iiit-pet" / "annotations" / "xmls" / "Abyssinian_100.xml").write_text(text)
    with pytest.raises(RequestError, match=message):
        listed(NAME, root=root, split="trainval", truth="head")


def test_no_data_says_where_to_get_them(tmp_path: Path) -> None:
    for params in ({}, {"root": tmp_path / "none"}, {"root": tmp_path}):
        with pytest.raises(RequestError, match=r"images\.tar\.gz.*robots\.ox\.ac\.uk.*give root"):
            listed(NAME, **params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Bengal_100 6 1", r"test\.txt, line 3: expected 'image class_id species breed_id'"),
        ("Bengal_100 38 1 2", r"line 3: the class id is '38', expected a whole number from 1 to 37"),
        ("Bengal_100 6 3 2", r"line 3: the species is '3', expected a whole number from 1 to 2"),
        ("Abyssinian_201 1 1 1", r"line 3: the image 'Abyssinian_201' occurs twice"),
        ("Bengal_100 1 1 1", r"line 3: class 1 is 'Bengal' here and 'Abyssinian' further up"),
    ],
)
def test_malformed_lines_are_named(root: Path, row: str, message: str) -> None:
    file = root / "oxford-iiit-pet" / "annotations" / "test.txt"
    file.write_text("\n".join((*TEST[:2], row)), encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        listed(NAME, root=root)


def test_missing_and_empty_lists(root: Path) -> None:
    file = root / "oxford-iiit-pet" / "annotations" / "test.txt"
    file.write_text("# nothing\n")
    with pytest.raises(RequestError, match=r"test\.txt lists no images"):
        listed(NAME, root=root)
    file.unlink()
    with pytest.raises(RequestError, match=r"test\.txt cannot be read: No such file"):
        listed(NAME, root=root)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"split": "train"}, "split: got 'train', expected one of 'test', 'trainval'"),
        ({"labels": "breeds"}, "labels: got 'breeds', expected one of 'breed', 'species'"),
        ({"truth": "box"}, "truth: got 'box', expected one of 'mask', 'head'"),
    ],
)
def test_bad_parameters(root: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        listed(NAME, root=root, **params)


def test_broken_files_cost_themselves_alone(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "images" / "Abyssinian_201.jpg").write_bytes(b"")
    save_grey(base / "annotations" / "trimaps" / "american_bulldog_203.png", np.full((30, 30), 1))
    save_grey(base / "annotations" / "trimaps" / "Bengal_100.png", np.zeros(SIZE[::-1]))
    empty, small, odd = listed(NAME, root=root)
    with pytest.raises(DataError, match=r"Abyssinian_201\.jpg cannot be read as an image"):
        red(empty)
    with pytest.raises(
        DataError, match=r"american_bulldog_203\.png has 30 x 30 pixels, its image .* 96 x 64"
    ):
        mask_of(small)
    with pytest.raises(DataError, match=r"the trimap holds \[0\], expected 1 \(pet\), 2"):
        mask_of(odd)
    (base / "annotations" / "trimaps" / "Bengal_100.png").unlink()
    with pytest.raises(DataError, match=r"Bengal_100\.png cannot be read as a mask"):
        mask_of(listed(NAME, root=root)[2])


def test_a_trimap_without_a_pet_is_an_empty_mask(root: Path) -> None:
    save_grey(root / "oxford-iiit-pet" / "annotations" / "trimaps" / "Bengal_100.png", np.full(SIZE[::-1], 2))
    sample = listed(NAME, root=root)[2]
    assert red(sample).any()
    assert not mask_of(sample).any()


def test_archives_are_kept_over_an_interruption_wherever_they_lie(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision puts them in the dataset's folder; what was unpacked of them is not trusted."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    base = root / "new"
    left = base / ".oxford-iiit-pet.unfinished" / "oxford-iiit-pet"
    (left / "images").mkdir(parents=True)
    (left / "images" / "half.jpg").write_bytes(b"half")
    (left / "images.tar.gz").write_bytes(b"an archive")
    found = []

    def download(folder: Path) -> None:
        found.extend(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")))
        raise OSError("no network")

    with pytest.raises(RequestError, match="cannot be downloaded: no network"):
        importlib.import_module("faithmap.datasets.oxford_iiit_pet").HOME.fetch(base, download)
    assert found == ["oxford-iiit-pet", "oxford-iiit-pet/images.tar.gz"]


def test_torchvision_downloads_and_checks(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import OxfordIIITPet

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    new = tmp_path_factory.mktemp("new")
    base = root / "oxford-iiit-pet"
    sums = [packed(base / f"{name}.tar.gz", base, name) for name in ("images", "annotations")]
    with served(base) as address:
        places = [f"{address}/{name}.tar.gz" for name in ("images", "annotations")]
        monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", [(places[0], sums[1])])
        with pytest.raises(RequestError, match=r"cannot be downloaded: .*corrupted.*give root"):
            listed(NAME, root=new, download=True)
        monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", list(zip(places, sums, strict=True)))
        assert listed(NAME, root=new, download=True).revision == listed(NAME, root=root).revision
