"""The image times its map: what average drop, increase in confidence and their kin share."""

from __future__ import annotations

import torch
from torch import Tensor

from faithmap.batch import Batch, Maps, Scored
from faithmap.cam import vanishing_colour
from faithmap.models import Model
from faithmap.perturb import chunk_size, laid_out, logits_in_chunks


def rectified(maps: Maps) -> tuple[Tensor, list[int]]:
    """ReLU, then min-max of each map to [0, 1]; and the positions where nothing is left to stretch."""
    positive = maps.clamp_min(0)
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    width = high - low
    empty = (width <= 0).flatten().nonzero().flatten().tolist()
    scaled = (positive - low) / width.masked_fill(width <= 0, 1)
    return scaled.clamp(0, 1), empty


def target_scores(
    model: Model, batch: Batch, masks: Tensor, *, space: str = "pixel", score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """The target's score Y (B,) on the images and O (M, B) on the images times masks, float64.

    Args:
        model: the model.
        batch: images with targets.
        masks: (M, B, H, W) in [0, 1], M masks an image.
        space: "pixel" fades to black, "normalised" to the mean colour of the model's normalisation.
        score: "probability" (softmax over the classes), or "logit".
    """
    kinds, count = masks.shape[:2]
    flat = masks.flatten(0, 1).unsqueeze(1)
    images = laid_out(model, batch.images)
    ground = vanishing_colour(model, space)

    def make(part: Tensor) -> Tensor:
        # In normalised space zero is the mean colour: (x - mean) S + mean in pixels.
        return torch.addcmul(ground, images[part % count] - ground, flat[part])

    logits = logits_in_chunks(model, kinds * count, make, chunk_size(model, batch.size))
    both = torch.cat([batch.logits.unsqueeze(0), logits.view(kinds, count, -1)]).float()
    values = both.softmax(2) if score == "probability" else both
    chosen = values.gather(2, batch.targets.view(1, -1, 1).expand(len(both), -1, 1)).squeeze(2).double()
    return chosen[0], chosen[1:]


def without_empty(scored: Scored, empty: list[int]) -> Scored:
    """Leave the images out whose map holds nothing positive: no value, no reason of their own."""
    values = scored.values.clone()
    values[empty] = torch.nan
    reasons = ["" if i in empty else reason for i, reason in enumerate(scored.reasons)]
    return Scored(values, reasons=reasons, empty=empty)
