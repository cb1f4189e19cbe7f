"""The dataset `imagenette` on a small copy in its official layout, and where downloads without a root go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from copies import assert_passes_the_kit, by_id, cut_off_behind_unpacking, listed, packed, paint, served

from faithmap import fitting
from faithmap.errors import RequestError

NAME = "imagenette"
WNIDS = ("n01440764", "n02102040", "n03888257")
BOX = (20, 12, 60, 44)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """imagenette2-320/ with two images of each of three classes, in either split."""
    for split in ("train", "val"):
        for i, wnid in enumerate(WNIDS):
            for j in range(2):
                paint(tmp_path / "imagenette2-320" / split / wnid / f"{wnid}_{10 * i + j}.JPEG", BOX)
    (tmp_path / "imagenette2-320" / "val" / WNIDS[0] / "._hidden.JPEG").write_bytes(b"")
    (tmp_path / "imagenette2-320" / "noisy_imagenette.csv").write_text("path\n")
    return tmp_path


@pytest.mark.parametrize("more", ["", ",split=train", ",labels=own"])
def test_it_passes_the_kit(root: Path, more: str) -> None:
    assert_passes_the_kit(NAME, root, more, truths=False)


def test_labels_are_imagenets_or_its_own(root: Path) -> None:
    samples = by_id(listed(NAME, root=root))
    assert {name: sample.label for name, sample in samples.items()} == {
        f"val/{wnid}/{wnid}_{10 * i + j}.JPEG": label
        for i, (wnid, label) in enumerate(zip(WNIDS, (0, 217, 701), strict=True))
        for j in range(2)
    }
    assert {sample.name for sample in samples.values()} >= {"tench, Tinca tinca", "parachute, chute"}
    own = listed(NAME, root=root / "imagenette2-320", labels="own")
    assert [sample.label for sample in own] == [0, 0, 1, 1, 2, 2]
    assert own.class_names is not None and own.class_names[1].startswith("English springer")


@pytest.mark.parametrize("split", ["train", "val"])
def test_torchvision_lists_the_same(root: Path, split: str) -> None:
    from torchvision.datasets import Imagenette

    (root / "imagenette2-320" / "val" / WNIDS[0] / "._hidden.JPEG").unlink()
    theirs = Imagenette(root, split=split, size="320px")
    ours = listed(NAME, root=root, split=split, labels="own")
    assert len(theirs) == len(ours)
    for (image, label), sample in zip(theirs, ours, strict=True):
        assert sample.label == label
        assert callable(sample.image)
        assert np.array_equal(np.asarray(sample.image()), np.asarray(image))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"split": "test"}, "split: got 'test', expected one of 'val', 'train'"),
        ({"size": "64px"}, "size: got '64px', expected one of 'full', '320px', '160px'"),
        ({"size": "full"}, r"holds no 'val'; fetch imagenette2\.tgz"),
        ({"labels": "words"}, "labels: got 'words', expected one of 'imagenet', 'own'"),
    ],
)
def test_bad_parameters(root: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        listed(NAME, **{"root": root, **params})


def test_what_is_no_class_and_what_is_empty(root: Path) -> None:
    (root / "imagenette2-320" / "val" / "n00000001").mkdir()
    with pytest.raises(RequestError, match="'n00000001' is none of the WordNet ids"):
        listed(NAME, root=root)
    (root / "empty" / "imagenette2-320" / "val").mkdir(parents=True)
    with pytest.raises(RequestError, match="holds no images; unpack the archive anew"):
        listed(NAME, root=root / "empty")


def test_what_was_not_unpacked_to_its_end_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (root / "imagenette2-320" / "val").rename(root / "elsewhere")
    with pytest.raises(RequestError, match=r"imagenette2-320 is not complete, .* delete it and run again"):
        listed(NAME, root=root, download=True)


def test_an_interrupted_download_begins_beside_and_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import Imagenette

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    archive = tmp_path / "served" / "imagenette2-320.tgz"
    archive.parent.mkdir()
    md5 = packed(archive, root, "imagenette2-320")
    new = tmp_path / "new"
    with served(archive.parent) as address:
        monkeypatch.setitem(Imagenette._ARCHIVES, "320px", (f"{address}/{archive.name}", md5))
        with monkeypatch.context() as patched:
            cut_off_behind_unpacking(patched)
            with pytest.raises(KeyboardInterrupt):
                listed(NAME, root=new, download=True)
        assert not (new / "imagenette2-320").exists()
    # The archive is there already: nothing is asked of the network, which hands out nothing any more.
    assert listed(NAME, root=new, download=True).revision == listed(NAME, root=root).revision
    assert [path.name for path in new.iterdir()] == ["imagenette2-320"]


def test_a_download_without_a_root_is_found_without_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import Imagenette

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(fitting.HOME_VARIABLE, str(tmp_path / "home"))
    with pytest.raises(RequestError, match=r"needs root; fetch imagenette2-320\.tgz .* or give download"):
        listed(NAME)
    archive = tmp_path / "served" / "imagenette2-320.tgz"
    archive.parent.mkdir()
    md5 = packed(archive, root, "imagenette2-320")
    with served(archive.parent) as address:
        place = f"{address}/{archive.name}"
        monkeypatch.setitem(Imagenette._ARCHIVES, "320px", (place, "0" * 32))
        with pytest.raises(RequestError, match=r"cannot be downloaded: .*corrupted"):
            listed(NAME, download=True)
        monkeypatch.setitem(Imagenette._ARCHIVES, "320px", (place, md5))
        fetched = listed(NAME, download=True)
    assert fetched.revision == listed(NAME, root=root).revision == listed(NAME).revision
    assert (tmp_path / "home" / "data" / "imagenette2-320").is_dir()
