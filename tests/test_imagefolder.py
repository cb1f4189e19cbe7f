"""The dataset `imagefolder`: folders and CSVs, kinds of image files, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from official import oracle_energy

from faithmap.errors import DataError, RequestError
from faithmap.models import Transform
from faithmap.records import Sample, SampleList
from faithmap.registry import get
from faithmap.transforms import prepare

Build = Callable[..., SampleList]
DATA = os.environ.get("FAITHMAP_DATA", "")


@pytest.fixture
def build() -> Build:
    plugin = get("dataset", "imagefolder")

    def call(**params: Any) -> SampleList:
        samples = plugin.make(plugin.check(params))()
        assert isinstance(samples, SampleList)
        return samples

    return call


def save(
    file: Path, mode: str = "RGB", size: tuple[int, int] = (8, 6), colour: Any = 0, **options: Any
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, colour).save(file, **options)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes, one with a folder inside; and what must be passed over."""
    root = tmp_path / "photos"
    save(root / "zebra" / "b.png")
    save(root / "zebra" / "deep" / "a.PNG", size=(5, 5))
    save(root / "ant" / "c.jpeg")
    (root / "ant" / "notes.txt").write_text("no image")
    save(root / ".cache" / "d.png")
    save(root / "loose.png")
    return root


def write_index(root: Path, text: str, name: str = "index.csv") -> Path:
    file = root / name
    file.write_text(text, encoding="utf-8")
    return file


def pixels(sample: Sample) -> np.ndarray:
    assert callable(sample.image)
    image = sample.image()
    assert image.mode == "RGB"
    return np.asarray(image)


class TestFolders:
    def test_sorted_folders_are_the_labels(self, build: Build, folders: Path) -> None:
        samples = build(root=folders)
        assert [(sample.id, sample.label, sample.name) for sample in samples] == [
            ("ant/c.jpeg", 0, "ant"),
            ("zebra/b.png", 1, "zebra"),
            ("zebra/deep/a.PNG", 1, "zebra"),
        ]
        assert samples.class_names == ("ant", "zebra")
        assert all(sample.boxes is None and sample.mask is None for sample in samples)

    def test_an_empty_folder_keeps_its_place(self, build: Build, folders: Path) -> None:
        (folders / "bee").mkdir()
        assert [sample.label for sample in build(root=folders)] == [0, 2, 2]

    def test_split_is_a_folder_below_the_root(self, build: Build, folders: Path) -> None:
        samples = build(root=folders.parent, split="photos")
        assert samples[0].id == "photos/ant/c.jpeg"

    def test_class_map_from_json(self, build: Build, folders: Path) -> None:
        file = folders.parent / "map.json"
        file.write_text(json.dumps({"ant": 310, "zebra": 340}), encoding="utf-8")
        samples = build(root=folders, class_map=file)
        assert [sample.label for sample in samples] == [310, 340, 340]
        assert samples.class_names is not None
        assert samples.class_names[340] == "zebra"

    def test_class_map_from_csv_takes_any_column_as_a_name(self, build: Build, folders: Path) -> None:
        file = write_index(
            folders.parent, "label,wnid,name\n7,ant,crane\n9,n01,crane\n8,n02,zebra\n", "map.csv"
        )
        assert [sample.label for sample in build(root=folders, class_map=file)] == [7, 8, 8]

    def test_a_user_may_give_text_paths(self, build: Build, folders: Path) -> None:
        assert len(build(root=str(folders))) == 3


class TestIndex:
    def test_columns(self, build: Build, folders: Path) -> None:
        index = write_index(
            folders,
            'path,label,name,boxes\nzebra/b.png,3,"zebra, plains","0,1,4,5;2,2,8,6"\nant/c.jpeg,0,ant,\n',
        )
        first, second = build(index=index)
        assert (first.id, first.label, first.name) == ("zebra/b.png", 3, "zebra, plains")
        assert callable(first.boxes)
        torch.testing.assert_close(first.boxes(), torch.tensor([[0.0, 1, 4, 5], [2, 2, 8, 6]]))
        assert second.boxes is None

    def test_a_box_may_be_without_area(self, build: Build, folders: Path) -> None:
        (sample,) = build(index=write_index(folders, 'path,label,boxes\nzebra/b.png,3,"7,1,7,5"\n'))
        assert callable(sample.boxes)
        assert sample.boxes().tolist() == [[7, 1, 7, 5]]

    def test_root_may_lie_elsewhere(self, build: Build, folders: Path, tmp_path: Path) -> None:
        index = write_index(tmp_path, "label,path\n1,./zebra//b.png\n")
        (sample,) = build(index=index, root=folders)
        assert sample.id == "zebra/b.png"
        assert pixels(sample).shape == (6, 8, 3)

    def test_spreadsheets_write_marks_and_blanks(self, build: Build, folders: Path) -> None:
        index = folders / "index.csv"
        index.write_bytes(b"\xef\xbb\xbfpath, label\r\nzebra/b.png, 2\r\n\r\n")
        assert [sample.label for sample in build(index=index)] == [2]

    def test_split_is_a_column(self, build: Build, folders: Path) -> None:
        index = write_index(folders, "path,label,split\nzebra/b.png,1,test\nant/c.jpeg,0,train\n")
        assert [sample.id for sample in build(index=index, split="test")] == ["zebra/b.png"]

    def test_class_map_reads_words(self, build: Build, folders: Path) -> None:
        index = write_index(folders, "path,label\nzebra/b.png,stripes\n")
        file = folders / "map.json"
        file.write_text('{"stripes": 340}', encoding="utf-8")
        (sample,) = build(index=index, class_map=file)
        assert (sample.label, sample.name) == (340, "stripes")

    def test_classes_are_merged_and_others_left_out(self, build: Build, folders: Path) -> None:
        index = write_index(
            folders,
            "path,label,name\nzebra/b.png,340,zebra\nant/c.jpeg,310,ant\nzebra/deep/a.PNG,339,horse\n",
        )
        file = write_index(folders, "label,class,name\n0,339,hoofed\n0,340,hoofed\n", "map.csv")
        samples = build(index=index, class_map=file, unmapped="drop")
        assert [(sample.id, sample.label) for sample in samples] == [
            ("zebra/b.png", 0),
            ("zebra/deep/a.PNG", 0),
        ]
        assert list(samples.class_names or ()) == ["hoofed"]
        with pytest.raises(RequestError, match="has no class '310'"):
            build(index=index, class_map=file)
        nothing = write_index(folders, "label,class\n0,9\n", "nothing.csv")
        with pytest.raises(RequestError, match=r"nothing\.csv knows the class of none of the images"):
            build(index=index, class_map=nothing, unmapped="drop")

    def test_merged_classes_without_a_name_have_none(self, build: Build, folders: Path) -> None:
        file = folders.parent / "map.json"
        file.write_text('{"ant": 0, "zebra": 0}', encoding="utf-8")
        assert build(root=folders, class_map=file).class_names is None

    def test_folders_of_no_class_are_left_out(self, build: Build, folders: Path) -> None:
        file = folders.parent / "map.json"
        file.write_text('{"ant": 1}', encoding="utf-8")
        assert [sample.label for sample in build(root=folders, class_map=file, unmapped="drop")] == [1]
        file.write_text('{"bee": 1}', encoding="utf-8")
        with pytest.raises(RequestError, match="knows the class of none of the images"):
            build(root=folders, class_map=file, unmapped="drop")

    @pytest.mark.parametrize(
        ("params", "sentence"),
        [
            ({"unmapped": "keep"}, "got 'keep', expected refuse or drop"),
            ({"unmapped": "drop"}, "needs class_map"),
        ],
    )
    def test_unmapped_is_refuse_or_drop(
        self, build: Build, folders: Path, params: dict[str, str], sentence: str
    ) -> None:
        with pytest.raises(RequestError, match=sentence):
            build(root=folders, **params)

    def test_what_is_kept_does_not_change_the_key(self, folders: Path) -> None:
        """The revision says which images there are, so rows of earlier runs keep their keys."""
        from faithmap.data import load_dataset
        from faithmap.records import Spec

        dataset = load_dataset(Spec("imagefolder", {"root": str(folders)}))
        assert "unmapped" in dataset.params
        params = {key: value for key, value in dataset.params.items() if key != "unmapped"}
        assert dataset.key == replace(dataset, params=params).key

    def test_absolute_paths_below_the_root_become_relative(self, build: Build, folders: Path) -> None:
        index = write_index(folders, f"path,label\n{folders / 'zebra' / 'b.png'},1\n")
        assert build(index=index)[0].id == "zebra/b.png"

    def test_a_missing_file_is_a_matter_of_one_image(self, build: Build, folders: Path) -> None:
        index = write_index(folders, "path,label\nzebra/b.png,1\nzebra/gone.png,1\n")
        _, gone = build(index=index)
        with pytest.raises(DataError, match=r"gone\.png"):
            pixels(gone)


class TestRevision:
    INDEX = 'path,label,boxes\nzebra/b.png,1,"0,0,2,2"\nant/c.jpeg,0,\n'

    def test_it_is_of_the_content_not_of_the_place(self, build: Build, folders: Path) -> None:
        first = build(index=write_index(folders, self.INDEX)).revision
        head, one, two = self.INDEX.splitlines()
        swapped = write_index(folders, f"{head}\n{two}\n{one}\n", "swapped.csv")
        moved = folders.rename(folders.with_name("moved"))
        assert build(index=moved / "index.csv").revision == first
        assert build(index=moved / swapped.name).revision == first

    @pytest.mark.parametrize(
        ("old", "new"), [("b.png,1", "b.png,2"), ("0,0,2,2", "0,0,2,3"), ("ant/c.jpeg", "zebra/deep/a.PNG")]
    )
    def test_it_moves_with_paths_labels_and_boxes(
        self, build: Build, folders: Path, old: str, new: str
    ) -> None:
        first = build(index=write_index(folders, self.INDEX)).revision
        assert build(index=write_index(folders, self.INDEX.replace(old, new))).revision != first

    def test_it_moves_with_the_files(self, build: Build, folders: Path) -> None:
        first = build(root=folders).revision
        save(folders / "ant" / "c.jpeg", size=(80, 60))
        assert build(root=folders).revision != first


class TestKindsOfImages:
    """Whatever a file holds comes out as the RGB that a viewer shows."""

    def load(self, build: Build, root: Path) -> np.ndarray:
        (sample,) = build(root=root)
        return pixels(sample)

    def test_grey(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "a" / "x.png", "L", colour=90)
        assert (self.load(build, tmp_path) == 90).all()

    def test_sixteen_bits_are_scaled_not_clipped(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        ramp = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
        PIL.Image.fromarray(ramp).save(tmp_path / "a" / "x.png")
        assert self.load(build, tmp_path)[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_bilevel(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "a" / "x.png", "1", colour=1)
        assert (self.load(build, tmp_path) == 255).all()

    def test_cmyk(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "a" / "x.tiff", "CMYK", colour=(0, 255, 255, 0))
        assert self.load(build, tmp_path)[0, 0].tolist() == [255, 0, 0]

    def test_cmyk_jpeg_is_not_inverted(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "a" / "x.jpg", "CMYK", (16, 16), (0, 255, 255, 0), quality=95)
        red, green, blue = self.load(build, tmp_path).mean((0, 1))
        assert red > 240
        assert max(green, blue) < 15

    def test_palette(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        PIL.Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(tmp_path / "a" / "x.png")
        assert self.load(build, tmp_path)[0, 0].tolist() == [10, 200, 30]

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_what_is_see_through_shows_white(self, build: Build, tmp_path: Path, mode: str) -> None:
        colour = (5, 5, 5, 0) if mode == "RGBA" else (5, 0)
        save(tmp_path / "a" / "x.png", mode, colour=colour)
        assert (self.load(build, tmp_path) == 255).all()

    def test_a_transparent_palette_entry_shows_white(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        image = PIL.Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 9, 8, 7])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a" / "x.png", transparency=0)
        assert self.load(build, tmp_path)[0].tolist() == [[255, 255, 255], [9, 8, 7]]

    def test_unknown_ranges_are_refused(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "a" / "x.tiff", "F", colour=0.5)
        with pytest.raises(DataError, match=r"x\.tiff.*floating-point"):
            self.load(build, tmp_path)
        save(tmp_path / "a" / "x.tiff", "I", colour=70000)
        with pytest.raises(DataError, match=r"x\.tiff.*65535"):
            self.load(build, tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not an image", b"half"])
    def test_broken_files_are_named_when_they_are_loaded(
        self, build: Build, tmp_path: Path, content: bytes
    ) -> None:
        file = tmp_path / "a" / "broken.png"
        if content == b"half":
            save(file, size=(200, 200), colour=(1, 2, 3))
            content = file.read_bytes()[:60]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        (sample,) = build(root=tmp_path)
        with pytest.raises(DataError, match=r"broken\.png"):
            pixels(sample)

    @pytest.mark.parametrize("turn", range(1, 9))
    def test_exif_turns_the_image_and_its_boxes_alike(self, build: Build, tmp_path: Path, turn: int) -> None:
        stored = np.zeros((6, 9, 3), dtype=np.uint8)
        stored[1:3, 2:7] = 255
        exif = PIL.Image.Exif()
        exif[0x0112] = turn
        PIL.Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
        (sample,) = build(index=write_index(tmp_path, 'path,label,boxes\nx.png,0,"2,1,7,3"\n'))
        upright = pixels(sample)
        assert upright.shape[:2] == ((6, 9) if turn < 5 else (9, 6))
        assert callable(sample.boxes)
        x0, y0, x1, y1 = (int(number) for number in sample.boxes()[0])
        inside = np.zeros(upright.shape[:2], dtype=bool)
        inside[y0:y1, x0:x1] = True
        assert ((upright[..., 0] == 255) == inside).all()


class TestRefusals:
    """Each sentence says what was given and what to do."""

    def test_nothing_given(self, build: Build) -> None:
        with pytest.raises(RequestError, match=r"neither root nor index; give root"):
            build()

    def test_no_such_folder(self, build: Build, folders: Path) -> None:
        with pytest.raises(RequestError, match=r"no such folder: .*nowhere"):
            build(root=folders / "nowhere")
        with pytest.raises(RequestError, match=r"did you mean 'zebra'"):
            build(root=folders, split="zebre")

    def test_no_classes(self, build: Build, tmp_path: Path) -> None:
        save(tmp_path / "loose.png")
        with pytest.raises(RequestError, match="holds no class folders"):
            build(root=tmp_path)

    def test_no_images(self, build: Build, tmp_path: Path) -> None:
        (tmp_path / "ant").mkdir()
        with pytest.raises(RequestError, match=r"hold no images; expected files in \.bmp"):
            build(root=tmp_path)

    def test_class_not_in_the_map(self, build: Build, folders: Path) -> None:
        file = folders.parent / "map.json"
        file.write_text('{"ant": 0, "zebras": 1}', encoding="utf-8")
        with pytest.raises(RequestError, match=r"no class 'zebra'; did you mean 'zebras'"):
            build(root=folders, class_map=file)

    def test_ambiguous_class(self, build: Build, folders: Path) -> None:
        file = write_index(folders.parent, "label,name\n1,ant\n2,ant\n", "map.csv")
        with pytest.raises(RequestError, match=r"'ant' the classes \[1, 2\]"):
            build(root=folders, class_map=file)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [("[1]", "holds no classes"), ("{", "is not JSON"), ('{"ant": -1}', "'ant' has the class -1")],
    )
    def test_bad_json_maps(self, build: Build, folders: Path, content: str, complaint: str) -> None:
        file = folders.parent / "map.json"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(RequestError, match=complaint):
            build(root=folders, class_map=file)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("file,label\nzebra/b.png,1\n", "no column 'path'; its columns are file, label"),
            ("path\nzebra/b.png\n", "no column 'label'"),
            ("", "no column 'path'; its columns are none"),
            ("path,label\n", "lists no images"),
            ("path,label\nzebra/b.png,1.5\n", "line 2: the label '1.5' is no class index"),
            ("path,label\nzebra/b.png,-1\n", "the label '-1' is no class index"),
            ("path,label\nzebra/b.png,\n", "the label '' is no class index"),
            ("path,label\n,1\n", "the path is blank"),
            ("path,label\nzebra/b.png,1\n./zebra/b.png,1\n", "line 3: the path 'zebra/b.png' occurs twice"),
            ("path,label\n/elsewhere/b.png,1\n", "does not lie in"),
            ("path,label\nb.png,1\n", "none of the 1 listed images lies in"),
            (
                'path,label,boxes\nzebra/b.png,1,"1,2,3"\n',
                "line 2: malformed box '1,2,3'; expected 'x0,y0,x1,y1'",
            ),
            ('path,label,boxes\nzebra/b.png,1,"3,2,1,4"\n', "malformed box '3,2,1,4'"),
            ('path,label,boxes\nzebra/b.png,1,"0,0,nan,4"\n', "malformed box"),
            ('path,label,boxes\nzebra/b.png,1,"0,0,4,4;"\n', "malformed box ''"),
            ("path,label,boxes\nzebra/b.png,1,0,0,4,4\n", "line 2: expected 3 values"),
            ("path,label,boxes\nzebra/b.png,1\n", "line 2: expected 3 values"),
        ],
    )
    def test_bad_indexes(self, build: Build, folders: Path, text: str, complaint: str) -> None:
        with pytest.raises(RequestError) as caught:
            build(index=write_index(folders, text))
        assert complaint in str(caught.value)

    def test_no_such_files(self, build: Build, folders: Path) -> None:
        with pytest.raises(RequestError, match=r"no such file: .*gone\.csv; give the path of the index"):
            build(index=folders / "gone.csv")
        with pytest.raises(RequestError, match=r"give the path of the class map"):
            build(root=folders, class_map=folders / "gone.json")
        index = write_index(folders, "path,label\nzebra/b.png,1\n")
        with pytest.raises(RequestError, match=r"no such folder: .*nowhere"):
            build(index=index, root=folders / "nowhere")

    def test_paths_that_start_one_folder_further_down(self, build: Build, folders: Path) -> None:
        index = write_index(folders, "path,label\nb.png,1\n")
        with pytest.raises(RequestError, match=r"give root = .*zebra$"):
            build(index=index)

    def test_split_without_a_column(self, build: Build, folders: Path) -> None:
        index = write_index(folders, "path,label\nzebra/b.png,1\n")
        with pytest.raises(RequestError, match="no column 'split'"):
            build(index=index, split="test")

    def test_an_index_in_another_encoding(self, build: Build, folders: Path) -> None:
        (folders / "index.csv").write_bytes("path,label\nzebré.png,1\n".encode("latin-1"))
        with pytest.raises(RequestError, match="is not UTF-8"):
            build(index=folders / "index.csv")


@pytest.mark.skipif(not DATA, reason="FAITHMAP_DATA names no folder of photographs")
@pytest.mark.parametrize(
    ("name", "scored"), [("imagenet_val", 150), ("tiny_imagenet_val", 50), ("imagenet_samples", 0)]
)
def test_all_photographs_by_their_table(build: Build, tmp_path: Path, name: str, scored: int) -> None:
    """Each can be read; where there are boxes, all of the oracle's energy lies in them."""
    place = {"index": str(Path(DATA) / f"{name}.csv"), "root": str(Path(DATA) / name)}
    samples = build(**place)
    assert len(samples) == len((Path(DATA) / f"{name}.csv").read_text(encoding="utf-8").splitlines()) - 1
    for sample in samples:
        assert prepare(sample, Transform((64, 64))).image.isfinite().all()
    if scored:
        energy = oracle_energy({"name": "imagefolder", **place}, Path(DATA), tmp_path / "run")
        assert len(energy) >= scored
        assert (energy - 100).abs().max() <= 0.1
