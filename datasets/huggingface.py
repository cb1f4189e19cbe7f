"""Any image dataset of Hugging Face's hub, or of files in the formats that its library reads."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithmap import dataset
from faithmap.errors import DataError, RequestError
from faithmap.hub import Rows, Table, open_table
from faithmap.on_disk import one_of
from faithmap.pictures import ORIENTATION, to_rgb, turned, turned_mask
from faithmap.records import Sample, SampleList

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

NAME = "huggingface"
FORMATS = ("xyxy", "xywh", "coco", "cxcywh")
UNITS = ("pixels", "relative")


@dataset(
    version=1,
    source="a dataset of the Hugging Face Hub, or files in the formats that its library reads",
    license="that of the dataset, as its card on the hub states it",
    gives={"label"},
)
def huggingface(
    *,
    path: str | None = None,
    root: str | Path | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    image: str = "image",
    labels: str = "label",
    boxes: str = "",
    box_format: str = "xyxy",
    box_units: str = "pixels",
    mask: str = "",
    mask_value: int | None = None,
    void_value: int | None = None,
    id: str = "",
    streaming: bool = False,
    take: int | None = None,
    download: bool = False,
) -> Iterable[Sample]:
    """An image dataset by its id on the hub, or from files such as Parquet, with columns to name.

    Needs Hugging Face's library, the extra `huggingface`: `pip install "datasets>=4.0"`. The hub is
    asked only with `download = true`; without it, what has been downloaded before is taken from the
    library's cache.

    The revision is the hub's commit, or, for files below `root`, a digest of their names and sizes.
    Ids are the split and the row's number in it, so they stay the same as long as the revision does.
    Labels are those of the dataset: integers, or words, which are numbered in their sorted order. A
    negative label, as on test images without one, counts as none.

    Args:
        path: the dataset's id, such as "ethz/food101"; with `root`, the format of its files, such as
            "imagefolder" or "parquet".
        root: a folder on this machine. Without `path` the library tells the format of what is in it.
        config: the configuration (subset) of the dataset, where it has several.
        split: the split, such as "validation"; where there is only one, that one.
        revision: branch, tag or commit on the hub. Only a commit in full pins it.
        data_files: files below `root` (or of the dataset on the hub): a pattern, a list, or a table of
            them by split.
        image: the column of the images.
        labels: the column of the labels; "" where there are none.
        boxes: the column of the boxes, "" for none. A row holds one box or a list of them, all of the
            labelled object. "objects.bbox" reaches into a column of records.
        box_format: what a box's four numbers are: "xyxy" (left, top, right, bottom), "xywh" or "coco"
            (left, top, width, height), "cxcywh" (centre, width, height). Pixels are counted from 0.
        box_units: "pixels" of the stored image, or "relative" to its width and height.
        mask: the column of the masks, images as large as the stored image; "" for none.
        mask_value: the value on the object; by default all but 0, and but `void_value`.
        void_value: the value, often 255, of pixels that belong neither to the object nor to the
            background; metrics of localisation pass over them. By default there are none.
        id: a column whose values serve as ids.
        streaming: read no more of the split than its first rows. They stay in memory.
        take: how many rows to stream, in the dataset's own order. This is not `limit`, which balances
            the classes and needs to know every id: many datasets are sorted by class, so that their
            first rows show only a few of them.
        download: let the library ask the hub, for what is missing or for what is streamed from there.

    Raises:
        RequestError: the library is missing, or the dataset, split, revision or a column is not there.
    """
    _check(path, root, data_files, box_format, box_units, streaming, take)
    if void_value is not None and (not mask or void_value == mask_value):
        raise RequestError(
            f"dataset '{NAME}', void_value: got {void_value}, mask '{mask}' and mask_value {mask_value}; "
            "expected the value of undecided pixels in a column of masks, another than mask_value"
        )
    table = open_table(
        path,
        config=config,
        split=split,
        revision=revision,
        root=Path(root).expanduser() if root is not None else None,
        data_files=data_files,
        take=take,
        download=download,
    )
    table.check_column("image", image, of_images=True)
    if mask:
        table.check_column("mask", mask, of_images=True)
    for parameter, name in (("labels", labels), ("boxes", boxes.split(".")[0]), ("id", id)):
        if name:
            table.check_column(parameter, name)
    numbers, names = _labels(table, labels, whole=not streaming)
    source = Source(table.rows, image, boxes, box_format, box_units, mask, mask_value, void_value)
    return SampleList(
        (
            Sample(
                id=image_id,
                image=partial(source.picture, row),
                label=known,
                boxes=partial(source.upright_boxes, row) if boxes else None,
                mask=partial(source.upright_mask, row) if mask else None,
                name=names[known] if known is not None and known < len(names) else "",
                void=partial(source.upright_void, row) if void_value is not None else None,
            )
            for row, (image_id, known) in enumerate(zip(_ids(table, id), numbers, strict=True))
        ),
        revision=table.revision,
        class_names=names or None,
    )


def _check(
    path: str | None,
    root: str | Path | None,
    data_files: object,
    box_format: str,
    box_units: str,
    streaming: bool,
    take: int | None,
) -> None:
    if path is None and root is None:
        raise RequestError(
            f"dataset '{NAME}' was given neither path nor root; give path = a dataset's id on the hub, such "
            'as "ethz/food101", or root = a folder of image data'
        )
    if root is None and path is not None and Path(path).expanduser().is_dir():
        raise RequestError(f"dataset '{NAME}', path: '{path}' is a folder on this machine; give it as root")
    if root is None and path is not None and "/" not in path and data_files is not None:
        raise RequestError(f"dataset '{NAME}', data_files: give root = the folder that they lie in")
    if streaming and (take is None or isinstance(take, bool) or not isinstance(take, int) or take < 1):
        raise RequestError(
            f"dataset '{NAME}', take: got {take!r}, expected a number of rows, 1 or more; streaming reads "
            "the first rows of a split and has to know how many"
        )
    if take is not None and not streaming:
        raise RequestError(
            f"dataset '{NAME}', take: it goes with streaming = true; use limit in [run], which balances the "
            "classes"
        )
    one_of(NAME, "box_format", box_format, FORMATS)
    one_of(NAME, "box_units", box_units, UNITS)


def _ids(table: Table, column: str) -> list[str]:
    if not column:
        return [f"{table.split}/{row:06d}" for row in range(len(table.rows))]
    ids = [str(value) for value in table.rows.column(column)]
    seen: set[str] = set()
    for row, image_id in enumerate(ids):
        if image_id in seen or not image_id:
            raise RequestError(
                f"dataset '{NAME}', id: column '{column}' holds '{image_id}' again in row {row}; ids must be "
                "unique words; leave id out to number the rows"
            )
        seen.add(image_id)
    return ids


def _labels(table: Table, column: str, whole: bool) -> tuple[list[int | None], tuple[str, ...]]:
    """The label of each row, and the classes' names where there are any."""
    if not column:
        return [None] * len(table.rows), ()
    values = table.rows.column(column)
    names = table.class_names.get(column, ())
    words = [value for value in values if isinstance(value, str)]
    if words and not whole:
        raise RequestError(
            f"dataset '{NAME}', labels: column '{column}' holds words such as '{words[0]}', which can be "
            "numbered only when all are known; leave out streaming"
        )
    if words:
        names = tuple(sorted(set(words)))
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers.get(value, value) for value in values]
    labels: list[int | None] = []
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, int):
            raise RequestError(
                f"dataset '{NAME}', labels: column '{column}' holds {str(value)[:60]!r} in row {row}, "
                "expected an integer or a word"
            )
        labels.append(None if value is None or value < 0 else int(value))
    return labels, names


@dataclass(frozen=True, slots=True)
class Source:
    """Reads the image, the boxes and the mask of a row when they are due."""

    rows: Rows
    image: str
    boxes: str
    box_format: str
    box_units: str
    mask: str
    mask_value: int | None
    void_value: int | None

    def picture(self, row: int) -> PIL.Image.Image:
        """The image of a row, upright and in RGB.

        Raises:
            DataError: there is none, or it is broken.
        """
        import PIL.ImageOps

        stored = self._stored(row, self.image)
        try:
            return to_rgb(PIL.ImageOps.exif_transpose(stored))
        except DataError as error:
            raise DataError(f"row {row}: {error}") from error
        except Exception as error:
            raise DataError(f"the image of row {row} cannot be read: {error}") from error

    def upright_boxes(self, row: int) -> torch.Tensor:
        """The boxes (K, 4) of a row, float32, in pixels of the upright image.

        Raises:
            DataError: one is malformed, or the image is broken.
        """
        import torch

        stored = self._stored(row, self.image)
        turn, (width, height) = stored.getexif().get(ORIENTATION, 1), stored.size
        column, *keys = self.boxes.split(".")
        moved = []
        for box in _each_box(_reach(self.rows.cell(row, column), keys, self.boxes), row):
            x0, y0, x1, y1 = _corners(box, self.box_format)
            if self.box_units == "relative":
                x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
            if x1 < x0 or y1 < y0:
                raise DataError(
                    f"row {row}: the box {box} ends before it begins; is it of the format "
                    f"'{self.box_format}'?"
                )
            moved.append(turned((x0, y0, x1, y1), turn, (width, height)))
        return torch.tensor(moved, dtype=torch.float32).reshape(-1, 4)

    def upright_mask(self, row: int) -> torch.Tensor | None:
        """The mask, bool (H, W), of the upright image; None where the row has none.

        Raises:
            DataError: it is broken or of another size, or the image is broken.
        """
        found = self._mask_values(row)
        if found is None:
            return None
        values, turn = found
        on = values != 0 if self.mask_value is None else values == self.mask_value
        on = on if on.ndim == 2 else on.any(2)
        return turned_mask(on & ~self._is_void(values), turn)

    def upright_void(self, row: int) -> torch.Tensor | None:
        """Where the mask is undecided, bool (H, W), of the upright image; None where there is no mask.

        Raises:
            DataError: as for `upright_mask`.
        """
        found = self._mask_values(row)
        return None if found is None else turned_mask(self._is_void(found[0]), found[1])

    def _is_void(self, values: np.ndarray) -> np.ndarray:
        import numpy as np

        if self.void_value is None:
            return np.zeros(values.shape[:2], bool)
        void = values == self.void_value
        return np.asarray(void if void.ndim == 2 else void.all(2))

    def _mask_values(self, row: int) -> tuple[np.ndarray, int] | None:
        """What the mask of a row holds, (H, W) or (H, W, bands), and the turn that EXIF asks of its image.

        None where the row has no mask.
        """
        import numpy as np

        if self.rows.cell(row, self.mask) is None:
            return None
        stored = self._stored(row, self.image)
        size = stored.size
        try:
            values = np.asarray(self._stored(row, self.mask))
        except Exception as error:
            raise DataError(f"the {self.mask} of row {row} cannot be read: {error}") from error
        if values.shape[:2] != size[::-1]:
            raise DataError(
                f"row {row}: the mask has {values.shape[1]} x {values.shape[0]} pixels, the image "
                f"{size[0]} x {size[1]}; a mask must be as large as its image"
            )
        return values, stored.getexif().get(ORIENTATION, 1)

    def _stored(self, row: int, column: str) -> PIL.Image.Image:
        """An image as it is stored, opened but not yet decoded."""
        import PIL.Image

        cell = self.rows.cell(row, column)
        if cell is None:
            raise DataError(f"row {row} holds nothing in column '{column}'")
        try:
            return PIL.Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        except Exception as error:
            raise DataError(f"the {column} of row {row} cannot be read: {error}") from error


def _reach(value: Any, keys: Sequence[str], column: str) -> Any:
    """What lies below a value: records hold it by name, a list of records holds it in each."""
    for key in keys:
        try:
            value = [part[key] for part in value] if isinstance(value, list) else value and value[key]
        except (KeyError, TypeError):
            raise DataError(f"column '{column}' does not reach a value: there is no '{key}' in it") from None
    return value


def _each_box(value: Any, row: int) -> list[list[float]]:
    """A cell as a list of boxes: it may hold one, several or none."""
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return []
    boxes = value if isinstance(value[0], Sequence) else [value]
    for box in boxes:
        if len(box) != 4 or not all(isinstance(number, int | float) and abs(number) < 1e9 for number in box):
            raise DataError(f"row {row}: a box is {str(box)[:80]}, expected four numbers")
    return [[float(number) for number in box] for box in boxes]


def _corners(box: list[float], form: str) -> tuple[float, float, float, float]:
    a, b, c, d = box
    if form in ("xywh", "coco"):
        return a, b, a + c, b + d
    if form == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return a, b, c, d
