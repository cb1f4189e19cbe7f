"""The dataset `voc2012`: one sample for each class of an image, boxes and masks to the pixel."""

from __future__ import annotations

import hashlib
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from official import Corners, annotation, build, drawn, photograph

from faithmap import conformance
from faithmap.data import load_dataset
from faithmap.errors import DataError, RequestError
from faithmap.models import Transform
from faithmap.pictures import ORIENTATION
from faithmap.records import Sample, Spec
from faithmap.registry import get
from faithmap.transforms import prepare

Thing = tuple[str, Corners, int]
VOID = 255
PLANE, PERSON, TV = 1, 15, 20
#: Image, size, objects as the files state them: columns and rows from 1, both ends included.
IMAGES: list[tuple[str, tuple[int, int], list[Thing]]] = [
    ("2007_000032", (50, 40), [
        ("aeroplane", (11, 9, 38, 19), 0), ("aeroplane", (1, 25, 10, 40), 0), ("person", (40, 28, 50, 40), 0),
    ]),
    ("2007_000033", (40, 60), [("aeroplane", (1, 1, 40, 30), 0)]),
    ("2008_000008", (64, 48), [
        ("person", (1, 1, 20, 48), 0), ("person", (15, 21, 44, 48), 1), ("tvmonitor", (50, 1, 64, 12), 1),
    ]),
]  # fmt: skip
NUMBERS = {"aeroplane": PLANE, "person": PERSON, "tvmonitor": TV}


def save_mask(file: Path, values: np.ndarray) -> None:
    """A palette image whose values are the classes, as VOC's masks are."""
    image = PIL.Image.new("P", (values.shape[1], values.shape[0]))
    image.putdata(values.astype(np.uint8).ravel().tolist())
    image.putpalette([(37 * colour) % 256 for colour in range(768)])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def classes_of(size: tuple[int, int], things: list[Thing]) -> np.ndarray:
    """Every box is filled with its class, with a void border one pixel wide."""
    values = np.zeros(size[::-1], np.uint8)
    for name, (x0, y0, x1, y1), _ in things:
        left, top, right, bottom = int(x0), int(y0), int(x1), int(y1)
        values[top - 1 : bottom, left - 1 : right] = VOID
        values[top : bottom - 1, left : right - 1] = NUMBERS[name]
    return values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small `VOCdevkit/VOC2012`; the last of its images has no mask."""
    top = tmp_path / "voc"
    base = top / "VOCdevkit" / "VOC2012"
    for name, size, things in [*IMAGES, ("2009_000001", (30, 30), [("person", (2.5, 3, 20.5, 30), 0)])]:
        photograph(base / "JPEGImages" / f"{name}.jpg", size, [box for _, box, _ in things], first=1)
        annotation(base / "Annotations" / f"{name}.xml", size, things)
        if name[:4] != "2009":
            save_mask(base / "SegmentationClass" / f"{name}.png", classes_of(size, things))
    for folder, names in (("Segmentation", IMAGES), ("Main", [*IMAGES, ("2009_000001",)])):
        lists = base / "ImageSets" / folder
        lists.mkdir(parents=True)
        for split in ("val", "trainval"):
            (lists / f"{split}.txt").write_text("".join(f"{entry[0]}\n" for entry in names), encoding="utf-8")
        (lists / "train.txt").write_text("2007_000033\n", encoding="utf-8")
    return top


def base(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


def boxes(sample: Sample) -> list[list[float]]:
    assert callable(sample.boxes)
    found: list[list[float]] = sample.boxes().tolist()
    return found


def mask(sample: Sample) -> np.ndarray:
    assert callable(sample.mask)
    found: np.ndarray = sample.mask().numpy()
    return found


@pytest.mark.parametrize(
    "params", [{}, {"task": "detection"}, {"objects": "single"}, {"difficult": False}, {"split": "train"}]
)
def test_it_passes_the_kit(root: Path, params: dict[str, Any]) -> None:
    results = conformance.check_dataset("voc2012", params={"root": str(root), **params})
    assert conformance.failures(results) == []
    notes = [result.message for result in results if result.check == "check_labels"]
    asked_less = params.get("task") == "detection"  # by request it comes without the masks that it declares
    assert notes == (["with these parameters no sample has a mask"] if asked_less else [""])
    assert not [result for result in results if result.status == "skipped"]


class TestSamples:
    def test_one_for_each_class_of_an_image(self, root: Path) -> None:
        samples = build("voc2012", root=root)
        assert [(sample.id, sample.label, sample.name) for sample in samples] == [
            ("2007_000032/aeroplane", 0, "aeroplane"),
            ("2007_000032/person", 14, "person"),
            ("2007_000033/aeroplane", 0, "aeroplane"),
            ("2008_000008/person", 14, "person"),
            ("2008_000008/tvmonitor", 19, "tvmonitor"),
        ]
        assert samples.class_names is not None
        assert list(samples.class_names) == sorted(samples.class_names)
        assert len(samples.class_names) == 20

    def test_boxes_count_from_one(self, root: Path) -> None:
        samples = build("voc2012", root=root)
        assert boxes(samples[0]) == [[10, 8, 38, 19], [0, 24, 10, 40]]
        assert boxes(samples[1]) == [[39, 27, 50, 40]]
        white, boxed = drawn(samples[2])
        assert np.array_equal(white, boxed)

    def test_coordinates_may_have_decimals(self, root: Path) -> None:
        last = build("voc2012", root=root, task="detection")[-1]
        assert last.id == "2009_000001/person"
        assert boxes(last) == [[1.5, 2, 20.5, 30]]
        assert last.mask is None

    def test_masks_hold_the_class_and_not_the_void(self, root: Path) -> None:
        samples = build("voc2012", root=root)
        for sample, number in zip(samples, (PLANE, PERSON, PLANE, PERSON, TV), strict=True):
            file = base(root) / "SegmentationClass" / f"{sample.id.split('/')[0]}.png"
            assert np.array_equal(mask(sample), np.asarray(PIL.Image.open(file)) == number)
        rows, columns = mask(samples[2]).nonzero()
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 28, 1, 38)

    def test_the_void_is_neither_object_nor_background(self, root: Path) -> None:
        for sample in build("voc2012", root=root):
            file = base(root) / "SegmentationClass" / f"{sample.id.split('/')[0]}.png"
            assert callable(sample.void)
            assert np.array_equal(sample.void().numpy(), np.asarray(PIL.Image.open(file)) == VOID)
        assert build("voc2012", root=root, task="detection")[0].void is None

    def test_both_follow_a_transform(self, root: Path) -> None:
        """Twice the side: every pixel becomes four, and the crop takes off equal margins."""
        sample = build("voc2012", root=root)[2]
        prepared = prepare(sample, Transform((80, 80), 1.0))
        assert prepared.boxes is not None
        assert prepared.mask is not None
        assert prepared.boxes.tolist() == [[0, 0, 80, 40]]
        whole = torch.from_numpy(mask(sample)).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(prepared.mask, whole[20:100])
        assert callable(sample.void) and prepared.void is not None
        around = sample.void().repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(prepared.void, around[20:100]) and prepared.void.any()

    def test_images_of_a_single_class(self, root: Path) -> None:
        assert [s.id for s in build("voc2012", root=root, objects="single")] == ["2007_000033/aeroplane"]

    def test_without_difficult_objects(self, root: Path) -> None:
        """What only a difficult object's box covers is not in the boxes, and void in the mask."""
        samples = build("voc2012", root=root, difficult=False)
        assert [sample.id for sample in samples][-1] == "2008_000008/person"
        person = samples[-1]
        assert boxes(person) == [[0, 0, 20, 48]]
        file = base(root) / "SegmentationClass" / "2008_000008.png"
        expected = np.asarray(PIL.Image.open(file)) == PERSON
        expected = expected & (np.arange(64) < 20)
        assert np.array_equal(mask(person), expected)
        whole = build("voc2012", root=root)[3]
        assert mask(whole).sum() > expected.sum()
        assert callable(whole.void) and callable(person.void)
        hidden = mask(whole) & ~expected
        assert np.array_equal(person.void().numpy(), whole.void().numpy() | hidden)

    def test_exif_turns_all_three(self, root: Path) -> None:
        name, size, things = IMAGES[1]
        exif = PIL.Image.Exif()
        exif[ORIENTATION] = 6
        photograph(base(root) / "JPEGImages" / f"{name}.jpg", size, [things[0][1]], first=1, exif=exif)
        sample = build("voc2012", root=root)[2]
        white, boxed = drawn(sample)
        assert white.shape == (40, 60)
        assert np.array_equal(white, boxed)
        assert not (mask(sample) & ~white).any()
        assert mask(sample).sum() == 28 * 38

    def test_splits(self, root: Path) -> None:
        assert [s.id for s in build("voc2012", root=root, split="train")] == ["2007_000033/aeroplane"]
        assert len(build("voc2012", root=root, split="trainval")) == 5

    def test_folders_further_in_will_do_and_are_no_part_of_the_key(self, root: Path) -> None:
        keys = {
            load_dataset(Spec("voc2012", {"root": str(place), "download": fetch})).key
            for place, fetch in ((root, False), (root / "VOCdevkit", True), (base(root), False))
        }
        assert len(keys) == 1

    def test_the_revision_moves_with_boxes_and_masks(self, root: Path) -> None:
        name, size, things = IMAGES[1]
        first = build("voc2012", root=root).revision
        annotation(base(root) / "Annotations" / f"{name}.xml", size, [(things[0][0], (1, 1, 40, 31), 0)])
        second = build("voc2012", root=root).revision
        save_mask(base(root) / "SegmentationClass" / f"{name}.png", np.ones(size[::-1]))
        assert len({first, second, build("voc2012", root=root).revision}) == 3


class TestClassMap:
    def test_labels_and_names_are_the_models(self, root: Path, tmp_path: Path) -> None:
        file = tmp_path / "map.json"
        file.write_text(json.dumps({"aeroplane": 404, "tvmonitor": 664, "zebra": 340}), encoding="utf-8")
        samples = build("voc2012", root=root, class_map=file)
        assert [(sample.id, sample.label) for sample in samples] == [
            ("2007_000032/aeroplane", 404),
            ("2007_000033/aeroplane", 404),
            ("2008_000008/tvmonitor", 664),
        ]
        assert samples.class_names is not None
        assert samples.class_names[404] == "aeroplane"
        assert len(samples.class_names) == 665

    def test_one_without_any_of_the_classes(self, root: Path, tmp_path: Path) -> None:
        file = tmp_path / "map.csv"
        file.write_text("label,name\n1,plane\n", encoding="utf-8")
        with pytest.raises(RequestError, match=r"map\.csv has none of VOC's classes; they are aeroplane"):
            build("voc2012", root=root, class_map=file)


class TestFaults:
    def test_a_mask_of_another_size_costs_its_image(self, root: Path) -> None:
        save_mask(base(root) / "SegmentationClass" / "2007_000033.png", np.ones((60, 41)))
        with pytest.raises(DataError, match=r"2007_000033\.png has 41 x 60 pixels"):
            prepare(build("voc2012", root=root)[2], Transform((32, 32)))

    def test_a_mask_in_colours_costs_its_image(self, root: Path) -> None:
        PIL.Image.new("RGB", (40, 60)).save(base(root) / "SegmentationClass" / "2007_000033.png")
        with pytest.raises(DataError, match=r"2007_000033\.png holds colours; expected the palette image"):
            prepare(build("voc2012", root=root)[2], Transform((32, 32)))

    def test_a_missing_mask_and_a_truncated_image_cost_themselves(self, root: Path) -> None:
        (base(root) / "SegmentationClass" / "2007_000033.png").unlink()
        image = base(root) / "JPEGImages" / "2008_000008.jpg"
        image.write_bytes(image.read_bytes()[:200])
        samples = build("voc2012", root=root)
        prepare(samples[0], Transform((32, 32)))
        with pytest.raises(DataError, match=r"2007_000033\.png cannot be read as a mask"):
            prepare(samples[2], Transform((32, 32)))
        with pytest.raises(DataError, match=r"2008_000008\.jpg"):
            prepare(samples[3], Transform((32, 32)))

    def test_an_empty_mask_stays_empty(self, root: Path) -> None:
        """The metrics then leave the image out: no object in it."""
        save_mask(base(root) / "SegmentationClass" / "2007_000033.png", np.full((60, 40), VOID))
        prepared = prepare(build("voc2012", root=root)[2], Transform((32, 32)))
        assert prepared.mask is not None
        assert not prepared.mask.any()

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("<annotation>", r"2007_000033\.xml cannot be read as XML: .*; unpack VOCtrainval"),
            (
                "<annotation><object><name>zebra</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
                "<ymax>3</ymax></bndbox></object></annotation>",
                r"2007_000033\.xml: 'zebra' is none of VOC's classes",
            ),
        ],
    )
    def test_annotations_say_what_samples_there_are(self, root: Path, text: str, complaint: str) -> None:
        (base(root) / "Annotations" / "2007_000033.xml").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=complaint):
            build("voc2012", root=root)

    def test_missing_files(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(
            RequestError, match=r"'voc2012' needs root; get VOCtrainval_11-May-2012\.tar from host\.robots"
        ):
            build("voc2012")
        with pytest.raises(RequestError, match=r"no such folder: .*gone; get VOCtrainval"):
            build("voc2012", root=tmp_path / "gone")
        with pytest.raises(RequestError, match=r"holds no 'JPEGImages'; get VOCtrainval"):
            build("voc2012", root=base(root) / "ImageSets")
        (base(root) / "ImageSets" / "Segmentation" / "val.txt").unlink()
        with pytest.raises(RequestError, match=r"no such file: .*Segmentation/val\.txt; unpack"):
            build("voc2012", root=root)

    def test_no_images_and_no_objects(self, root: Path) -> None:
        (base(root) / "ImageSets" / "Segmentation" / "val.txt").write_text(
            "2008_000008\n\n", encoding="utf-8"
        )
        with pytest.raises(RequestError, match=r"no image of split 'val' has such objects"):
            build("voc2012", root=root, objects="single")
        for file in (base(root) / "JPEGImages").iterdir():
            file.unlink()
        with pytest.raises(RequestError, match=r"no images are there, .*2008_000008\.jpg for one"):
            build("voc2012", root=root)

    @pytest.mark.parametrize("key", ["split", "task", "objects"])
    def test_unknown_words(self, root: Path, key: str) -> None:
        with pytest.raises(RequestError, match=rf"{key}: got 'test', expected one of '"):
            build("voc2012", root=root, **{key: "test"})


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class TestDownload:
    """Torchvision fetches the archive and checks it; here from a server of the test's own."""

    @pytest.fixture
    def archive(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        from torchvision.datasets import voc as official

        file = tmp_path / "source" / "VOCtrainval_11-May-2012.tar"
        file.parent.mkdir()
        with tarfile.open(file, "w") as packed:
            packed.add(root / "VOCdevkit", "VOCdevkit")
        md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Quiet, directory=file.parent)
        ) as server:
            url = f"http://127.0.0.1:{server.server_port}/{file.name}"
            known = {**official.DATASET_YEAR_DICT["2012"], "url": url, "md5": md5}
            monkeypatch.setitem(official.DATASET_YEAR_DICT, "2012", known)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield file
            server.shutdown()
            thread.join()

    @pytest.mark.filterwarnings("ignore:Python 3.14:DeprecationWarning")
    def test_it_is_fetched_once_and_only_when_asked(self, archive: Path, root: Path, tmp_path: Path) -> None:
        fresh = tmp_path / "fresh"
        with pytest.raises(RequestError, match=r"no such folder: .*fresh; get VOCtrainval"):
            build("voc2012", root=fresh)
        assert not fresh.exists()
        fetched = build("voc2012", root=fresh, download=True)
        assert fetched.revision == build("voc2012", root=root).revision
        archive.unlink()
        assert build("voc2012", root=fresh, download=True).revision == fetched.revision

    def test_a_corrupt_archive_is_refused(self, archive: Path, tmp_path: Path) -> None:
        archive.write_bytes(archive.read_bytes() + b"x")
        with pytest.raises(RequestError, match=r"'voc2012' cannot be downloaded: .*corrupted"):
            build("voc2012", root=tmp_path / "fresh", download=True)
        assert not (tmp_path / "fresh" / "VOCdevkit").exists()

    def test_nothing_is_fetched_offline(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(
            RequestError, match=r"is not in .*fresh, and the network may not be asked \(--offline"
        ):
            build("voc2012", root=tmp_path / "fresh", download=True)


def test_its_facts() -> None:
    facts = get("dataset", "voc2012").facts
    assert facts.license
    assert facts.citation
    assert facts.gives == {"label", "box", "mask"}
