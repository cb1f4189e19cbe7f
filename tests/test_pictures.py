"""Image files with boxes and masks: both turn with the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from faithmap.errors import DataError
from faithmap.pictures import ORIENTATION, Picture

BOX = (3.0, 5.0, 13.0, 9.0)


def _is_one(values: np.ndarray) -> np.ndarray:
    return values == 1


def _is_void(values: np.ndarray) -> np.ndarray:
    return values == 255


def _stored(folder: Path, turn: int, mask_size: tuple[int, int] = (30, 20)) -> Picture:
    """A photograph, red in the box, black elsewhere, with a mask of classes 1 and 255 (a border)."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[5:9, 3:13, 0] = 255
    photo = PIL.Image.fromarray(pixels)
    photo.getexif()[ORIENTATION] = turn
    photo.save(folder / "photo.png", exif=photo.getexif())
    classes = np.zeros(mask_size[::-1], np.uint8)
    classes[5:9, 3:13] = 1
    classes[4, 3:13] = 255
    PIL.Image.fromarray(classes).save(folder / "classes.png")
    return Picture(folder / "photo.png", (BOX,), folder / "classes.png", _is_one, _is_void)


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_and_masks_turn_with_the_image(tmp_path: Path, turn: int) -> None:
    picture = _stored(tmp_path, turn)
    red = torch.from_numpy(np.asarray(picture.image())[:, :, 0] > 0)
    mask = picture.upright_mask()
    assert mask.dtype == torch.bool
    assert torch.equal(mask, red)
    void = picture.upright_void()
    assert void.sum() == 10 and not (void & mask).any()
    beside = torch.nn.functional.max_pool2d(red[None].float(), 3, 1, 1)[0] > 0
    assert bool(beside[void].all())
    x0, y0, x1, y1 = picture.upright_boxes()[0].int().tolist()
    boxed = torch.zeros_like(red)
    boxed[y0:y1, x0:x1] = True
    assert torch.equal(boxed, red)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    picture = _stored(tmp_path, 1, mask_size=(30, 21))
    with pytest.raises(DataError, match=r"classes\.png has 30 x 21 pixels, its image .* 30 x 20"):
        picture.upright_mask()


def test_a_mask_that_is_not_there_or_no_image_is_named(tmp_path: Path) -> None:
    picture = _stored(tmp_path, 1)
    (tmp_path / "classes.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"classes\.png cannot be read as a mask"):
        picture.upright_mask()
    with pytest.raises(DataError, match="has no mask"):
        Picture(tmp_path / "photo.png").upright_mask()
