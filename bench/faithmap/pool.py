"""The images of a dataset beside those of a batch, for metrics that set an image among others.

Such a metric declares `needs={"pool"}`. What it is given for an image depends on the dataset and the
model alone: not on the batch, on the run's limit, or on which images were scored before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faithmap.batch import seed_of
from faithmap.data import choose, part_of
from faithmap.errors import DataError
from faithmap.models import Model, accounted_for
from faithmap.records import Sample
from faithmap.transforms import prepare

#: Bytes of images that are kept once they were read.
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Opinion:
    """What the model says of a labelled image."""

    predicted: int
    #: Softmax probability of the label.
    confidence: float


class Pool:
    """Labelled images, listed at once, read and classified when they are first asked for.

    Args:
        samples: all images of the dataset, whatever part and limit a run takes.
        model: whose evaluation transform they pass, and who classifies them.
        split: names the part that an image belongs to; images of different parts never meet.
    """

    def __init__(
        self, samples: Sequence[Sample], model: Model, split: Callable[[str], str] = part_of
    ) -> None:
        self._samples, self._model, self._split = tuple(samples), model, split
        self._parts: dict[str, tuple[Sample, ...]] = {}
        self._images: dict[str, Tensor] = {}
        self._opinions: dict[str, Opinion | None] = {}
        self._partners: dict[tuple[str, int, int, float, int], tuple[Sample, ...]] = {}
        self._takes: dict[tuple[int, int], bool] = {}

    def members(self, image_id: str, most: int) -> tuple[Sample, ...]:
        """The first images, in the run's order, of the part that an image belongs to; at most so many.

        A smaller limit than that reads images that it does not score; a larger one changes nothing.
        """
        part = self._split(image_id)
        if part not in self._parts:
            own = [s for s in self._samples if s.label is not None and self._split(s.id) == part]
            self._parts[part] = choose(own, "all", None) if own else ()
        return self._parts[part][:most]

    def image(self, sample: Sample) -> Tensor | None:
        """The image (3, H, W) in [0, 1] on the CPU; None where it cannot be read."""
        if sample.id not in self._images:
            try:
                image = prepare(sample, self._model.transform).image
            except DataError:
                return None
            height, width = self._model.input_size
            room = max(1, KEPT_BYTES // (3 * height * width * 4))
            while len(self._images) >= room:
                del self._images[next(iter(self._images))]
            self._images[sample.id] = image
        return self._images[sample.id]

    def opinion(self, sample: Sample) -> Opinion | None:
        """What the model says of an image alone, asked once; None where it cannot be read."""
        if sample.id not in self._opinions:
            image = self.image(sample)
            self._opinions[sample.id] = None if image is None else self._ask(image, sample.label)
        return self._opinions[sample.id]

    def _ask(self, image: Tensor, label: int | None) -> Opinion:
        assert label is not None  # members are labelled
        with torch.no_grad():
            chances = self._model(image[None].to(self._model.device)).float().softmax(1)[0]
        return Opinion(int(chances.argmax()), float(chances[label]))

    def partners(
        self, image_id: str, label: int, count: int, confidence: float, most: int
    ) -> tuple[Sample, ...]:
        """Images of other classes than an image's, and than each other's, that the model is sure of.

        They are found by going through `members` in an order by hash of the two ids.

        Args:
            image_id: the image that they are set beside.
            label: its class.
            count: how many are wanted.
            confidence: least probability of the label, which the model must predict.
            most: how many members there are to choose from.

        Returns:
            As many as there are, at most `count`.
        """
        key = (image_id, label, count, confidence, most)
        if key not in self._partners:
            order = sorted(
                self.members(image_id, most), key=lambda sample: seed_of(0, "partner", image_id, sample.id)
            )
            found: list[Sample] = []
            for sample in order:
                if len(found) == count:
                    break
                if sample.id == image_id or sample.label in {label, *(other.label for other in found)}:
                    continue
                said = self.opinion(sample)
                if said and said.predicted == sample.label and said.confidence >= confidence:
                    found.append(sample)
            self._partners[key] = tuple(found)
        return self._partners[key]

    def release(self) -> None:
        """Drop the images that are kept; what is known of them stays."""
        self._images.clear()

    def takes(self, size: tuple[int, int]) -> bool:
        """Whether the model gives logits for images of a size (H, W); tried once, and not counted."""
        if size not in self._takes:
            blank = torch.zeros(1, 3, *size, device=self._model.device)
            try:
                with torch.no_grad(), accounted_for():
                    logits = self._model.module(self._model.normalise(blank))
                self._takes[size] = isinstance(logits, Tensor) and logits.ndim == 2
            except torch.OutOfMemoryError:  # says nothing of the architecture
                raise
            except Exception:  # whatever a network raises that was built for one size
                self._takes[size] = False
        return self._takes[size]
