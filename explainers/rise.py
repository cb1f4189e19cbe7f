"""RISE (Petsiuk et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """One image a mask, whatever the number of classes."""
    return float(params.get("n_masks", 8000))


@explainer(
    version=1, source="Petsiuk et al. 2018 (arXiv:1806.07421), eq. 6 and sec. 3.2", forwards=_forwards,
    backwards=0, check_params={"n_masks": 64},
)  # fmt: skip
def rise(
    model: Model,
    batch: Batch,
    *,
    n_masks: int = 8000,
    cells: int = 7,
    keep: float = 0.5,
    score: str = "probability",
    space: str = "pixel",
) -> Maps:
    """Random masks averaged with the score of the image that each of them leaves.

    S = 1 / (E[M] N) sum_i f(x * M_i) M_i with E[M] = `keep`. A mask is a grid of 0/1 cells, each 1
    with chance `keep`, enlarged bilinearly to one cell more than the image on either axis and
    shifted by a random offset of less than a cell, drawn for each mask on its own. Shape (B, H, W);
    not negative for probabilities; unit: that of the score.

    Published: 7x7 cells, keep 0.5, softmax probabilities, 8000 masks (ResNet-50; 4000 for VGG-16).
    Each image has masks of its own, where the authors share one set among all images: the chance
    errors of a board's images are then independent, and a mask costs next to nothing beside a pass.
    The borders of the enlarged grid are continued where the authors' resize mirrors them.
    The authors multiply normalised images, which fades to the mean colour: `space="normalised"`.

    Args:
        model: the model.
        batch: images with targets.
        n_masks: masks an image, 1 or more.
        cells: cells along each side of the grid, 1 or more.
        keep: the chance that a cell shows, in (0, 1).
        score: "probability" (softmax over the classes) or "logit".
        space: "pixel" masks towards black, "normalised" towards the model's mean colour.
    """
    return saliencies(
        model, batch, batch.targets.view(-1, 1),
        n_masks=n_masks, cells=cells, keep=keep, score=score, space=space,
    )[:, 0]  # fmt: skip


def saliencies(
    model: Model,
    batch: Batch,
    classes: Tensor | None = None,
    *,
    n_masks: int,
    cells: int = 7,
    keep: float = 0.5,
    score: str = "probability",
    space: str = "pixel",
) -> Tensor:
    """RISE maps of several classes from the same passes.

    Args:
        model: the model.
        batch: images; their targets are not used.
        classes: (B, K) classes of each image; None for all of the model's, which takes a map's
            memory for each.
        n_masks, cells, keep, score, space: as those of the explainer.

    Returns:
        (B, K, H, W) float32.
    """
    import torch

    from faithmap.cam import vanishing_colour
    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size, laid_out

    if n_masks < 1 or cells < 1 or not 0 < keep < 1:
        raise RequestError(
            f"rise: got n_masks {n_masks}, cells {cells} and keep {keep}; "
            "expected n_masks >= 1, cells >= 1 and 0 < keep < 1"
        )
    if classes is None:
        classes = torch.arange(model.num_classes, device=batch.images.device).expand(len(batch), -1)
    colour = vanishing_colour(model, space)
    source = laid_out(model, batch.images - colour)
    masks = Masks(batch, n_masks, cells, keep)
    total = torch.zeros(*classes.shape, *batch.size, device=batch.images.device)
    with torch.no_grad():
        for owner, mask in masks.chunks(chunk_size(model, batch.size)):
            logits = model(source[owner].mul_(mask.unsqueeze(1)).add_(colour)).float()
            values = _read(logits, score).gather(1, classes[owner])
            for i in owner.unique().tolist():
                mine = owner == i
                total[i] += torch.einsum("nk,nhw->khw", values[mine], mask[mine])
    return total / (keep * n_masks)


def _read(logits: Tensor, score: str) -> Tensor:
    """All classes' scores (n, classes) as `score` says."""
    from faithmap.cam import READINGS
    from faithmap.errors import RequestError, nearest

    if score not in READINGS:
        raise RequestError(f"unknown score '{score}'; {nearest(score, READINGS)}")
    return logits if score == "logit" else logits.softmax(1)


class Masks:
    """The random masks of a batch, enlarged a chunk at a time.

    Args:
        batch: images; each draws from its own generator.
        count: masks an image.
        cells: cells along each side of a grid.
        keep: the chance that a cell shows.
    """

    def __init__(self, batch: Batch, count: int, cells: int, keep: float) -> None:
        import torch

        device = batch.images.device
        cell = [math.ceil(side / cells) for side in batch.size]
        grids, offsets = [], []
        for i in range(len(batch)):
            generator = batch.generator(i)
            grids.append(torch.rand(count, cells, cells, generator=generator) < keep)
            shifts = [torch.randint(0, side, (count,), generator=generator) for side in cell]
            offsets.append(torch.stack(shifts, 1))
        self.owner = torch.arange(len(batch), device=device).repeat_interleave(count)
        self._grids = torch.cat(grids).to(device)
        self._offsets = torch.cat(offsets).to(device)
        self._weights = [_enlarging(cells, (cells + 1) * side).to(device) for side in cell]
        self._size = batch.size

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images (n,) that the next masks belong to, in order, and the masks (n, H, W)."""
        import torch

        for part in torch.arange(len(self.owner), device=self.owner.device).split(size):
            yield self.owner[part], self.enlarged(self._grids[part].float(), self._offsets[part])

    def enlarged(self, grids: Tensor, offsets: Tensor) -> Tensor:
        """Masks (n, H, W) of grids (n, cells, cells), each shifted by its own offset (n, 2)."""
        rows, columns = (
            weights[_window(offsets[:, axis], side)]
            for axis, (weights, side) in enumerate(zip(self._weights, self._size, strict=True))
        )
        return rows @ grids @ columns.transpose(1, 2)


def _window(offsets: Tensor, side: int) -> Tensor:
    """(n, side): the `side` positions that follow each offset."""
    import torch

    return offsets.view(-1, 1) + torch.arange(side, device=offsets.device)


def _enlarging(cells: int, length: int) -> Tensor:
    """(length, cells): how each position of a bilinearly enlarged row is made of its cells."""
    import torch
    from torch.nn import functional as F

    return F.interpolate(torch.eye(cells).unsqueeze(0), size=length, mode="linear", align_corners=False)[0].T
