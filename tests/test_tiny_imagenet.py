"""The dataset `tiny-imagenet`: the official layout, three numberings of the classes, boxes to the pixel."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from official import build, drawn, oracle_energy, photograph

from faithmap import conformance
from faithmap.data import load_dataset
from faithmap.errors import DataError, RequestError
from faithmap.models import Transform
from faithmap.records import Spec
from faithmap.transforms import prepare

#: As `wnids.txt` lists them, which is in no order: cat, goldfish, frog.
WNIDS = ("n02124075", "n01443537", "n01641577")
WORDS = {
    "n00001740": "entity", "n02124075": "Egyptian cat", "n01443537": "goldfish, Carassius auratus",
    "n01641577": "bullfrog, Rana catesbeiana",
}  # fmt: skip
#: File, class, box as the table states it: columns and rows from 0 to 63, both ends included.
VAL = [
    ("val_0.JPEG", "n01443537", (0, 32, 44, 62)),
    ("val_1.JPEG", "n02124075", (63, 48, 63, 54)),
    ("val_2.JPEG", "n01641577", (0, 0, 63, 63)),
    ("val_3.JPEG", "n02124075", (17, 5, 40, 20)),
]
DATA = os.environ.get("FAITHMAP_DATA", "")


def line(*words: object) -> str:
    return "\t".join(str(word) for word in words) + "\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small `tiny-imagenet-200`."""
    top = tmp_path / "tiny-imagenet-200"
    for file, _, box in VAL:
        photograph(top / "val" / "images" / file, (64, 64), [box])
    (top / "wnids.txt").write_text("".join(line(wnid) for wnid in WNIDS), encoding="utf-8")
    (top / "words.txt").write_text("".join(line(*pair) for pair in WORDS.items()), encoding="utf-8")
    table = "".join(line(file, wnid, *box) for file, wnid, box in VAL)
    (top / "val" / "val_annotations.txt").write_text(table, encoding="utf-8")
    for place, wnid in enumerate(WNIDS):
        boxes = {f"{wnid}_{number}.JPEG": (number, place, 30 + number, 40) for number in range(2)}
        for file, box in boxes.items():
            photograph(top / "train" / wnid / "images" / file, (64, 64), [box])
        table = "".join(line(file, *box) for file, box in boxes.items())
        (top / "train" / wnid / f"{wnid}_boxes.txt").write_text(table, encoding="utf-8")
    return top


@pytest.mark.parametrize("split", ["val", "train"])
def test_it_passes_the_kit(root: Path, split: str) -> None:
    results = conformance.check_dataset("tiny-imagenet", params={"root": str(root), "split": split})
    assert {result.status for result in results} == {"passed"}, results


def test_samples_of_val(root: Path) -> None:
    samples = build("tiny-imagenet", root=root)
    assert [(sample.id, sample.label, sample.name) for sample in samples] == [
        ("val_0", 1, "goldfish, Carassius auratus"),
        ("val_1", 285, "Egyptian cat"),
        ("val_2", 30, "bullfrog, Rana catesbeiana"),
        ("val_3", 285, "Egyptian cat"),
    ]
    assert samples.class_names is not None
    assert len(samples.class_names) == 1000


def test_samples_of_train(root: Path) -> None:
    samples = build("tiny-imagenet", root=root, split="train")
    assert [sample.id for sample in samples] == [
        "n01443537_0", "n01443537_1", "n01641577_0", "n01641577_1", "n02124075_0", "n02124075_1",
    ]  # fmt: skip
    for sample in samples:
        white, boxed = drawn(sample)
        assert np.array_equal(white, boxed)


def test_models_of_the_200_classes_number_them_in_two_ways(root: Path) -> None:
    sorted_ = build("tiny-imagenet", root=root, labels="tiny")
    assert [sample.label for sample in sorted_] == [0, 2, 1, 2]
    assert sorted_.class_names == (
        "goldfish, Carassius auratus",
        "bullfrog, Rana catesbeiana",
        "Egyptian cat",
    )
    listed = build("tiny-imagenet", root=root, labels="wnids")
    assert [sample.label for sample in listed] == [1, 0, 2, 0]
    assert sorted_.revision != listed.revision


def test_boxes_hold_the_pixels_that_they_name(root: Path) -> None:
    """Also one whose two ends are one column."""
    for sample in build("tiny-imagenet", root=root):
        white, boxed = drawn(sample)
        assert np.array_equal(white, boxed)
    prepared = prepare(build("tiny-imagenet", root=root)[1], Transform((128, 128), 1.0))
    assert prepared.boxes is not None
    assert prepared.boxes.tolist() == [[126, 96, 128, 110]]


def test_the_folder_above_will_do_and_is_no_part_of_the_key(root: Path) -> None:
    one = load_dataset(Spec("tiny-imagenet", {"root": str(root)}))
    two = load_dataset(Spec("tiny-imagenet", {"root": str(root.parent)}))
    assert one.key == two.key


def test_the_revision_moves_with_a_box(root: Path) -> None:
    before = build("tiny-imagenet", root=root).revision
    file = root / "val" / "val_annotations.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("\t44\t62", "\t44\t61"), encoding="utf-8")
    assert build("tiny-imagenet", root=root).revision != before


def test_a_truncated_image_costs_itself(root: Path) -> None:
    file = root / "val" / "images" / "val_0.JPEG"
    file.write_bytes(file.read_bytes()[:100])
    broken, sound, *_ = build("tiny-imagenet", root=root)
    with pytest.raises(DataError, match=r"val_0\.JPEG"):
        prepare(broken, Transform((32, 32)))
    prepare(sound, Transform((32, 32)))


class TestRefusals:
    def test_missing_folders(self, tmp_path: Path) -> None:
        with pytest.raises(
            RequestError, match=r"'tiny-imagenet' needs root; get tiny-imagenet-200\.zip from .*cs231n"
        ):
            build("tiny-imagenet")
        with pytest.raises(RequestError, match=r"no such folder: .*gone; get tiny"):
            build("tiny-imagenet", root=tmp_path / "gone")
        with pytest.raises(RequestError, match=r"holds no 'wnids\.txt'; get tiny"):
            build("tiny-imagenet", root=tmp_path)

    def test_unknown_words(self, root: Path) -> None:
        with pytest.raises(RequestError, match=r"split: got 'test', expected one of 'val', 'train'"):
            build("tiny-imagenet", root=root, split="test")
        with pytest.raises(
            RequestError, match=r"labels: got 'wnid', expected one of 'imagenet', 'tiny', 'wnids'"
        ):
            build("tiny-imagenet", root=root, labels="wnid")

    @pytest.mark.parametrize(
        "gone", ["val/val_annotations.txt", "train/n01443537/n01443537_boxes.txt", "words.txt"]
    )
    def test_missing_tables(self, root: Path, gone: str) -> None:
        (root / gone).unlink()
        with pytest.raises(
            RequestError, match=rf"{gone} cannot be read: No such file or directory; is it all unpacked"
        ):
            build(
                "tiny-imagenet",
                root=root,
                split=gone.split("/")[0].replace("words.txt", "val"),
                labels="tiny",
            )

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("val_0.JPEG\tn01443537\t1\t2\t3\n", r"val_annotations\.txt, line 1: got .* expected 6 values"),
            (
                "val_0.JPEG\tn01443537\t1\t2\t3\tx\n",
                r"line 1: malformed box '1 2 3 x'; expected four numbers",
            ),
            ("val_0.JPEG\tn01443537\t9\t2\t3\t4\n", r"malformed box '9 2 3 4'; expected x0 <= x1"),
            ("val_0.JPEG\tn00000001\t1\t2\t3\t4\n", r"line 1: the class 'n00000001' does not stand in"),
            ("val_9.JPEG\tn01443537\t1\t2\t3\t4\n", r"no images are there, .*val_9\.JPEG"),
            ("", "lists no images"),
        ],
    )
    def test_malformed_tables(self, root: Path, text: str, complaint: str) -> None:
        (root / "val" / "val_annotations.txt").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=complaint):
            build("tiny-imagenet", root=root)

    def test_a_class_that_is_none_of_imagenets(self, root: Path) -> None:
        """Copies are about that name classes by WordNet ids of other meanings."""
        (root / "wnids.txt").write_text("n02666347\n", encoding="utf-8")
        with pytest.raises(RequestError, match=r"wnids\.txt: 'n02666347' is none of the WordNet ids"):
            build("tiny-imagenet", root=root)


@pytest.mark.skipif(not DATA, reason="FAITHMAP_DATA names no folder of photographs")
def test_photographs_in_the_official_layout(tmp_path: Path) -> None:
    """Labels and boxes as the photographs' own table has them, the last pixel counted in."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    table = (Path(DATA) / "tiny_imagenet_val.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    lines, known = "", {}
    for row in rows:
        wnid, file = row["path"].split("/")
        shutil.copy(Path(DATA) / "tiny_imagenet_val" / row["path"], root / "val" / "images" / file)
        box = [int(number) for number in row["boxes"].split(",")]
        known[Path(file).stem] = (int(row["label"]), row["name"], box)
        lines += line(file, wnid, *box)
    (root / "wnids.txt").write_text(
        "".join({line(row["path"].split("/")[0]) for row in rows}), encoding="utf-8"
    )
    (root / "val" / "val_annotations.txt").write_text(lines, encoding="utf-8")
    samples = build("tiny-imagenet", root=root)
    assert len(samples) == len(rows)
    for sample in samples:
        label, name, (x0, y0, x1, y1) = known[sample.id]
        assert (sample.label, sample.name) == (label, name)
        assert callable(sample.boxes)
        assert sample.boxes().tolist() == [[x0, y0, x1 + 1, y1 + 1]]
        assert prepare(sample, Transform((64, 64))).image.isfinite().all()
    energy = oracle_energy({"name": "tiny-imagenet", "root": str(root)}, Path(DATA), tmp_path / "run")
    assert len(energy) >= 50
    assert (energy - 100).abs().max() <= 0.1
