"""Image files as datasets need them: upright, in RGB, with boxes and masks that turn with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from faithmap.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

#: Endings of the files that are taken for images.
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
#: The EXIF tag that says how a viewer turns the stored image.
ORIENTATION = 0x0112

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file with the truth about it, read when it is due.

    Boxes and masks are those of the stored image, as annotators saw its pixels; where EXIF asks a viewer to
    turn the image, they turn with it.
    """

    path: Path
    #: `x0, y0, x1, y1` in pixels of the stored image.
    boxes: tuple[Box, ...] = ()
    #: The file of the mask, and which of its values lie on the object: stored values to bool (H, W).
    mask_path: Path | None = None
    on_object: Callable[[np.ndarray], np.ndarray] | None = None
    #: Which values leave open what their pixel belongs to; None: every value is decided.
    is_void: Callable[[np.ndarray], np.ndarray] | None = None

    def image(self) -> PIL.Image.Image:
        """The image upright and in RGB.

        Raises:
            DataError: the file is missing, broken, or of a kind without a clear meaning in RGB.
        """
        import PIL.Image
        import PIL.ImageOps

        try:
            with PIL.Image.open(self.path) as stored:
                return to_rgb(PIL.ImageOps.exif_transpose(stored))
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
        except Exception as error:
            raise DataError(f"{self.path} cannot be read as an image: {error}") from error

    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the stored image, before any turn.

        Raises:
            DataError: the file is missing or broken.
        """
        return self._turn()[1]

    def upright_boxes(self) -> torch.Tensor:
        """The boxes (K, 4), float32, in pixels of the upright image.

        Raises:
            DataError: the file is missing or broken.
        """
        import torch

        turn, size = self._turn()
        return torch.tensor([turned(box, turn, size) for box in self.boxes], dtype=torch.float32)

    def upright_mask(self) -> torch.Tensor:
        """The mask, bool (H, W), of the upright image.

        Raises:
            DataError: either file is missing or broken, or the two differ in size.
        """
        return self._upright(self.on_object)

    def upright_void(self) -> torch.Tensor:
        """Where the mask is undecided, bool (H, W), of the upright image.

        Raises:
            DataError: as for `upright_mask`.
        """
        return self._upright(self.is_void)

    def _upright(self, where: Callable[[np.ndarray], np.ndarray] | None) -> torch.Tensor:
        import numpy as np
        import PIL.Image

        if self.mask_path is None or where is None:
            raise DataError(f"{self.path} has no mask")
        turn, size = self._turn()
        try:
            with PIL.Image.open(self.mask_path) as stored:
                values = np.asarray(stored)
        except Exception as error:
            raise DataError(f"{self.mask_path} cannot be read as a mask: {error}") from error
        if values.shape[:2] != (size[1], size[0]):
            raise DataError(
                f"{self.mask_path} has {values.shape[1]} x {values.shape[0]} pixels, its image "
                f"{self.path} {size[0]} x {size[1]}; a mask must be as large as its image"
            )
        return turned_mask(where(values), turn)

    def _turn(self) -> tuple[int, tuple[int, int]]:
        """What EXIF asks for, and the stored (width, height)."""
        import PIL.Image

        try:
            with PIL.Image.open(self.path) as stored:
                return stored.getexif().get(ORIENTATION, 1), stored.size
        except Exception as error:
            raise DataError(f"{self.path} cannot be read as an image: {error}") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Show an image as a viewer would: see-through parts on white, 16 bits scaled down to 8.

    Raises:
        DataError: its values have no clear meaning in RGB.
    """
    import numpy as np
    import PIL.Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise DataError(
                f"its grey values go from {values.min()} to {values.max()}, expected 0 to 65535; "
                "store 8 or 16 bits"
            )
        # 257 takes 65535 to 255; Pillow's own conversion would clip everything above 255 to white.
        return PIL.Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers of unknown range; store 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", layer.size, "white")
        return PIL.Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def turned(box: Box, turn: int, size: tuple[int, int]) -> Box:
    """Move a box with the turn that EXIF asks for.

    Args:
        box: `x0, y0, x1, y1` in pixels of the stored image.
        turn: the value of EXIF's orientation, 1 (none) to 8.
        size: the stored (width, height).
    """
    width, height = size
    x0, y0, x1, y1 = box
    if turn in (2, 3):  # left and right change places
        x0, x1 = width - x1, width - x0
    if turn in (3, 4):  # top and bottom change places
        y0, y1 = height - y1, height - y0
    if turn == 5:
        return y0, x0, y1, x1
    if turn == 6:
        return height - y1, x0, height - y0, x1
    if turn == 7:
        return height - y1, width - x1, height - y0, width - x0
    if turn == 8:
        return y0, width - x1, y1, width - x0
    return x0, y0, x1, y1


def turned_mask(mask: np.ndarray, turn: int) -> torch.Tensor:
    """Turn a mask (H, W) of the stored image as EXIF asks; bool, of the upright image."""
    import numpy as np
    import PIL.Image
    import PIL.ImageOps
    import torch

    layer = PIL.Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
    layer.getexif()[ORIENTATION] = turn
    return torch.from_numpy(np.array(PIL.ImageOps.exif_transpose(layer)) > 0)


def file_size(file: Path) -> int | None:
    """Bytes of a file; None where there is none, which is for `Picture.image` to report."""
    try:
        return file.stat().st_size
    except OSError:
        return None
