"""The dataset `cub-200-2011` on a small copy in its official layout."""

from __future__ import annotations

import hashlib
import importlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_cnn
from copies import (
    SIZE,
    assert_exact_after_the_transform,
    assert_passes_the_kit,
    boxes_of,
    by_id,
    cut_off_behind_unpacking,
    inside,
    listed,
    mask_of,
    packed,
    paint,
    red,
    save_grey,
    served,
)

import faithmap
from faithmap.data import load_dataset
from faithmap.errors import DataError, RequestError
from faithmap.records import Spec

NAME = "cub-200-2011"
cub = importlib.import_module("faithmap.datasets.cub_200_2011")

SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
PARTS = ("back", "beak", "left eye", "left wing", "right eye")
#: For each image its species and box, x y width height.
BIRDS = ((1, (20, 10, 40, 30)), (1, (30, 20, 36, 24)), (2, (24, 8, 50, 40)), (3, (36, 16, 24, 32)))


def image_name(number: int) -> str:
    species = SPECIES[BIRDS[number - 1][0] - 1]
    return f"{species}/{species[4:]}_{number:04d}_{500 + number}.jpg"


def corners(number: int) -> tuple[int, int, int, int]:
    x, y, width, height = BIRDS[number - 1][1]
    return x, y, x + width, y + height


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """CUB_200_2011/ with segmentations/ beside it: images 1 and 3 are for training."""
    base = tmp_path / "CUB_200_2011"
    (base / "parts").mkdir(parents=True)
    numbers = range(1, len(BIRDS) + 1)
    tables = {
        "classes.txt": [f"{place} {name}" for place, name in enumerate(SPECIES, 1)],
        "images.txt": [f"{number} {image_name(number)}" for number in numbers],
        "image_class_labels.txt": [f"{number} {BIRDS[number - 1][0]}" for number in numbers],
        "train_test_split.txt": [f"{number} {number % 2}" for number in numbers],
        "bounding_boxes.txt": [
            " ".join([str(number), *(f"{value:.1f}" for value in BIRDS[number - 1][1])]) for number in numbers
        ],
        "parts/parts.txt": [f"{place} {name}" for place, name in enumerate(PARTS, 1)],
        "parts/part_locs.txt": [
            f"{number} {place} {corners(number)[0] + 4.0 * place} {corners(number)[1] + 10.0} "
            f"{int((number, place) != (4, 2))}"
            for number in numbers
            for place in range(1, len(PARTS) + 1)
        ],
    }
    for name, table in tables.items():
        (base / name).write_text("\n".join(table) + "\n", encoding="utf-8")
    for number in numbers:
        paint(base / "images" / image_name(number), corners(number))
        # Three of five annotators marked the bird, two a rim around it, one the whole upper left.
        x0, y0, x1, y1 = corners(number)
        votes = 51 * inside((0, 0, 48, 32)).astype(int)
        votes[inside((x0 - 2, y0 - 2, x1 + 2, y1 + 2))] = 2 * 51
        votes[inside(corners(number))] = 3 * 51
        save_grey((tmp_path / "segmentations" / image_name(number)).with_suffix(".png"), votes)
    return tmp_path


def edit(root: Path, name: str, line: int, text: str | None) -> Path:
    """Replace a line of a table, or take it out."""
    file = root / "CUB_200_2011" / name
    table = file.read_text(encoding="utf-8").splitlines()
    table[line - 1 : line] = [] if text is None else [text]
    file.write_text("\n".join(table), encoding="utf-8")
    return file


class TestTheCopy:
    @pytest.mark.parametrize("more", ["", ",split=all", ",part=wing,split=all"])
    def test_it_passes_the_kit(self, root: Path, more: str) -> None:
        assert_passes_the_kit(NAME, root, more)

    def test_labels_boxes_and_masks(self, root: Path) -> None:
        samples = listed(NAME, root=root, split="all")
        assert samples.class_names == ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
        for number, sample in enumerate(samples, 1):
            assert sample.id == image_name(number)
            assert sample.label == BIRDS[number - 1][0] - 1
            assert sample.name == samples.class_names[sample.label]
            assert boxes_of(sample) == [list(corners(number))]
            assert torch.equal(mask_of(sample), red(sample))
            assert_exact_after_the_transform(sample)

    def test_splits(self, root: Path) -> None:
        ids = {split: list(by_id(listed(NAME, root=root, split=split))) for split in ("train", "test")}
        assert ids == {"train": [image_name(1), image_name(3)], "test": [image_name(2), image_name(4)]}

    @pytest.mark.parametrize(
        ("agreement", "expected"),
        [(0.0, "any"), (0.3, "two"), (0.4, "three"), (0.5, "three"), (0.6, "none"), (0.99, "none")],
    )
    def test_as_many_annotators_as_asked_for(self, root: Path, agreement: float, expected: str) -> None:
        """A pixel belongs to the bird where more than the share of the five marked it."""
        sample = listed(NAME, root=root, agreement=agreement)[0]
        x0, y0, x1, y1 = corners(2)
        rim = inside((x0 - 2, y0 - 2, x1 + 2, y1 + 2))
        truth = {
            "any": rim | inside((0, 0, 48, 32)), "two": rim, "three": inside(corners(2)), "none": rim & ~rim,
        }  # fmt: skip
        assert np.array_equal(mask_of(sample).numpy(), truth[expected])

    def test_the_first_of_several_channels_holds_the_votes(self, root: Path) -> None:
        import PIL.Image

        file = (root / "segmentations" / image_name(2)).with_suffix(".png")
        with PIL.Image.open(file) as votes:
            PIL.Image.merge("LA", [votes, PIL.Image.new("L", votes.size, 255)]).save(file)
        sample = listed(NAME, root=root)[0]
        assert torch.equal(mask_of(sample), red(sample))

    def test_truths_by_choice(self, root: Path) -> None:
        boxes, masks = listed(NAME, root=root, truth="box"), listed(NAME, root=root, truth="mask")
        assert all(sample.mask is None and sample.boxes is not None for sample in boxes)
        assert all(sample.mask is not None and sample.boxes is None for sample in masks)
        assert_exact_after_the_transform(boxes[0])

    def test_the_folder_itself_with_segmentations_inside(self, root: Path) -> None:
        (root / "segmentations").rename(root / "CUB_200_2011" / "segmentations")
        sample = listed(NAME, root=root / "CUB_200_2011")[0]
        assert torch.equal(mask_of(sample), red(sample))

    def test_without_segmentations(self, root: Path) -> None:
        (root / "segmentations").rename(root / "elsewhere")
        assert all(sample.mask is None for sample in listed(NAME, root=root))
        with pytest.raises(RequestError, match=r"no segmentations/ in .*segmentations\.tgz"):
            listed(NAME, root=root, truth="mask")

    def test_an_image_that_exif_turns_keeps_its_truths(self, root: Path) -> None:
        paint(root / "CUB_200_2011" / "images" / image_name(2), corners(2), turn=6)
        sample = listed(NAME, root=root)[0]
        assert mask_of(sample).shape == SIZE
        assert torch.equal(mask_of(sample), red(sample))

    def test_the_revision_follows_the_files(self, root: Path) -> None:
        before = listed(NAME, root=root).revision
        assert before == listed(NAME, root=str(root / "CUB_200_2011")).revision
        with (root / "CUB_200_2011" / "images" / image_name(2)).open("ab") as file:
            file.write(b"more")
        after = listed(NAME, root=root).revision
        edit(root, "bounding_boxes.txt", 2, "2 1.0 2.0 3.0 4.0")
        assert len({before, after, listed(NAME, root=root).revision}) == 3

    def test_where_the_data_lie_or_came_from_is_no_part_of_the_key(self, root: Path) -> None:
        given = [{}, {"root": str(root / "CUB_200_2011")}, {"download": True}, {"agreement": 0.4}]
        first, moved, fetched, other = (
            load_dataset(Spec(NAME, {"root": str(root), **params})).key for params in given
        )
        assert first == moved == fetched != other


class TestParts:
    def test_discs_and_squares(self, root: Path) -> None:
        """Against every pixel's own distance from the place of the part."""
        sample = listed(NAME, root=root, part="beak", part_radius=0.2)[0]
        x, y = corners(2)[0] + 8.0, corners(2)[1] + 10.0
        radius = 0.2 * 36
        slow = [
            [(row - y) ** 2 + (column - x) ** 2 <= radius**2 for column in range(96)] for row in range(64)
        ]
        assert mask_of(sample).tolist() == slow
        expected = [x + 0.5 - radius, y + 0.5 - radius, x + 0.5 + radius, y + 0.5 + radius]
        assert boxes_of(sample)[0] == pytest.approx(expected)

    def test_left_and_right(self, root: Path) -> None:
        left, both = (listed(NAME, root=root, part=part)[0] for part in ("left eye", "eye"))
        assert (len(boxes_of(left)), len(boxes_of(both))) == (1, 2)
        assert 1.5 * mask_of(left).sum() < mask_of(both).sum()

    def test_a_part_that_is_not_visible_is_no_truth(self, root: Path) -> None:
        seen, hidden = listed(NAME, root=root, part="beak")
        assert seen.mask is not None
        assert (hidden.mask, hidden.boxes) == (None, None)

    def test_an_unknown_part_is_refused(self, root: Path) -> None:
        with pytest.raises(RequestError, match=r"parts\.txt has no part 'beek'; did you mean 'beak'"):
            listed(NAME, root=root, part="beek")


class TestBadData:
    def test_no_root_says_where_to_get_the_data(self, tmp_path: Path) -> None:
        for params in ({}, {"root": tmp_path / "none"}, {"root": tmp_path}):
            with pytest.raises(RequestError, match=r"CUB_200_2011\.tgz.*vision\.caltech\.edu.*give root"):
                listed(NAME, **params)

    @pytest.mark.parametrize(
        ("name", "line", "text", "message"),
        [
            ("images.txt", 2, "2", r"images\.txt, line 2: expected 'image_id image_name', got '2'"),
            ("images.txt", 2, "1 a/b.jpg", r"images\.txt, line 2: '1' occurs twice"),
            ("bounding_boxes.txt", 3, "3 1 2 3", r"line 3: expected 'image_id x y width height'"),
            ("bounding_boxes.txt", 3, "3 1 2 3 x", r"line 3: the height is 'x', expected a number"),
            ("bounding_boxes.txt", 3, "3 1 2 nan 4", r"line 3: the width is 'nan'"),
            ("bounding_boxes.txt", 4, "4 1 2 3 -4", r"line 4: the box is 3 wide and -4 high"),
            ("bounding_boxes.txt", 4, None, r"images\.txt, line 4: image '4' has no line in bounding_boxes"),
            ("image_class_labels.txt", 2, "2 9", r"line 2: the class id is '9', expected .* from 1 to 3"),
            ("train_test_split.txt", 1, "1 2", r"line 1: the split is '2', expected .* from 0 to 1"),
            ("classes.txt", 1, "one Albatross", r"classes\.txt, line 1: the class id is 'one'"),
        ],
    )
    def test_malformed_lines_are_named(
        self, root: Path, name: str, line: int, text: str | None, message: str
    ) -> None:
        edit(root, name, line, text)
        with pytest.raises(RequestError, match=message):
            listed(NAME, root=root, split="all")

    @pytest.mark.parametrize("name", ["classes.txt", "bounding_boxes.txt", "train_test_split.txt"])
    def test_a_missing_table_is_named(self, root: Path, name: str) -> None:
        (root / "CUB_200_2011" / name).unlink()
        with pytest.raises(RequestError, match=rf"{name} cannot be read: No such file.* unpacked"):
            listed(NAME, root=root)

    def test_an_empty_table_and_one_that_is_no_text(self, root: Path) -> None:
        (root / "CUB_200_2011" / "images.txt").write_text("\n")
        with pytest.raises(RequestError, match=r"images\.txt is empty"):
            listed(NAME, root=root)
        (root / "CUB_200_2011" / "images.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RequestError, match=r"images\.txt is not UTF-8"):
            listed(NAME, root=root)

    def test_no_images_at_all(self, root: Path) -> None:
        (root / "CUB_200_2011" / "images").rename(root / "gone")
        (root / "CUB_200_2011" / "images").mkdir()
        with pytest.raises(RequestError, match=r"none of the 2 images that .* lists is there"):
            listed(NAME, root=root)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"split": "val"}, "split: got 'val', expected one of 'test', 'train', 'all'"),
            ({"truth": "boxes"}, "truth: got 'boxes', expected one of 'auto', 'box', 'mask'"),
            ({"agreement": 1.0}, "agreement: got 1.0, expected 0 <= agreement < 1"),
            ({"part": "beak", "part_radius": 0.0}, "part_radius: got 0.0"),
        ],
    )
    def test_bad_parameters(self, root: Path, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            listed(NAME, root=root, **params)

    @pytest.mark.parametrize("kept", [0, 300])
    def test_a_broken_image_costs_itself_alone(self, root: Path, kept: int) -> None:
        file = root / "CUB_200_2011" / "images" / image_name(2)
        file.write_bytes(file.read_bytes()[:kept])
        broken, sound = listed(NAME, root=root)
        with pytest.raises(DataError, match=r"0002_502\.jpg cannot be read as an image"):
            red(broken)
        assert red(sound).any()

    def test_broken_masks_are_named(self, root: Path) -> None:
        file = (root / "segmentations" / image_name(2)).with_suffix(".png")
        save_grey(file, np.zeros((10, 10)))
        with pytest.raises(DataError, match=r"0002_502\.png has 10 x 10 pixels, its image .* 96 x 64"):
            mask_of(listed(NAME, root=root)[0])
        file.unlink()
        with pytest.raises(DataError, match=r"0002_502\.png cannot be read as a mask"):
            mask_of(listed(NAME, root=root)[0])

    def test_an_empty_mask_leaves_the_object_s_scores_blank(self, root: Path) -> None:
        """No annotator agrees: the energy has a reason instead of a value, the image stays."""
        model = make_cnn()
        sample = listed(NAME, root=root, agreement=0.9)[0]
        moved = faithmap.transforms.prepare(sample, model.transform)
        assert moved.mask is not None
        images = moved.image[None]
        frame = faithmap.score(
            model, images, torch.rand(1, 8, 8), masks=moved.mask[None], metrics=["energy-pointing-game"]
        )
        energy = frame[frame.metric == "energy_pg"].iloc[0]
        assert np.isnan(energy.value)
        assert "no object in the image" in energy.reason


class TestDownload:
    @pytest.fixture
    def archives(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """The two archives at other addresses, with their sums; the root that they were made of."""
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with served(root) as address:
            published = [
                (f"{address}/{name}", name, packed(root / name, root, folder))
                for folder, (_, name, _) in zip(("CUB_200_2011", "segmentations"), cub.ARCHIVES, strict=True)
            ]
            monkeypatch.setattr(cub, "ARCHIVES", tuple(published))
            yield root

    def test_nothing_is_fetched_unasked(self, archives: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="no such folder"):
            listed(NAME, root=tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_archives_are_fetched_checked_and_unpacked(self, archives: Path, tmp_path: Path) -> None:
        samples = listed(NAME, root=tmp_path / "new", download=True)
        assert torch.equal(mask_of(samples[0]), red(samples[0]))
        assert samples.revision == listed(NAME, root=archives).revision

    def test_what_is_there_is_not_fetched_again(
        self, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = listed(NAME, root=archives).revision
        monkeypatch.setattr(cub, "ARCHIVES", (("http://none.invalid", "none.tgz", ""), cub.ARCHIVES[1]))
        assert listed(NAME, root=archives, download=True).revision == before
        (archives / "segmentations").rename(tmp_path / "lost")
        assert listed(NAME, root=archives, download=True).revision == before

    def test_half_of_the_masks_are_not_taken_for_all(
        self, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A download of the masks alone that is cut off leaves no folder of them, and is made up for."""
        before = listed(NAME, root=archives).revision
        (archives / "segmentations").rename(tmp_path / "lost")
        with monkeypatch.context() as patched:
            cut_off_behind_unpacking(patched)
            with pytest.raises(KeyboardInterrupt):
                listed(NAME, root=archives, download=True)
        assert not (archives / "segmentations").exists()
        assert listed(NAME, root=archives, download=True).revision == before

    def test_an_archive_cannot_write_outside_its_folder(
        self, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (address, name, _), other = cub.ARCHIVES
        before = vars(tarfile.TarFile)["extraction_filter"]
        (archives / "evil.txt").write_text("evil", encoding="utf-8")
        with tarfile.open(archives / name, "w:gz") as archive:
            archive.add(archives / "evil.txt", "../../evil.txt")
        md5 = hashlib.md5((archives / name).read_bytes()).hexdigest()
        monkeypatch.setattr(cub, "ARCHIVES", ((address, name, md5), other))
        with pytest.raises(RequestError, match=r"cannot be downloaded: .*evil.txt.* outside the destination"):
            listed(NAME, root=tmp_path / "deep" / "new", download=True)
        assert not list((tmp_path / "deep").rglob("evil.txt"))
        assert vars(tarfile.TarFile)["extraction_filter"] is before

    def test_a_wrong_sum_is_refused(
        self, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (address, name, _), other = cub.ARCHIVES
        monkeypatch.setattr(cub, "ARCHIVES", ((address, name, "0" * 32), other))
        with pytest.raises(RequestError, match=r"cannot be downloaded: .*corrupted"):
            listed(NAME, root=tmp_path / "new", download=True)

    def test_offline_is_offline(
        self, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(RequestError, match="the network may not be asked"):
            listed(NAME, root=tmp_path / "new", download=True)
        with pytest.raises(RequestError, match="the network may not be asked"):
            listed(NAME, download=True)
        with pytest.raises(RequestError, match="needs root"):
            listed(NAME)
