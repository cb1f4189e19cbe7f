"""The checks of datasets: what is stated, what is listed, and whether truths lie where the images are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from faithmap._checks import CheckSkipped, Seen, check_common_facts, fail, isolated
from faithmap.batch import box_mask
from faithmap.config import PLACE_KEYS
from faithmap.errors import DataError, RequestError
from faithmap.explaining import describe
from faithmap.models import Transform
from faithmap.plugin import Plugin
from faithmap.records import Sample
from faithmap.transforms import Prepared, picture_size, prepare

#: Samples that are loaded.
LOADED = 6
#: Share of a mask that must lie in the boxes of its image.
COVERED = 0.8
#: What models do to images: a crop, a crop that is no square, and a squeeze.
TRANSFORMS = (
    Transform((96, 96), 0.875),
    Transform((96, 64), 0.9, "bilinear"),
    Transform((64, 96), 1.0, "bilinear", "squash"),
)
KNOWN = {"label", "box", "mask"}


class DatasetTrial:
    """One dataset with its parameters, listed once and once more when a check asks for it."""

    model = ""

    def __init__(self, plugin: Plugin, params: Mapping[str, Any]) -> None:
        self.plugin = plugin
        self.params = params

    @property
    def chosen(self) -> bool:
        """Whether a parameter that says what the data are, not where they lie, is not at its default."""
        defaults = {**self.plugin.parameters, **self.plugin.facts.check_params}
        return any(value != defaults.get(key) for key, value in self.params.items() if key not in PLACE_KEYS)

    def fetch(self) -> tuple[Any, Seen]:
        """Call the plugin: what it returned, and its samples or its error."""
        with isolated():
            try:
                given = self.plugin.make(dict(self.params))()
                return given, Seen(list(given))
            except Exception as error:
                return None, Seen(error=error)

    @cached_property
    def listing(self) -> tuple[Any, Seen]:
        """The first listing."""
        return self.fetch()

    @property
    def samples(self) -> list[Sample]:
        """The samples.

        Raises:
            CheckSkipped: there are none; `check_listing` says so.
        """
        _, seen = self.listing
        if seen.error is not None or not seen.result or not isinstance(seen.result[0], Sample):
            raise CheckSkipped("not tried: the dataset lists no samples, see check_listing")
        samples: list[Sample] = seen.result
        return samples

    @property
    def some(self) -> list[Sample]:
        """A few samples, from the first to the last."""
        samples = self.samples
        count = min(LOADED, len(samples))
        return [samples[round(i * (len(samples) - 1) / max(1, count - 1))] for i in range(count)]

    def readable(self) -> list[tuple[Sample, Prepared]]:
        """Those of them that can be read; an unreadable file costs its own image alone."""
        read = []
        for sample in self.some:
            try:
                read.append((sample, prepare(sample, TRANSFORMS[0])))
            except DataError:
                continue
        if not read:
            raise CheckSkipped("not tried: no image can be read, see check_images")
        return read


def check_facts(trial: DatasetTrial) -> None:
    """Version, source, docstring, licence and what samples come with are stated."""
    check_common_facts(trial.plugin)
    facts = trial.plugin.facts
    if not facts.license.strip():
        raise fail("license is empty", "the terms of the images", 'Name them, such as license="CC BY 4.0".')
    unknown = sorted(facts.gives - KNOWN)
    if unknown:
        raise fail(f"gives names '{unknown[0]}'", ", ".join(sorted(KNOWN)), "Name what samples carry.")


def check_listing(trial: DatasetTrial) -> None:
    """With its `check_params` the dataset lists samples."""
    _, seen = trial.listing
    if isinstance(seen.error, RequestError):
        raise CheckSkipped(f"cannot be listed here: {seen.error}")
    if seen.error is not None:
        raise fail(
            f"listing it raises {seen.said}",
            "samples",
            "Raise faithmap.errors.RequestError where what it is asked for is not there.",
        )
    if not seen.result:
        raise fail("no samples are listed", "one at least", "Look at check_params= and at the folder.")
    for sample in seen.result:
        if not isinstance(sample, Sample):
            kind = type(sample).__name__
            raise fail(f"a sample is a {kind}", "faithmap.Sample", "Yield Sample(id=, image=, ...).")


def check_revision(trial: DatasetTrial) -> None:
    """A revision pins what the images are."""
    given, _ = trial.listing
    if trial.samples and not str(getattr(given, "revision", "") or trial.plugin.facts.revision).strip():
        raise fail(
            "revision is empty",
            "a pinned one",
            "Give revision= a date, tag or hash, or return a SampleList that carries one.",
        )


def check_ids(trial: DatasetTrial) -> None:
    """Ids are words, unique, and the same on every machine."""
    seen: set[str] = set()
    for sample in trial.samples:
        if not isinstance(sample.id, str) or not sample.id:
            raise fail(f"an id is {sample.id!r}", "a word", "Name each image, as by its path below the root.")
        if sample.id in seen:
            raise fail(f"the id '{sample.id}' is given twice", "unique ids", "Add the folder or the split.")
        if PurePath(sample.id).is_absolute() or "\\" in sample.id:
            raise fail(
                f"the id '{sample.id}' is a path of this machine",
                "ids that are the same everywhere",
                "Use the path below the root, with forward slashes.",
            )
        seen.add(sample.id)


def check_labels(trial: DatasetTrial) -> str:
    """Samples carry what `gives` declares; labels are class indices.

    With other parameters than the defaults a dataset may give less, which is noted.
    """
    held = {"label": "label", "box": "boxes", "mask": "mask"}
    missing = []
    for fact in sorted(trial.plugin.facts.gives & KNOWN):
        if all(getattr(sample, held[fact]) is None for sample in trial.samples):
            if trial.chosen:
                missing.append(fact)
                continue
            raise fail(f"no sample has a {fact}", "one, as gives= declares", f"Set Sample({held[fact]}=...).")
    for sample in trial.samples:
        whole = isinstance(sample.label, int) and not isinstance(sample.label, bool) and sample.label >= 0
        if sample.label is not None and not whole:
            raise fail(
                f"the label of '{sample.id}' is {sample.label!r}",
                "a class index from 0 on, or None",
                "Count the classes from 0; words go into name=.",
            )
    return f"with these parameters no sample has a {' or a '.join(missing)}" if missing else ""


def check_deterministic(trial: DatasetTrial) -> None:
    """Listed twice, the samples are the same: ids in their order, labels, images."""
    first = trial.samples
    _, seen = trial.fetch()
    second = seen.result or []
    if [(s.id, s.label) for s in first] != [(s.id, s.label) for s in second]:
        raise fail(
            "a second listing has other ids or labels, or another order",
            "the same",
            "Sort what a folder gives; seed what is drawn, from a parameter.",
        )
    twins = {id(sample): twin for sample, twin in zip(first, second, strict=True)}
    for sample, prepared in trial.readable():
        for again in (sample, twins[id(sample)]):
            if not torch.equal(prepare(again, TRANSFORMS[0]).image, prepared.image):
                raise fail(
                    f"image '{sample.id}' has other pixels when it is loaded again",
                    "the same pixels",
                    "Seed what is drawn by the image; leave augmentation to whoever trains.",
                )


def check_images(trial: DatasetTrial) -> None:
    """Images can be read: PIL images or tensors (3, H, W) in [0, 1]."""
    faults = []
    for sample in trial.some:
        try:
            prepare(sample, TRANSFORMS[0])
            value = sample.image() if callable(sample.image) else sample.image
            if isinstance(value, Tensor):
                low, high = float(value.min()), float(value.max())
                if low < 0 or high > 1 or not value.is_floating_point():
                    raise fail(
                        f"image '{sample.id}' holds {value.dtype} from {low:g} to {high:g}",
                        "floats in [0, 1]",
                        "Divide bytes by 255; do not normalise, models do.",
                    )
        except DataError as error:
            faults.append(str(error))
    if len(faults) == len(trial.some):
        raise fail(f"none of {len(faults)} images can be read: {faults[0]}", "images", "See the error.")


def check_truths(trial: DatasetTrial) -> None:
    """Boxes and masks lie on their images, agree with each other, and stay so after every transform."""
    if not any(sample.boxes is not None or sample.mask is not None for sample in trial.samples):
        raise CheckSkipped("has no boxes and no masks")
    for sample in trial.some:
        try:
            boxes = sample.boxes() if callable(sample.boxes) else sample.boxes
            mask = sample.mask() if callable(sample.mask) else sample.mask
            void = sample.void() if callable(sample.void) else sample.void
        except DataError:
            continue
        except Exception as error:
            raise fail(
                f"the boxes or the mask of '{sample.id}' raise {describe(error)}",
                "truths",
                "Raise faithmap.errors.DataError where a file cannot be read.",
            ) from error
        size = _size(sample)
        if size is None:
            continue
        if mask is not None:
            _check_mask(sample, torch.as_tensor(mask), size)
        if void is not None:
            _check_void(sample, void, mask)
        if boxes is not None:
            _check_boxes(sample, torch.as_tensor(boxes), size)
        if mask is not None and boxes is not None and len(boxes):
            _check_agreement(sample, torch.as_tensor(mask).bool(), torch.as_tensor(boxes), size, "")
            for transform in TRANSFORMS:
                moved = prepare(sample, transform)
                if moved.mask is not None and moved.boxes is not None and bool(moved.mask.any()):
                    where = f" after a {transform.mode} transform to {transform.size}"
                    _check_agreement(sample, moved.mask, moved.boxes, transform.size, where)


def _size(sample: Sample) -> tuple[int, int] | None:
    from PIL import Image, UnidentifiedImageError

    try:
        value = sample.image() if callable(sample.image) else sample.image
        if isinstance(value, Tensor | Image.Image):
            return picture_size(value)
        with Image.open(value) as stored:
            return stored.height, stored.width
    except (DataError, OSError, UnidentifiedImageError):
        return None


def _check_mask(sample: Sample, mask: Tensor, size: tuple[int, int]) -> None:
    if tuple(mask.shape) != size:
        raise fail(
            f"the mask of '{sample.id}' has the shape {tuple(mask.shape)}, its image {size}",
            "(height, width) of the image",
            "Give the mask of the stored image; the core moves it with every resize and crop.",
        )
    if not bool(mask.any()):
        raise fail(f"the mask of '{sample.id}' is empty", "an object", "Leave mask=None where there is none.")


def _check_void(sample: Sample, void: Tensor, mask: Tensor | None) -> None:
    void = torch.as_tensor(void).bool()
    if mask is None or void.shape != torch.as_tensor(mask).shape:
        raise fail(
            f"the void of '{sample.id}' has the shape {tuple(void.shape)}, its mask "
            f"{None if mask is None else tuple(mask.shape)}",
            "a mask of the same shape",
            "Give void= only beside mask=.",
        )
    both = int((void & torch.as_tensor(mask).bool()).sum())
    if both:
        raise fail(
            f"{both} pixels of '{sample.id}' are void and in its mask",
            "pixels that are one or the other",
            "Void is where the mask leaves open what a pixel belongs to.",
        )


def _check_boxes(sample: Sample, boxes: Tensor, size: tuple[int, int]) -> None:
    form = "x0, y0, x1, y1 in pixels of the stored image"
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        shape = tuple(boxes.shape)
        raise fail(f"the boxes of '{sample.id}' have the shape {shape}", "(K, 4)", f"Give {form}.")
    height, width = size
    for box in boxes.tolist():
        x0, y0, x1, y1 = box
        inside = -1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1
        if not inside or (max(x1, y1) <= 1 and min(size) > 2):
            raise fail(
                f"a box of '{sample.id}' is {box} on an image {width} wide and {height} high",
                form,
                "Two corners, not a corner with sides; columns first; pixels, not shares.",
            )


def _check_agreement(sample: Sample, mask: Tensor, boxes: Tensor, size: tuple[int, int], where: str) -> None:
    covered = float((mask & box_mask(boxes.double(), size)).sum() / mask.sum())
    if covered < COVERED:
        raise fail(
            f"{100 * covered:.0f}% of the mask of '{sample.id}' lies in its boxes{where}",
            f"{100 * COVERED:.0f}% or more",
            "Mask and boxes are both of the labelled object, on the stored image, the right way up.",
        )


Check = Callable[[DatasetTrial], str | None]
CHECKS: Sequence[Check] = (
    check_facts, check_listing, check_revision, check_ids, check_labels, check_deterministic, check_images,
    check_truths,
)  # fmt: skip
SLOW_CHECKS: Sequence[Check] = ()
