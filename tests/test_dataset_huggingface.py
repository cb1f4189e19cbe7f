"""The dataset `huggingface` on Parquet files and folders, offline; the hub is a copy in the cache."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from copies import (
    HALVED,
    SIZE,
    assert_exact_after_the_transform,
    assert_passes_the_kit,
    boxes_of,
    inside,
    listed,
    mask_of,
    paint,
    red,
)

from faithmap import hub
from faithmap.errors import DataError, RequestError
from faithmap.models import Transform
from faithmap.transforms import prepare

NAME = "huggingface"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BOX = (20, 12, 60, 44)


def _installed() -> bool:
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


#: `import datasets` is no proof: a checkout on sys.path lends its room to that name.
needs_library = pytest.mark.skipif(not _installed(), reason="needs the extra `huggingface`")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no network."""
    folder = tmp_path / "cache"
    if _installed():
        library = importlib.import_module("datasets")
        monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", folder)
        monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    return folder


def encoded(box: tuple[int, int, int, int] = BOX, turn: int = 1) -> bytes:
    """A PNG with the box in red."""
    pixels = np.full((*SIZE[::-1], 3), 20, np.uint8)
    pixels[inside(box), 0] = 230
    picture = PIL.Image.fromarray(pixels)
    picture.getexif()[0x0112] = turn
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=picture.getexif())
    return stream.getvalue()


def grey(values: np.ndarray) -> bytes:
    """A mask as a PNG."""
    stream = io.BytesIO()
    PIL.Image.fromarray(values.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(
    root: Path, columns: dict[str, list[Any]], images: tuple[str, ...] = ("image",), **kinds: Any
) -> Path:
    """A Parquet file of rows, as the hub holds most datasets; `kinds` are types of columns."""
    library = importlib.import_module("datasets")
    data = library.Dataset.from_dict(columns)
    for name in images:
        data = data.cast_column(name, library.Image())
    for name, kind in kinds.items():
        data = data.cast_column(name, kind)
    root.mkdir(parents=True, exist_ok=True)
    library.disable_progress_bars()
    data.to_parquet(root / "test.parquet")
    return root


def rows(count: int = 4, **columns: Any) -> dict[str, list[Any]]:
    """Columns of so many rows, with images and labels 0, 1, 0, ..."""
    images = [{"bytes": encoded(), "path": None}] * count
    return {"image": images, "label": [i % 2 for i in range(count)], **columns}


def open_rows(root: Path, **params: Any) -> Any:
    return listed(NAME, path="parquet", root=root, data_files={"test": "test.parquet"}, **params)


@needs_library
class TestFiles:
    def test_a_parquet_file_passes_the_kit(self, tmp_path: Path) -> None:
        masks = [{"bytes": grey(np.where(inside(BOX), 7, 0)), "path": None}] * 4
        root = write(tmp_path / "data", rows(boxes=[list(BOX)] * 4, mask=masks), images=("image", "mask"))
        assert_passes_the_kit(NAME, root, ",path=parquet,boxes=boxes,mask=mask")

    def test_a_folder_of_images_passes_the_kit(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            for kind in ("ant", "bee"):
                for number in range(2):
                    paint(tmp_path / "data" / split / kind / f"{number}.jpg", BOX)
        assert_passes_the_kit(NAME, tmp_path / "data", ",path=imagefolder,split=test", truths=False)
        samples = listed(NAME, root=tmp_path / "data", split="test")
        assert [(sample.id, sample.label, sample.name) for sample in samples] == [
            ("test/000000", 0, "ant"), ("test/000001", 0, "ant"),
            ("test/000002", 1, "bee"), ("test/000003", 1, "bee"),
        ]  # fmt: skip
        assert samples.class_names == ("ant", "bee")
        assert red(samples[0]).any()
        with pytest.raises(RequestError, match="has the splits train, test; give split = one of them"):
            listed(NAME, root=tmp_path / "data")

    def test_the_revision_follows_the_files_not_their_place(self, tmp_path: Path) -> None:
        first = open_rows(write(tmp_path / "one", rows()))
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        assert open_rows(tmp_path / "two").revision == first.revision
        assert open_rows(write(tmp_path / "two", rows(5))).revision != first.revision

    def test_labels_named_by_their_type(self, tmp_path: Path) -> None:
        library = importlib.import_module("datasets")
        root = write(tmp_path / "data", rows(), label=library.ClassLabel(names=["moth", "bee"]))
        samples = open_rows(root)
        assert [(sample.label, sample.name) for sample in samples[:2]] == [(0, "moth"), (1, "bee")]
        assert samples.class_names == ("moth", "bee")

    def test_words_are_numbered_in_their_order(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows(label=["wasp", "ant", None, "wasp"]))
        samples = open_rows(root)
        assert [sample.label for sample in samples] == [1, 0, None, 1]
        assert samples.class_names == ("ant", "wasp")
        with pytest.raises(RequestError, match=r"holds words such as 'wasp'.* leave out streaming"):
            open_rows(root, streaming=True, take=2)

    def test_no_labels(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows(label=[-1, 3, -1, 0]))
        assert [sample.label for sample in open_rows(root)] == [None, 3, None, 0]
        assert [sample.label for sample in open_rows(root, labels="")] == [None] * 4

    def test_ids_from_a_column(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows(key=["d", "c", "b", "a"], twice=[1, 2, 2, 3]))
        assert [sample.id for sample in open_rows(root, id="key")] == ["d", "c", "b", "a"]
        with pytest.raises(RequestError, match="id: column 'twice' holds '2' again in row 2"):
            open_rows(root, id="twice")

    @pytest.mark.parametrize("turn", [1, 3, 6, 8])
    def test_truths_turn_with_the_image(self, tmp_path: Path, turn: int) -> None:
        x0, y0, x1, y1 = BOX
        rim = inside((x0 - 2, y0 - 2, x1 + 2, y1 + 2))
        masks = [{"bytes": grey(np.where(inside(BOX), 1, np.where(rim, 255, 2))), "path": None}] * 2
        columns = rows(2, boxes=[[list(BOX)]] * 2, mask=masks)
        columns["image"] = [{"bytes": encoded(turn=turn), "path": None}] * 2
        root = write(tmp_path / "data", columns, images=("image", "mask"))
        sample = open_rows(root, boxes="boxes", mask="mask", mask_value=1)[0]
        assert torch.equal(mask_of(sample), red(sample))
        assert sample.void is None
        sample = open_rows(root, mask="mask", mask_value=1, void_value=255)[0]
        assert torch.equal(mask_of(sample), red(sample))
        assert callable(sample.void)
        around = torch.nn.functional.max_pool2d(red(sample)[None].float(), 5, 1, 2)[0] > 0
        assert torch.equal(sample.void(), around & ~red(sample))
        sample = open_rows(root, mask="mask", void_value=255)[0]
        assert torch.equal(mask_of(sample), ~around | red(sample))
        sample = open_rows(root, boxes="boxes", mask="mask", mask_value=1)[0]
        x0, y0, x1, y1 = (int(value) for value in boxes_of(sample)[0])
        assert torch.equal(torch.from_numpy(inside((x0, y0, x1, y1), red(sample).shape[::-1])), red(sample))
        if turn == 1:
            assert_exact_after_the_transform(sample)


@needs_library
class TestBoxes:
    @pytest.mark.parametrize(
        ("form", "units", "box"),
        [
            ("xyxy", "pixels", [20.0, 12.0, 60.0, 44.0]),
            ("xywh", "pixels", [20.0, 12.0, 40.0, 32.0]),
            ("coco", "pixels", [20.0, 12.0, 40.0, 32.0]),
            ("cxcywh", "pixels", [40.0, 28.0, 40.0, 32.0]),
            ("xyxy", "relative", [20 / 96, 12 / 64, 60 / 96, 44 / 64]),
            ("cxcywh", "relative", [40 / 96, 28 / 64, 40 / 96, 32 / 64]),
        ],
    )
    def test_formats(self, tmp_path: Path, form: str, units: str, box: list[float]) -> None:
        root = write(tmp_path / "data", rows(1, where=[box]))
        (sample,) = open_rows(root, boxes="where", box_format=form, box_units=units)
        assert boxes_of(sample)[0] == pytest.approx(BOX)
        assert_exact_after_the_transform(sample)

    def test_one_several_and_none(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows(3, where=[[[0, 0, 2, 2], [4, 4, 8, 8]], [], None]))
        found = [boxes_of(sample) for sample in open_rows(root, boxes="where")]
        assert found == [[[0, 0, 2, 2], [4, 4, 8, 8]], [], []]
        assert torch.as_tensor(prepare(open_rows(root, boxes="where")[1], HALVED).boxes).shape == (0, 4)

    def test_records_and_lists_of_records(self, tmp_path: Path) -> None:
        record = {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [0, 1]}
        listing = [{"bbox": [1, 2, 3, 4]}, {"bbox": [5, 6, 7, 8]}]
        root = write(tmp_path / "data", rows(1, objects=[record], things=[listing]))
        for column in ("objects.bbox", "things.bbox"):
            assert boxes_of(open_rows(root, boxes=column)[0]) == [[1, 2, 3, 4], [5, 6, 7, 8]]
        with pytest.raises(DataError, match=r"'objects\.box' does not reach a value: there is no 'box'"):
            boxes_of(open_rows(root, boxes="objects.box")[0])

    def test_malformed_boxes_cost_their_image(self, tmp_path: Path) -> None:
        root = write(
            tmp_path / "data", rows(3, where=[[1.0, 2.0, 3.0], [9.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
        )
        short, inverted, sound = open_rows(root, boxes="where")
        with pytest.raises(DataError, match=r"row 0: a box is \[1.0, 2.0, 3.0\], expected four numbers"):
            boxes_of(short)
        with pytest.raises(
            DataError, match=r"row 1: the box .* ends before it begins; is it of the format 'xyxy'"
        ):
            boxes_of(inverted)
        assert boxes_of(sound) == [[1, 2, 3, 4]]


@needs_library
class TestBrokenImages:
    def test_they_cost_themselves_alone(self, tmp_path: Path) -> None:
        columns = rows(4)
        columns["image"] = [
            {"bytes": b"", "path": None}, {"bytes": encoded()[:150], "path": None}, None,
            {"bytes": encoded(), "path": None},
        ]  # fmt: skip
        *broken, sound = open_rows(write(tmp_path / "data", columns))
        for row, sample in enumerate(broken):
            with pytest.raises(
                DataError, match=rf"row {row} (cannot be read|holds nothing in column 'image')"
            ):
                red(sample)
        assert red(sound).any()

    def test_masks_of_another_size_none_and_broken(self, tmp_path: Path) -> None:
        masks = [{"bytes": grey(np.ones((5, 5))), "path": None}, None, {"bytes": b"no image", "path": None}]
        root = write(tmp_path / "data", rows(3, mask=masks), images=("image", "mask"))
        small, none, broken = open_rows(root, mask="mask")
        with pytest.raises(DataError, match="row 0: the mask has 5 x 5 pixels, the image 96 x 64"):
            mask_of(small)
        assert callable(none.mask) and none.mask() is None
        with pytest.raises(DataError, match="the mask of row 2 cannot be read"):
            mask_of(broken)

    def test_rows_without_a_mask_have_their_boxes(self, tmp_path: Path) -> None:
        """The kit passes, and a row's object is its mask, or else its box."""
        masks = [{"bytes": grey(np.where(inside(BOX), 1, 0)), "path": None}, None] * 2
        columns = rows(boxes=[list(BOX)] * 4, mask=masks)
        root = write(tmp_path / "data", columns, images=("image", "mask"))
        assert_passes_the_kit(NAME, root, ",path=parquet,boxes=boxes,mask=mask,void_value=0")
        with_mask, without = open_rows(root, boxes="boxes", mask="mask", void_value=0)[:2]
        assert callable(with_mask.void) and callable(without.void)
        assert with_mask.void() is not None and without.void() is None
        found = prepare(without, Transform((32, 32)))
        assert found.mask is None and found.void is None and found.boxes is not None and len(found.boxes) == 1


@needs_library
class TestStreaming:
    def test_the_first_rows_in_the_datasets_own_order(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows(6, boxes=[list(BOX)] * 6))
        whole, first = open_rows(root), open_rows(root, streaming=True, take=3, boxes="boxes")
        assert [(s.id, s.label) for s in first] == [(s.id, s.label) for s in whole[:3]]
        assert first.revision == whole.revision
        assert_exact_after_the_transform(first[0])
        assert len(open_rows(root, streaming=True, take=100)) == 6

    def test_a_stream_passes_the_kit(self, tmp_path: Path) -> None:
        root = write(tmp_path / "data", rows())
        assert_passes_the_kit(NAME, root, ",path=parquet,streaming=true,take=3", truths=False)

    def test_images_that_a_stream_points_to_are_read_at_once(self) -> None:
        import fsspec

        with fsspec.open("memory://photos/a.png", "wb") as stream:
            stream.write(encoded())
        row = hub._at_hand({"image": {"path": "memory://photos/a.png", "bytes": None}}, frozenset({"image"}))
        assert row["image"]["bytes"] == encoded()

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"streaming": True}, "take: got None, expected a number of rows"),
            ({"streaming": True, "take": 0}, "take: got 0"),
            ({"take": 5}, r"take: it goes with streaming = true; use limit in \[run\]"),
        ],
    )
    def test_take_and_streaming_belong_together(
        self, tmp_path: Path, params: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            listed(NAME, path="parquet", root=tmp_path, **params)


@needs_library
class TestTheHub:
    @pytest.fixture
    def prepared(self, tmp_path: Path, cache: Path) -> str:
        """A dataset as a download leaves it in the library's cache."""
        library = importlib.import_module("datasets")
        root = write(tmp_path / "data", rows())
        builder = library.load_dataset_builder("parquet", data_files={"test": str(root / "test.parquet")})
        builder.download_and_prepare()
        place = cache / "owner___demo" / "default" / "0.0.0" / COMMIT
        shutil.copytree(builder.cache_dir, place)
        (place / "parquet-test.arrow").rename(place / "demo-test.arrow")
        info = json.loads((place / "dataset_info.json").read_text())
        info["dataset_name"] = info["splits"]["test"]["dataset_name"] = "demo"
        (place / "dataset_info.json").write_text(json.dumps(info))
        return "owner/demo"

    def test_what_has_been_downloaded_needs_no_network(self, prepared: str, capfd: Any) -> None:
        for revision in (None, COMMIT):
            samples = listed(NAME, path=prepared, revision=revision)
            assert samples.revision == COMMIT
            assert [sample.id for sample in samples] == [f"test/{row:06d}" for row in range(4)]
            assert red(samples[0]).any()
        assert capfd.readouterr().err == ""

    def test_another_commit_is_not_passed_off_as_the_one_asked_for(self, prepared: str) -> None:
        with pytest.raises(
            RequestError, match=rf"holds 'owner/demo' at revision {COMMIT}, not f{{40}}; give download"
        ):
            listed(NAME, path=prepared, revision="f" * 40)

    def test_nothing_is_fetched_unasked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the library itself may ask the network."""
        library = importlib.import_module("datasets")
        monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)
        with pytest.raises(RequestError, match=r"cannot open 'owner/none' .*fetched with download = true"):
            listed(NAME, path="owner/none")
        assert library.config.HF_HUB_OFFLINE is False
        for params in (
            {"path": "hf://datasets/owner/none"},
            {"path": "buckets/owner/none"},
            {"path": "owner/none", "data_files": ["https://example.org/a.parquet"]},
            {"path": "owner/none", "data_files": {"test": "https://example.org/a.parquet"}},
        ):
            with pytest.raises(RequestError, match="is an address, and nothing is downloaded unasked"):
                listed(NAME, **params)

    def test_a_download_that_is_forbidden(self) -> None:
        with pytest.raises(RequestError, match=r"download = true, but the network may not be asked"):
            listed(NAME, path="owner/none", download=True)


@needs_library
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"image": "picture"}, "image: there is no column of images 'picture'; known are: image"),
        ({"image": "label"}, "image: there is no column of images 'label'"),
        ({"labels": "labels"}, "labels: there is no column 'labels'; did you mean 'label'"),
        ({"boxes": "objects.bbox"}, "boxes: there is no column 'objects'"),
        ({"mask": "label"}, "mask: there is no column of images 'label'"),
        ({"labels": "score"}, "labels: column 'score' holds '0.5' in row 0, expected an integer or a word"),
        ({"void_value": 255}, "void_value: got 255, mask '' and mask_value None; expected the"),
        ({"mask": "image", "mask_value": 1, "void_value": 1}, "another than mask_value"),
        ({"split": "validation"}, "has no split 'validation'; known are: test"),
        ({"split": "test[:2]"}, r"has no split 'test\[:2\]' \(a slice would change the ids"),
        ({"box_format": "yxyx"}, "box_format: got 'yxyx', expected one of 'xyxy', 'xywh'"),
        ({"box_units": "percent"}, "box_units: got 'percent', expected one of 'pixels', 'relative'"),
    ],
)
def test_bad_requests(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    root = write(tmp_path / "data", rows(2, score=[0.5, 1.0]))
    with pytest.raises(RequestError, match=message):
        open_rows(root, **params)


@needs_library
def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    for params, message in (
        ({}, "neither path nor root"),
        ({"path": str(tmp_path)}, "is a folder on this machine; give it as root"),
        ({"path": "parquet"}, "'parquet' is a format of files; give root"),
        ({"path": "parquet", "data_files": "test.parquet"}, "data_files: give root = the folder"),
        ({"root": tmp_path / "none"}, "no such folder"),
        (
            {"root": tmp_path, "path": "parquet"},
            r"cannot open 'parquet' \(.*that Hugging Face's library can read",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            listed(NAME, **params)


@pytest.mark.parametrize("found", [None, ModuleType("datasets")], ids=["nothing", "the room of plugins"])
def test_a_missing_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", found)
    with pytest.raises(
        RequestError, match=r'needs Hugging Face\'s library datasets; run: pip install "datasets'
    ):
        listed(NAME, root=tmp_path)
