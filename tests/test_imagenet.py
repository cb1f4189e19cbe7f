"""The dataset `imagenet`: the official layouts, labels in the models' order, boxes to the pixel."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from official import annotation, build, devkit, drawn, oracle_energy, photograph

from faithmap import conformance
from faithmap.data import load_dataset
from faithmap.errors import DataError, RequestError
from faithmap.imagenet_classes import imagenet_classes
from faithmap.models import Transform
from faithmap.records import Spec
from faithmap.registry import get
from faithmap.transforms import prepare

TENCH, GOLDFISH, TOILET_TISSUE = "n01440764", "n01443537", "n15075141"
#: Number, class, size, boxes as the files state them: columns and rows from 0, both ends included.
IMAGES = [
    (3, TENCH, (50, 40), [(10, 5, 30, 20)]),
    (7, GOLDFISH, (40, 60), [(0, 0, 9, 59), (20, 30, 39, 44)]),
    (12, TOILET_TISSUE, (64, 64), [(0, 0, 63, 63)]),
    (21, TENCH, (48, 48), [(5, 7, 5, 7)]),
]
DATA = os.environ.get("FAITHMAP_DATA", "")


def name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Images in one folder, with the devkit and the boxes unpacked beside it."""
    root = tmp_path / "flat"
    for number, wnid, size, boxes in IMAGES:
        photograph(root / "ILSVRC2012_img_val" / f"{name(number)}.JPEG", size, boxes)
        file = root / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(number)}.xml"
        annotation(file, size, [(wnid, box) for box in boxes])
    devkit(root / "ILSVRC2012_devkit_t12", {number: wnid for number, wnid, _, _ in IMAGES})
    return root


@pytest.fixture
def sorted_(flat: Path, tmp_path: Path) -> Path:
    """The same images in class folders, as torchvision sorts them, with the boxes in the archive's folder."""
    root = tmp_path / "sorted"
    for number, wnid, _, _ in IMAGES:
        (root / "val" / wnid).mkdir(parents=True, exist_ok=True)
        shutil.copy(flat / "ILSVRC2012_img_val" / f"{name(number)}.JPEG", root / "val" / wnid)
    shutil.copytree(flat / "ILSVRC2012_bbox_val_v3" / "val", root / "Annotations" / "CLS-LOC" / "val")
    return root


@pytest.fixture
def kaggle(flat: Path, tmp_path: Path) -> Path:
    """The same images as Kaggle packs them, with its table."""
    root = tmp_path / "kaggle"
    shutil.copytree(flat / "ILSVRC2012_img_val", root / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    with (root / "LOC_val_solution.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "PredictionString"])
        for number, wnid, _, boxes in reversed(IMAGES):
            text = " ".join(f"{wnid} {x0} {y0} {x1} {y1}" for x0, y0, x1, y1 in boxes)
            table.writerow([name(number), text + " "])
    return root


class TestLayouts:
    def test_every_layout_passes_the_kit(self, flat: Path, sorted_: Path, kaggle: Path) -> None:
        for root in (flat, sorted_, kaggle):
            results = conformance.check_dataset("imagenet", params={"root": str(root)})
            assert {result.status for result in results} == {"passed"}, results

    def test_every_layout_gives_the_same_samples(self, flat: Path, sorted_: Path, kaggle: Path) -> None:
        first = build("imagenet", root=flat)
        assert [(sample.id, sample.label) for sample in first] == [
            (name(3), 0), (name(7), 1), (name(12), 999), (name(21), 0),
        ]  # fmt: skip
        for root in (sorted_, kaggle):
            for one, two in zip(first, build("imagenet", root=root), strict=True):
                assert (one.id, one.label, one.name) == (two.id, two.label, two.name)
                assert callable(one.boxes)
                assert callable(two.boxes)
                assert torch.equal(one.boxes(), two.boxes())
        assert build("imagenet", root=sorted_).revision == first.revision

    def test_images_of_one_box_may_be_asked_for(self, flat: Path, sorted_: Path, kaggle: Path) -> None:
        for root in (flat, sorted_, kaggle):
            chosen = build("imagenet", root=root, one_box=True)
            assert [sample.id for sample in chosen] == [name(3), name(12), name(21)]  # the goldfish has two
            assert chosen.revision != build("imagenet", root=root).revision
        shutil.rmtree(flat / "ILSVRC2012_bbox_val_v3")
        with pytest.raises(
            RequestError, match=r"one_box: none of the 4 images in .* has one box of its class"
        ):
            build("imagenet", root=flat, one_box=True)

    def test_training_images_have_the_labels_of_their_folders(self, tmp_path: Path) -> None:
        """Of all thousand classes, however few are there."""
        for wnid in (TENCH, TOILET_TISSUE):
            for number in (2, 10):
                photograph(tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG", (20, 30), [])
        (tmp_path / "train" / "notes.txt").write_text("no image")
        (tmp_path / "train" / TENCH / f"._{TENCH}_2.JPEG").write_bytes(b"what macOS leaves beside a file")
        samples = build("imagenet", root=tmp_path, split="train")
        assert {sample.id: sample.label for sample in samples} == {
            f"{TENCH}_2": 0, f"{TENCH}_10": 0, f"{TOILET_TISSUE}_2": 999, f"{TOILET_TISSUE}_10": 999,
        }  # fmt: skip
        assert samples[0].name == "tench, Tinca tinca" and samples[0].boxes is None
        assert prepare(samples[0], Transform((16, 16))).image.shape == (3, 16, 16)
        results = conformance.check_dataset("imagenet", params={"root": str(tmp_path), "split": "train"})
        assert not conformance.failures(results), results
        with pytest.raises(RequestError, match="the training images have no boxes here: leave out one_box"):
            build("imagenet", root=tmp_path, split="train", one_box=True)
        with pytest.raises(RequestError, match="split: got 'trian', expected one of 'val', 'train'"):
            build("imagenet", root=tmp_path, split="trian")
        (tmp_path / "train" / TENCH).rename(tmp_path / "train" / "n00000001")
        with pytest.raises(RequestError, match="'n00000001' is none of the WordNet ids"):
            build("imagenet", root=tmp_path, split="train")
        with pytest.raises(RequestError, match="holds no training images in folders of WordNet ids"):
            build("imagenet", root=tmp_path / "train", split="train")

    def test_labels_are_the_models_and_not_the_devkits(self, flat: Path) -> None:
        """The devkit numbers its classes in another order, from 1."""
        samples = build("imagenet", root=flat)
        assert samples[0].name == "tench, Tinca tinca"
        assert samples.class_names is not None
        assert samples.class_names[999].startswith("toilet tissue")
        assert len(samples.class_names) == 1000

    def test_names_and_order_are_those_of_the_models(self) -> None:
        classes = imagenet_classes()
        assert list(classes.wnids) == sorted(classes.wnids)
        assert [classes.labels[wnid] for wnid in (TENCH, "n02124075", "n03000684", TOILET_TISSUE)] == [
            0, 285, 491, 999,
        ]  # fmt: skip
        assert classes.names[285] == "Egyptian cat"

    def test_without_boxes(self, sorted_: Path) -> None:
        with_boxes = build("imagenet", root=sorted_).revision
        shutil.rmtree(sorted_ / "Annotations")
        samples = build("imagenet", root=sorted_)
        assert all(sample.boxes is None for sample in samples)
        assert samples.revision != with_boxes
        assert load_dataset(Spec("imagenet", {"root": str(sorted_)})).gives == {"label"}

    def test_the_parts_may_lie_elsewhere(self, flat: Path, sorted_: Path, tmp_path: Path) -> None:
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        for part in ("ILSVRC2012_devkit_t12", "ILSVRC2012_bbox_val_v3"):
            shutil.move(flat / part, moved / part)
        given = {"annotations": moved / "ILSVRC2012_bbox_val_v3", "devkit": moved / "ILSVRC2012_devkit_t12"}
        assert build("imagenet", root=flat, **given).revision == build("imagenet", root=sorted_).revision

    def test_where_things_lie_is_no_part_of_the_key(self, flat: Path, sorted_: Path) -> None:
        one = load_dataset(Spec("imagenet", {"root": str(flat)}))
        two = load_dataset(
            Spec("imagenet", {"root": str(sorted_), "annotations": str(sorted_ / "Annotations/CLS-LOC/val")})
        )
        assert one.key == two.key


class TestDevkit:
    def test_its_archive_is_checked_and_read_by_torchvision(
        self, flat: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.datasets import imagenet as official

        archive = flat / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            file.add(flat / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
        shutil.rmtree(flat / "ILSVRC2012_devkit_t12")
        with pytest.raises(RequestError, match=r"devkit_t12\.tar\.gz is not the devkit .*damaged"):
            build("imagenet", root=flat)
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(official.ARCHIVE_META, "devkit", (archive.name, md5))
        assert [sample.label for sample in build("imagenet", root=flat)] == [0, 1, 999, 0]
        assert not (flat / "meta.bin").exists()

    def test_what_torchvision_made_of_it_will_do(self, flat: Path) -> None:
        shutil.rmtree(flat / "ILSVRC2012_devkit_t12")
        wnids = [TENCH] * 21
        wnids[6], wnids[11] = GOLDFISH, TOILET_TISSUE
        torch.save(({TENCH: ("tench",)}, wnids), flat / "meta.bin")
        assert [sample.label for sample in build("imagenet", root=flat)] == [0, 1, 999, 0]
        (flat / "meta.bin").write_bytes(b"no archive")
        with pytest.raises(RequestError, match=r"meta\.bin is not what torchvision makes"):
            build("imagenet", root=flat)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [("1\n2\n", "says nothing of the image ILSVRC2012_val_00000003"), ("1\nfish\n", "line 2: 'fish'"),
         ("1001\n", "line 1: '1001' is no class"), ("0\n", "line 1: '0' is no class")],
    )  # fmt: skip
    def test_a_wrong_ground_truth(self, flat: Path, text: str, complaint: str) -> None:
        data = flat / "ILSVRC2012_devkit_t12" / "data"
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=complaint):
            build("imagenet", root=flat)

    def test_a_wrong_table_of_synsets(self, flat: Path) -> None:
        file = flat / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
        file.write_bytes(b"no table")
        with pytest.raises(RequestError, match=r"meta\.mat cannot be read as the devkit's table"):
            build("imagenet", root=flat)
        file.unlink()
        with pytest.raises(RequestError, match=r"no such file: .*meta\.mat"):
            build("imagenet", root=flat)


class TestBoxes:
    def test_they_lie_on_the_objects_to_the_pixel(self, flat: Path, kaggle: Path) -> None:
        for root in (flat, kaggle):
            for sample in build("imagenet", root=root):
                white, boxed = drawn(sample)
                assert np.array_equal(white, boxed)

    def test_after_a_transform_too(self, flat: Path) -> None:
        """Without a resize the crop alone moves them."""
        prepared = prepare(build("imagenet", root=flat)[2], Transform((64, 64), 1.0))
        assert prepared.boxes is not None
        assert prepared.boxes.tolist() == [[0, 0, 64, 64]]
        prepared = prepare(build("imagenet", root=flat)[0], Transform((40, 40), 1.0))
        assert prepared.boxes is not None
        white = (prepared.image[0] > 0.5).nonzero()
        (x0, y0, x1, y1) = prepared.boxes[0].tolist()
        assert [y0, x0] == white.min(0).values.tolist()
        assert [y1, x1] == (white.max(0).values + 1).tolist()

    def test_objects_of_other_classes_are_left_out(self, flat: Path) -> None:
        folder = flat / "ILSVRC2012_bbox_val_v3" / "val"
        annotation(folder / f"{name(3)}.xml", (50, 40), [(GOLDFISH, (0, 0, 4, 4)), (TENCH, (1, 1, 2, 2))])
        annotation(folder / f"{name(7)}.xml", (40, 60), [(TENCH, (0, 0, 4, 4))])
        first, second, *_ = build("imagenet", root=flat)
        assert callable(first.boxes)
        assert first.boxes().tolist() == [[1, 1, 3, 3]]
        assert second.boxes is None

    def test_a_resized_copy_has_its_boxes_scaled(self, flat: Path) -> None:
        photograph(flat / "ILSVRC2012_img_val" / f"{name(3)}.JPEG", (100, 40), [(20, 5, 61, 20)])
        white, boxed = drawn(build("imagenet", root=flat)[0])
        assert np.array_equal(white, boxed)

    def test_a_turned_copy_is_refused_when_it_is_loaded(self, flat: Path) -> None:
        photograph(flat / "ILSVRC2012_img_val" / f"{name(3)}.JPEG", (40, 50))
        with pytest.raises(DataError, match=r"has 40 x 50 pixels, .* image of 50 x 40; it was turned"):
            prepare(build("imagenet", root=flat)[0], Transform((32, 32)))

    def test_a_size_that_is_not_stated_is_that_of_the_file(self, flat: Path) -> None:
        annotation(
            flat / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(3)}.xml", (0, 0), [(TENCH, (10, 5, 30, 20))]
        )
        white, boxed = drawn(build("imagenet", root=flat)[0])
        assert np.array_equal(white, boxed)

    def test_a_box_that_reaches_out_is_cut_and_one_outside_is_gone(self, flat: Path) -> None:
        annotation(
            flat / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(12)}.xml",
            (64, 64),
            [(TOILET_TISSUE, (32, 32, 99, 80)), (TOILET_TISSUE, (70, 70, 90, 90))],
        )
        prepared = prepare(build("imagenet", root=flat)[2], Transform((64, 64), 1.0))
        assert prepared.boxes is not None
        assert prepared.boxes.tolist() == [[32, 32, 64, 64]]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("<annotation><object>", r"00000003\.xml cannot be read as XML"),
            ("<html></html>", r"holds <html>; expected <annotation>"),
            ("<annotation><object><bndbox/></object></annotation>", "without a <name>"),
            ("<annotation><object><name>n01440764</name></object></annotation>", "xmin missing"),
            (
                "<annotation><object><name>n01440764</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>2</xmax>"
                "<ymax>3</ymax></bndbox></object></annotation>",
                "malformed box of 'n01440764': xmin 9, ymin 1, xmax 2",
            ),
        ],
    )
    def test_a_malformed_file_costs_its_own_image(self, flat: Path, text: str, complaint: str) -> None:
        file = flat / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(3)}.xml"
        file.write_text(text, encoding="utf-8")
        broken, sound, *_ = build("imagenet", root=flat)
        with pytest.raises(DataError, match=complaint):
            prepare(broken, Transform((32, 32)))
        prepare(sound, Transform((32, 32)))

    def test_a_truncated_image_costs_itself(self, flat: Path) -> None:
        file = flat / "ILSVRC2012_img_val" / f"{name(3)}.JPEG"
        file.write_bytes(file.read_bytes()[:300])
        with pytest.raises(DataError, match=r"00000003"):
            prepare(build("imagenet", root=flat)[0], Transform((32, 32)))

    @pytest.mark.parametrize(("mode", "colour"), [("L", 255), ("CMYK", (0, 0, 0, 0))])
    def test_grey_and_cmyk_files_are_read_as_colours(self, flat: Path, mode: str, colour: object) -> None:
        """Both occur among the validation images."""
        file = flat / "ILSVRC2012_img_val" / f"{name(12)}.JPEG"
        PIL.Image.new(mode, (64, 64), colour).save(file, "JPEG")  # type: ignore[arg-type]
        prepared = prepare(build("imagenet", root=flat)[2], Transform((64, 64), 1.0))
        assert prepared.image.min() > 0.99


class TestRefusals:
    def test_no_root_says_where_to_get_it(self) -> None:
        with pytest.raises(RequestError, match=r"no root; get the validation images .* at image-net\.org"):
            build("imagenet")

    def test_no_folder_and_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"no such folder: .*gone; get the validation"):
            build("imagenet", root=tmp_path / "gone")
        with pytest.raises(RequestError, match=r"holds no images named ILSVRC2012_val_00000001\.JPEG"):
            build("imagenet", root=tmp_path)

    def test_nothing_says_the_labels(self, flat: Path) -> None:
        shutil.rmtree(flat / "ILSVRC2012_devkit_t12")
        with pytest.raises(RequestError, match=r"nothing in .* says the labels"):
            build("imagenet", root=flat)
        with pytest.raises(RequestError, match=r"nothing in .*gone says the labels"):
            build("imagenet", root=flat, devkit=flat / "gone")

    def test_no_such_boxes(self, flat: Path) -> None:
        with pytest.raises(RequestError, match=r"no such file or folder: .*gone"):
            build("imagenet", root=flat, annotations=flat / "gone")
        with pytest.raises(RequestError, match=r"holds no files ILSVRC2012_val_\*\.xml"):
            build("imagenet", root=flat, annotations=flat / "ILSVRC2012_img_val")

    def test_a_folder_that_is_no_class(self, sorted_: Path) -> None:
        (sorted_ / "val" / TENCH).rename(sorted_ / "val" / "n00000001")
        with pytest.raises(RequestError, match=r"'n00000001' is none of the WordNet ids"):
            build("imagenet", root=sorted_)

    def test_an_image_twice(self, sorted_: Path) -> None:
        shutil.copy(sorted_ / "val" / TENCH / f"{name(3)}.JPEG", sorted_ / "val" / GOLDFISH)
        with pytest.raises(RequestError, match=r"00000003 is there twice"):
            build("imagenet", root=sorted_)

    @pytest.mark.parametrize(
        "text", ["", "tench 1 2 3 4", "n01440764 1 2 3", "n01440764 9 2 3 4", "n01440764 a b c d"]
    )
    def test_a_malformed_table(self, kaggle: Path, text: str) -> None:
        table = f"ImageId,PredictionString\n{name(3)},{text}\n"
        (kaggle / "LOC_val_solution.csv").write_text(table, encoding="utf-8")
        with pytest.raises(RequestError, match=r"LOC_val_solution\.csv, line 2: '.*' is no list of objects"):
            build("imagenet", root=kaggle)


def test_its_facts() -> None:
    facts = get("dataset", "imagenet").facts
    assert facts.license
    assert facts.citation
    assert facts.gives == {"label", "box"}


@pytest.mark.skipif(not DATA, reason="FAITHMAP_DATA names no folder of photographs")
def test_photographs_in_the_official_layout(tmp_path: Path) -> None:
    """Labels as the photographs' own table has them; the oracle's box holds all of its own energy."""
    root = tmp_path / "imagenet"
    table = (Path(DATA) / "imagenet_val.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    truths, labels = {}, {}
    for row in rows:
        source = Path(DATA) / "imagenet_val" / row["path"]
        wnid = row["path"].split("/")[0]
        truths[int(source.stem[-8:])], labels[source.stem] = wnid, int(row["label"])
        (root / "val").mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / "val")
        corners = []
        for box in row["boxes"].split(";"):
            x0, y0, x1, y1 = (round(float(number)) for number in box.split(","))
            corners.append((wnid, (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))))
        annotation(root / "ILSVRC2012_bbox_val_v3" / "val" / f"{source.stem}.xml", (227, 227), corners)
    devkit(root / "ILSVRC2012_devkit_t12", truths)
    assert {sample.id: sample.label for sample in build("imagenet", root=root)} == labels
    energy = oracle_energy({"name": "imagenet", "root": str(root)}, Path(DATA), tmp_path / "run")
    assert len(energy) >= 150
    assert (energy - 100).abs().max() <= 0.1
