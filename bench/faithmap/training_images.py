"""The images that are learnt from: in which order, as a model takes them, and which of them were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from faithmap.batch import seed_of
from faithmap.errors import DataError
from faithmap.models import Model
from faithmap.records import Sample
from faithmap.transforms import prepare

#: Images are kept in memory once they have been read, up to this many bytes.
KEPT_BYTES = 2 * 2**30
#: An image, None where it cannot be read; its label, -1 where unknown; its id; why it cannot be read.
Item = tuple[Tensor | None, int, str, str]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of so many images in an epoch, which the seed and the epoch alone decide."""
    generator = torch.Generator().manual_seed(seed_of(seed, "epoch", str(epoch)))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


class Images(Dataset[Item]):
    """Images as a model takes them; those that were read are kept, if they may be and fit."""

    def __init__(self, samples: Sequence[Sample], model: Model, keep: bool) -> None:
        self._samples, self._transform = samples, model.transform
        height, width = model.input_size
        self._keep = keep and len(samples) * 3 * height * width * 4 <= KEPT_BYTES
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        sample = self._samples[index]
        label = -1 if sample.label is None else sample.label
        if index in self._kept:
            return self._kept[index], label, sample.id, ""
        try:
            image = prepare(sample, self._transform).image
        except DataError as error:
            return None, label, sample.id, str(error)
        if self._keep:
            self._kept[index] = image
        return image, label, sample.id, ""


def collate(items: Sequence[Item]) -> tuple[Tensor, Tensor, dict[str, str]]:
    """The images of a batch that could be read, their labels, and why the others could not."""
    read = [(image, label) for image, label, _, _ in items if image is not None]
    faults = {name: reason for image, _, name, reason in items if image is None}
    images = torch.stack([image for image, _ in read]) if read else torch.zeros(0, 3, 1, 1)
    return images, torch.tensor([label for _, label in read], dtype=torch.long), faults


class Seen:
    """Counts the images that a fit has learnt from, over all its parts where it went on after a kill.

    A batch counts once the step behind it is reported or the next batch is asked for, so that one which was
    fetched when the last step was done does not.
    """

    def __init__(self, count: int) -> None:
        self._mask = torch.zeros(count, dtype=torch.bool)
        self._passes = 0
        self._handed: list[int] = []
        self._known = True

    def hand(self, positions: Sequence[int]) -> None:
        """A batch of these images is handed out."""
        self._handed = list(positions)

    def count(self) -> None:
        """What was handed out has been learnt from."""
        self._mask[self._handed] = True
        self._passes += len(self._handed)
        self._handed = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"mask": self._mask.clone(), "passes": self._passes, "known": self._known}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; one without a count leaves it unknown."""
        if state is None:
            self._known = False
            return
        self._mask, self._passes = state["mask"].clone(), int(state["passes"])
        self._known = bool(state["known"])

    def entry(self) -> dict[str, int]:
        """For a record: how many images were seen, and how often in all; nothing where that is not known."""
        return {"seen": int(self._mask.sum()), "passes": self._passes} if self._known else {}
