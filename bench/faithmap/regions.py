"""What the metrics of localisation share: the object's region, and the images that they look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap.batch import box_mask
from faithmap.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch

KINDS = ("auto", "mask", "box")


def region_of(batch: Batch, kind: str) -> Tensor:
    """Bool (B, H, W): the object by its mask, by the union of its boxes, or by what there is.

    Raises:
        RequestError: the kind is unknown, or the batch has no such truth.
    """
    if kind not in KINDS:
        raise RequestError(f"parameter 'region': got {kind!r}; {nearest(kind, KINDS)}")
    if kind == "mask" and batch.masks is not None:
        return batch.masks.bool()
    if kind == "box" and batch.boxes is not None:
        if "region of boxes" not in batch.cache:
            drawn = torch.stack([box_mask(boxes, batch.size) for boxes in batch.boxes])
            batch.cache["region of boxes"] = drawn.to(batch.images.device)
        return batch.cache["region of boxes"]
    found = batch.region() if kind == "auto" else None
    if found is None:
        raise RequestError(
            f"parameter 'region': got {kind!r}, but the images come without "
            f"{'masks or boxes' if kind == 'auto' else 'masks' if kind == 'mask' else 'boxes'}; give them"
        )
    return found.bool()


def judged_region(batch: Batch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The object among the pixels of which the truth says whether they are on it.

    These are all pixels but those that masks leave open (`Batch.void`); boxes leave nothing open.

    Args:
        batch: the images.
        kind: as for `region_of`.

    Returns:
        The object and these pixels, bool (B, H, W) each, and the object's share of them, (B,) in [0, 1].

    Raises:
        RequestError: as for `region_of`.
    """
    region = region_of(batch, kind)
    known = torch.ones_like(region) if batch.void is None or kind == "box" else ~batch.void
    region = region & known
    counts = [pixels.flatten(1).double().sum(1) for pixels in (region, known)]
    return region, known, counts[0] / counts[1].clamp_min(1)


def left_out(
    batch: Batch, share: Tensor, only_correct: bool, least_share: float, most_share: float
) -> list[str]:
    """Why an image is not scored, empty where it is: the same images whatever the map.

    A region belongs to the label, so the map must explain the label, and the model must be right
    if `only_correct`. Without labels the region is taken to belong to the target.

    Args:
        batch: the images.
        share: (B,) the object's share of the image, void pixels aside, in [0, 1].
        only_correct: leave out images that the model gets wrong.
        least_share: smallest share of an object that is scored.
        most_share: largest share.
    """
    reasons = []
    labels = batch.targets if batch.labels is None else batch.labels
    judged = only_correct and batch.labels is not None
    right = (batch.predicted == labels).tolist() if judged else [True] * len(batch)
    explained = (batch.targets == labels).tolist()
    known = zip(labels.tolist(), right, explained, share.tolist(), strict=True)
    for label, is_right, is_explained, part in known:
        if label < 0:
            reasons.append("the image has no label")
        elif part == 0:
            reasons.append("no object in the image")
        elif not is_right:
            reasons.append("the model is wrong")
        elif not is_explained:
            reasons.append("the map explains another class than the object's")
        elif not least_share <= part <= most_share:
            reasons.append(f"the object covers {100 * part:.1f}% of the image")
        else:
            reasons.append("")
    return reasons


def blanked(values: Tensor, reasons: list[str]) -> Tensor:
    """The values with NaN where a reason is given."""
    out = torch.tensor([bool(reason) for reason in reasons], device=values.device)
    return values.masked_fill(out, torch.nan)
