"""`faithmap show`: what is drawn of samples, where it is drawn, and what the command refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import Typed

from faithmap import showing
from faithmap.records import Sample
from faithmap.transforms import Prepared


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in a folder of one's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images in an index, one of them with a box, and a request that names them."""
    for name in ("a", "b"):
        PIL.Image.new("RGB", (40, 30), "grey").save(tmp_path / f"{name}.png")
    index = 'path,label,name,boxes\na.png,0,"ant, formicid","10,5,30,20"\nb.png,1,bee,\n'
    (tmp_path / "index.csv").write_text(index, encoding="utf-8")
    toml = (
        '[[datasets]]\nname = "imagefolder"\nlabel = "mine"\nindex = "index.csv"\n'
        '[[models]]\nname = "shapes/resnet"\npretrained = false\n'
    )
    (tmp_path / "request.toml").write_text(toml, encoding="utf-8")
    return tmp_path


def panel(**truths: torch.Tensor) -> showing.Panel:
    """A black image of 20 x 30 pixels."""
    prepared = Prepared(torch.zeros(3, 20, 30), *(truths.get(key) for key in ("boxes", "mask", "void")))
    return showing.Panel(Sample(id="one", image=Path("one.png"), label=3), prepared, "thing (3)")


class TestFigure:
    def test_a_box_is_drawn_on_the_edges_of_its_pixels(self) -> None:
        figure = showing.draw([panel(boxes=torch.tensor([[3.0, 4, 11, 9], [0, 0, 30, 20]]))], "a title")
        (axis,) = figure.axes
        corners = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches}
        assert corners == {(3, 4, 8, 5), (0, 0, 30, 20)}
        assert axis.images[0].get_extent() == [0, 30, 20, 0]
        assert axis.get_title() == "thing (3)\none"

    def test_a_mask_is_outlined_between_the_pixels(self) -> None:
        """Halfway between the last pixel inside and the first outside, also along the image's edge."""
        mask = torch.zeros(20, 30, dtype=torch.bool)
        mask[2:8, 5:30] = True
        (axis,) = showing.draw([panel(mask=mask)], "a title").axes
        for contour in axis.collections:
            points = np.concatenate([path.vertices for path in contour.get_paths()])
            np.testing.assert_allclose(points.min(0), (5, 2))
            np.testing.assert_allclose(points.max(0), (30, 8))
        assert axis.get_xlim() == (0, 30)
        assert axis.get_ylim() == (20, 0)

    def test_void_pixels_are_tinted(self) -> None:
        mask, void = torch.zeros(2, 20, 30, dtype=torch.bool)
        mask[2:8, 5:30], void[8:10, 5:30] = True, True
        photograph, tint = showing.draw([panel(mask=mask, void=void)], "a title").axes[0].images
        assert np.array_equal(np.asarray(tint.get_array()) > 0, void.numpy())
        assert tint.get_extent() == photograph.get_extent()
        clear, yellow = tint.cmap(np.array([0.0, 1.0]))
        assert clear[3] == 0 and 0.3 < yellow[3] < 0.9

    def test_without_truths_and_with_an_empty_mask(self) -> None:
        empty = torch.zeros(20, 30, dtype=torch.bool)
        for one in (panel(), panel(mask=empty, boxes=torch.zeros(0, 4))):
            (axis,) = showing.draw([one], "a title").axes
            assert not axis.patches
            assert not axis.collections

    def test_four_in_a_row(self) -> None:
        axes = showing.draw([panel()] * 6, "a title").axes
        assert len(axes) == 8
        assert sum(bool(axis.images) for axis in axes) == 6


class TestCommand:
    def test_the_embedded_images(self, typed: Typed, tmp_path: Path) -> None:
        code, shown = typed("show", "shapes", "--set", "n=32", "--set", "objects=2", "--limit", 5)
        assert code == 0, shown
        assert "shapes: 32 samples, 5 shown, 5 with boxes, 5 with masks; wrote shapes.png" in shown
        with PIL.Image.open(tmp_path / "shapes.png") as image:
            assert image.width > 500

    def test_a_dataset_and_a_model_of_a_request(self, typed: Typed, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "figure.svg"
        words = ("--request", photos / "request.toml", "--model", "shapes/resnet", "--out", out)
        code, shown = typed("show", "mine", *words)
        assert code == 0, shown
        assert "mine: 2 samples, 2 shown, 1 with boxes, 0 with masks" in shown
        assert out.read_text(encoding="utf-8").startswith("<?xml")

    def test_paths_are_relative_to_where_they_are_typed(
        self, typed: Typed, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, shown = typed("show", "imagefolder", "--set", "index=index.csv", "--out", "figure.png")
        assert code == 0, shown
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "other.csv").write_text("path,label\na.png,1\n", encoding="utf-8")
        monkeypatch.chdir(elsewhere)
        words = ("--request", photos / "request.toml", "--set", "index=other.csv", "--set", "root=..")
        code, shown = typed("show", "mine", *words)
        assert code == 0, shown
        assert "mine: 1 sample, 1 shown" in shown

    def test_titles_are_short_words_with_the_label(self, photos: Path) -> None:
        from faithmap.data import load_dataset
        from faithmap.records import Spec

        data = load_dataset(Spec("imagefolder", {"index": str(photos / "index.csv")}))
        assert [showing.title(sample, data) for sample in data.samples] == ["ant (0)", "bee (1)"]
        assert showing.title(Sample(id="x", image=Path("x"), label=9), data) == "class 9"
        assert showing.title(Sample(id="x", image=Path("x"), label=1), data) == "bee (1)"
        assert showing.title(Sample(id="x", image=Path("x")), data) == "no label"

    def test_images_that_cannot_be_read_are_listed(self, typed: Typed, photos: Path, tmp_path: Path) -> None:
        (photos / "a.png").write_bytes(b"no image")
        code, shown = typed("show", "imagefolder[index=index.csv]")
        assert code == 1
        assert "not shown: image 'a.png' cannot be read" in shown
        assert "1 shown" in shown
        assert (tmp_path / "imagefolder.png").is_file()
        (tmp_path / "imagefolder.png").unlink()
        (photos / "b.png").write_bytes(b"no image")
        code, shown = typed("show", "imagefolder[index=index.csv]")
        assert code == 1
        assert "no figure" in shown
        assert not (tmp_path / "imagefolder.png").exists()

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("shape",), "unknown dataset 'shape'; did you mean 'shapes'?"),
            (("shapes", "--set", "nn=3"), "has no parameter 'nn'; did you mean 'n'?"),
            (("shapes", "--set", "n"), "'n' is no option; write key=value"),
            (("shapes", "--out", "figure.txt"), "figure.txt has no suffix of a figure"),
            (("shapes", "--out", "gone/figure.png"), "the folder gone does not exist"),
            (("shapes", "--limit", "0"), "limit = 0"),
            (("shapes", "--limit", "401"), "--limit 401: a figure holds up to 400 samples"),
            (("shapes", "--part", "test"), "part = 'test': expected one of eval, dev, all"),
            (("shapes", "--model", "shapes/resnets"), "shapes/resnet"),
            (("shapes", "--request", "gone.toml"), "no such file: gone.toml"),
            (("imagenet",), "dataset 'imagenet' was given no root; get the validation images"),
            (("voc2012", "--set", "root=gone"), "/gone; get VOCtrainval_11-May-2012.tar from host.robots"),
        ],
    )
    def test_refusals_are_one_sentence(self, typed: Typed, words: tuple[str, ...], complaint: str) -> None:
        code, shown = typed("show", *words)
        assert code == 2
        assert complaint in shown
        assert shown.startswith("faithmap: ")
        assert shown.count("\n") == 1

    def test_a_name_that_the_request_does_not_hold(self, typed: Typed, photos: Path) -> None:
        code, shown = typed("show", "min", "--request", photos / "request.toml")
        assert code == 2
        assert "names no dataset 'min'; did you mean 'mine'?" in shown
