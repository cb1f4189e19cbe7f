"""`Batch`: the images that an explainer explains and a metric scores, with all that is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from faithmap.attention import Attention
from faithmap.context import Context
from faithmap.models import Model
from faithmap.records import digest
from faithmap.resize import upsample

if TYPE_CHECKING:
    from faithmap.pool import Pool

Maps = Tensor


@dataclass(frozen=True)
class Scored:
    """What a metric returns for a score that has more than a value for each image."""

    #: (B,); NaN where the score is undefined for an image.
    values: Tensor
    #: (B, points), kept in the rows.
    curves: Tensor | None = None
    #: Why a value is NaN, by image; empty where it is not.
    reasons: Sequence[str] = ()
    #: Positions of the images that get a row; by default all.
    only: Sequence[int] | None = None
    #: Positions of the images on which the map holds nothing that this score could use; they are
    #: scored as an empty map is.
    empty: Sequence[int] = ()
    #: Positions of the images on which the score could not be had although there is a map, with the
    #: reason: where another map that the score needs has failed.
    failed: Mapping[int, str] = field(default_factory=dict)


Values = Tensor | Scored


@dataclass(frozen=True)
class Batch:
    """Images with targets and truths, and the passes over them that explainers share.

    `images` (B, 3, H, W) in [0, 1]; `targets` (B,) the classes explained; `ids` one a piece;
    `labels` (B,), -1 where unknown; `masks` bool (B, H, W) and `boxes`, a list of (K, 4) tensors
    `x0, y0, x1, y1`, belong to the label; `void` bool (B, H, W) is where masks are undecided. `grid`
    is the (h, w) that maps are reduced to before they are scored, None for native resolution; nulls
    and controls may be drawn on it, a method's map does not depend on it.
    """

    images: Tensor
    targets: Tensor
    ids: tuple[str, ...]
    context: Context
    labels: Tensor | None = None
    masks: Tensor | None = None
    #: Bool (B,): which images have a mask of their own, where some have none; None: all.
    masked: Tensor | None = None
    void: Tensor | None = None
    boxes: list[Tensor] | None = None
    grid: tuple[int, int] | None = None
    seed: int = 0
    #: What the maps' seeds depend on beside the run's seed and the image: explainer and parameters.
    seed_key: str = ""
    #: Calls the explainer that made the maps, for metrics that need it; None for maps given as such.
    explainer: Callable[[Model, Batch], Maps] | None = None
    #: The dataset's other images, for metrics that need them; None outside a run.
    pool: Pool | None = None
    #: Results that metrics of one batch share (tie fields, clean curves).
    cache: dict[str, Tensor] = field(default_factory=dict)
    #: What an explainer has to say of its maps, by the image's position; see `note`.
    notes: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def logits(self) -> Tensor:
        """Logits (B, classes) of the clean images."""
        return self.context.logits

    @property
    def predicted(self) -> Tensor:
        """Predicted classes (B,) of the clean images."""
        return self.logits.argmax(1)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return int(self.images.shape[2]), int(self.images.shape[3])

    def activations(self, layer: str | None = None) -> Tensor:
        """Features (B, C, h, w) of a layer, the model's target layer by default."""
        return self.context.activations(layer)

    def gradients(self, layer: str | None = None, score: str = "logit") -> Tensor:
        """Gradients (B, C, h, w) of the targets' logits, or probabilities, with respect to those features."""
        return self.context.gradients(self.targets, layer, score)

    @property
    def attention(self) -> Attention:
        """Attention maps of a vision transformer, and their gradients on demand; shared by all explainers."""
        return self.context.attention

    def generator(self, i: int) -> torch.Generator:
        """A generator on the CPU for image i, seeded by the run, the explainer and the image's id alone."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.seed_key, self.ids[i]))

    def showing(self, needs: Collection[str]) -> Batch:
        """The batch as a plugin sees it that declares these needs: no other truth, nor what makes maps."""
        masks = "mask" in needs or "region" in needs
        boxes = "box" in needs or "region" in needs
        return replace(
            self,
            labels=self.labels if "label" in needs else None,
            masks=self.masks if masks else None, masked=self.masked if masks else None,
            void=self.void if masks else None,
            boxes=self.boxes if boxes else None,
            explainer=self.explainer if "explainer" in needs else None,
            pool=self.pool if "pool" in needs else None,
        )  # fmt: skip

    def note(self, which: Tensor, text: str) -> None:
        """Say of the maps of some images how they came about; it stands as the reason beside their values.

        For what a reader should know of a map that is sound, such as a fallback of the method, or why one is
        zero everywhere.

        Args:
            which: bool (B,).
            text: one line.
        """
        for i in which.nonzero().flatten().tolist():
            self.notes[i] = f"{self.notes[i]}; {text}" if i in self.notes else text

    def ties(self) -> Tensor:
        """(B, H, W): the field that orders tied pixels, equal for all maps of an image.

        Seeded by the run and the image alone; uniform on the run's grid, upsampled.
        """
        if "ties" not in self.cache:
            height, width = self.grid or self.size
            fields = [
                torch.rand(
                    height, width, generator=torch.Generator().manual_seed(seed_of(self.seed, "ties", name))
                )
                for name in self.ids
            ]
            self.cache["ties"] = upsample(torch.stack(fields), self.size).to(self.images.device)
        return self.cache["ties"]

    def region(self) -> Tensor | None:
        """Bool (B, H, W): the object of the labelled class, from its mask, else the union of its boxes.

        Each image by what it has itself, whatever the others of the batch have.
        """
        if self.masks is not None and (self.boxes is None or self.masked is None or bool(self.masked.all())):
            return self.masks
        if self.boxes is None:
            return None
        if "region" not in self.cache:
            drawn = [box_mask(boxes, self.size) for boxes in self.boxes]
            region = torch.stack(drawn).to(self.images.device)
            if self.masks is not None and self.masked is not None:
                region = torch.where(self.masked.view(-1, 1, 1), self.masks, region)
            self.cache["region"] = region
        return self.cache["region"]

    def select(self, positions: Sequence[int]) -> Batch:
        """The batch of some of its images, with a context of its own (nothing computed yet)."""
        index = torch.as_tensor(list(positions), device=self.images.device)
        images = self.images[index]
        return replace(
            self,
            images=images,
            targets=self.targets[index],
            ids=tuple(self.ids[i] for i in positions),
            context=Context(self.context.model, images),
            labels=None if self.labels is None else self.labels[index],
            masks=None if self.masks is None else self.masks[index],
            masked=None if self.masked is None else self.masked[index],
            void=None if self.void is None else self.void[index],
            boxes=None if self.boxes is None else [self.boxes[i] for i in positions],
            cache={},
            notes={},
        )

    def with_seed_key(self, key: str) -> Batch:
        """The same batch, context and cache shared, for an explainer of another seed."""
        return replace(self, seed_key=key)


def seed_of(seed: int, *parts: str) -> int:
    """A 63-bit seed from the run's seed and some words, equal on every machine."""
    return int.from_bytes(hashlib.sha256(digest(seed, *parts, length=64).encode()).digest()[:8], "big") >> 1


def box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool (H, W): pixels whose centre lies in any of the boxes (K, 4) `x0, y0, x1, y1`."""
    height, width = size
    ys = torch.arange(height).view(-1, 1) + 0.5
    xs = torch.arange(width).view(1, -1) + 0.5
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        mask |= (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
    return mask
