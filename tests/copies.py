"""Small copies of published datasets, as the tests write them: an object in red on a dark ground."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import tarfile
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from faithmap import conformance
from faithmap.models import Transform
from faithmap.pictures import ORIENTATION
from faithmap.records import Sample, SampleList
from faithmap.registry import get
from faithmap.transforms import prepare

Box = tuple[int, int, int, int]
#: (width, height) of the images: halved and cropped to a square, edges at even pixels stay sharp.
SIZE = (96, 64)
HALVED = Transform((32, 32), 1.0, "bilinear")


def inside(box: Box, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Bool (H, W), true in the box."""
    mask = np.zeros(size[::-1], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def paint(file: Path, box: Box, size: tuple[int, int] = SIZE, turn: int = 1) -> None:
    """Save an image whose red pixels are those of the box; EXIF may ask for a turn."""
    pixels = np.full((*size[::-1], 3), 20, np.uint8)
    pixels[inside(box, size), 0] = 230
    picture = PIL.Image.fromarray(pixels)
    picture.getexif()[ORIENTATION] = turn
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 100, "subsampling": 0} if file.suffix == ".jpg" else {}
    picture.save(file, exif=picture.getexif(), **options)


def save_grey(file: Path, values: np.ndarray, mode: str = "L") -> None:
    """Save a mask as a greyscale or palette image."""
    picture = PIL.Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        picture = picture.convert("L")
        coloured = PIL.Image.new("P", picture.size)
        coloured.putdata(picture.tobytes())
        coloured.putpalette([0, 0, 0, 90, 10, 10, 10, 90, 10, 90, 90, 10])
        picture = coloured
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def listed(name: str, **params: Any) -> SampleList:
    """The samples of a dataset as a run lists them."""
    plugin = get("dataset", name)
    samples = plugin.make(plugin.check(params))()
    assert isinstance(samples, SampleList)
    return samples


def by_id(samples: SampleList) -> Mapping[str, Sample]:
    """The samples by their ids."""
    return {sample.id: sample for sample in samples}


def red(sample: Sample) -> torch.Tensor:
    """Bool (H, W): the red pixels of the image."""
    assert callable(sample.image)
    return torch.from_numpy(np.asarray(sample.image())[..., 0] > 125)


def mask_of(sample: Sample) -> torch.Tensor:
    """The mask, read."""
    assert callable(sample.mask)
    return sample.mask()


def boxes_of(sample: Sample) -> list[list[float]]:
    """The boxes, read."""
    assert callable(sample.boxes)
    return sample.boxes().tolist()


def assert_exact_after_the_transform(sample: Sample) -> None:
    """Halved and cropped, the mask is the red pixels, and so are the boxes."""
    moved = prepare(sample, HALVED)
    seen = moved.image[0] > 0.5
    assert 0 < seen.sum() < seen.numel()
    if moved.mask is not None:
        assert torch.equal(moved.mask, seen)
    if moved.boxes is not None:
        drawn = torch.zeros_like(seen)
        for x0, y0, x1, y1 in moved.boxes.round().int().tolist():
            drawn[y0:y1, x0:x1] = True
        assert torch.equal(drawn, seen)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which this machine, for a while, hands out the files of a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def packed(archive: Path, root: Path, *folders: str) -> str:
    """Pack folders of `root` into an archive; its MD5."""
    with tarfile.open(archive, "w:gz") as file:
        for folder in folders:
            file.add(root / folder, folder)
    return hashlib.md5(archive.read_bytes()).hexdigest()


def cut_off_behind_unpacking(patch: pytest.MonkeyPatch) -> None:
    """Have torchvision unpack archives and then be interrupted."""
    from torchvision.datasets import utils

    unpack = utils.extract_archive

    def cut_off(*args: Any, **options: Any) -> str:
        unpack(*args, **options)
        raise KeyboardInterrupt

    patch.setattr(utils, "extract_archive", cut_off)


def assert_passes_the_kit(name: str, root: Path, more: str = "", truths: bool = True) -> None:
    """Every check of datasets passes; that of truths may be skipped where there are none."""
    results = conformance.check_dataset(f"{name}[root={root}{more}]")
    failures = conformance.failures(results)
    assert not failures, failures
    skipped = {result.check: result.message for result in results if result.status == "skipped"}
    assert set(skipped) == (set() if truths else {"check_truths"}), skipped
