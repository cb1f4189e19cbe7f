"""Features of a layer, masked by the gradients of the explained class: what SCAN's decoder is shown.

SCAN (arXiv:2603.06523), eq. 1: with G the gradient of the target's score with respect to features F,
G+ = max(G, 0), Q the P-th percentile of the positive entries of G+, pooled over all channels and
cells (or tokens) of an image, M = 1[G+ >= Q], the decoder is given F M. What of it is published, what is
the authors' code and what is a guess stands with each function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError, nearest
from faithmap.layers import middle_block
from faithmap.models import Model

#: How features are masked. "gradient": eq. 1. "positive": all positive gradients (P = 0). "none": not at
#: all (M = 1), so that no gradient is taken. "random": as many entries as "gradient" keeps, anywhere.
MASKS = ("gradient", "positive", "none", "random")
#: Between which observations a percentile lies: on the line between two, or at the nearer one.
INTERPOLATIONS = ("linear", "nearest")
#: What is noted of a map that was made without a mask.
UNMASKED = "no gradient is positive, so that the features were not masked"


def percentile_of_positives(
    gradients: Tensor, percentiles: Tensor | float, interpolation: str = "linear"
) -> tuple[Tensor, Tensor]:
    """The percentile of the positive entries of each image's gradients, one number for all of them.

    Non-positive entries are left out beforehand (paper and both of the authors' codes). Their
    PyTorch code interpolates linearly, their TensorFlow code takes the nearest observation.

    Args:
        gradients: (B, ...) of any shape.
        percentiles: P in [0, 100], one for all images or (B,); best on the CPU, where reading it waits
            for nothing.
        interpolation: one of `INTERPOLATIONS`.

    Returns:
        Q (B,), zero where an image has no positive entry, and how many it has (B,).
    """
    if interpolation not in INTERPOLATIONS:
        raise RequestError(
            f"unknown interpolation '{interpolation}'; {nearest(interpolation, INTERPOLATIONS)}"
        )
    flat = gradients.flatten(1)
    given = torch.as_tensor(percentiles, dtype=torch.float64)
    low, high = (float(given.min()), float(given.max())) if given.numel() else (0.0, 0.0)
    if not 0 <= low <= high <= 100:
        raise RequestError(f"percentile: got {low if low < 0 else high}, expected 0 to 100")
    counts = (flat > 0).sum(1)
    # Counted from the largest down, P leaves (100 - P)% of the gaps above it: few entries have to be sorted.
    above = (100 - given).to(flat.device) * (counts - 1).clamp_min(0) / 100
    kept = min(flat.shape[1], math.ceil((100 - low) / 100 * flat.shape[1]) + 1)
    largest = flat.topk(kept, dim=1).values.clamp_min(0)
    if interpolation == "nearest":
        values = largest.gather(1, above.round().long().unsqueeze(1)).squeeze(1)
    else:
        lower = above.floor()
        upper_value = largest.gather(1, lower.long().unsqueeze(1)).squeeze(1)
        lower_value = largest.gather(1, above.ceil().long().unsqueeze(1)).squeeze(1)
        # Between equal values this is that value to the bit: channels of one gradient stay whole.
        values = upper_value + (lower_value - upper_value) * (above - lower).to(flat.dtype)
    return values, counts


def gradient_mask(
    gradients: Tensor, percentiles: Tensor | float, interpolation: str = "linear"
) -> tuple[Tensor, Tensor]:
    """M = 1[max(G, 0) >= Q] (eq. 1), entry by entry, and which images it leaves unmasked.

    Where an image has no positive gradient Q is 0 and M is one everywhere, as in both of the authors'
    codes: the decoder then sees all features. Such images are told, so that they can be counted.

    Args:
        gradients: (B, ...) gradients of the target's score with respect to the features.
        percentiles: P, one for all images or (B,). The paper draws it from U(70, 100) for each image and
            step of the training (one sentence of it speaks of the top 70 to 100%; section 3.2 and the
            codes do not) and takes 95 afterwards. At 0 non-positive entries are still masked.
        interpolation: one of `INTERPOLATIONS`.

    Returns:
        M, bool of the gradients' shape, and bool (B,), true where it is one everywhere for want of a
        positive gradient.
    """
    values, counts = percentile_of_positives(gradients, percentiles, interpolation)
    threshold = values.view(-1, *[1] * (gradients.ndim - 1))
    return gradients.clamp_min(0) >= threshold, counts == 0


def random_mask(mask: Tensor, noise: Tensor) -> Tensor:
    """As many entries an image as another mask has, at places drawn at random: a control.

    Args:
        mask: bool (B, ...).
        noise: uniform, of the same shape; the entries of an image with the smallest noise are kept.
    """
    order = noise.flatten(1).argsort(1)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (ranks < mask.flatten(1).sum(1, keepdim=True)).view(mask.shape)


@dataclass(frozen=True)
class Layout:
    """What a layer's features look like: what a decoder has to be built for."""

    #: Dotted name of the layer.
    layer: str
    #: A transformer's tokens (B, N, D), prefix tokens among them; else maps (B, C, h, w).
    tokens: bool
    #: C or D.
    channels: int
    #: (h, w) of the cells, or of the patch tokens.
    grid: tuple[int, int]
    #: (H, W) of the images.
    size: tuple[int, int]


def analysed_layer(model: Model, layer: str | None = None) -> str:
    """The layer that SCAN looks at: the one named, or the block halfway up a vision transformer, else the
    model's target layer.

    Published: the last convolutional stage, and of a ViT-B the "6th attention layer" (read as the output of
    the 6th of 12 blocks); other depths in proportion.
    """
    return layer or middle_block(model.module) or model.target_layer


def layout_of(model: Model, layer: str | None = None) -> Layout:
    """The layout of a layer's features at the model's input size, by one uncounted pass of a blank image.

    Args:
        model: the model.
        layer: dotted name of the layer; `analysed_layer` by default.
    """
    with model.counting() as meter:
        blank = torch.zeros(1, 3, *model.input_size, device=model.device)
        context = Context(model, blank)
        layout = layout_in(context, analysed_layer(model, layer))
        context.release()
        meter.forwards = 0
    return layout


def layout_in(context: Context, layer: str) -> Layout:
    """The layout of a layer's features for the images of a context."""
    outputs, features = context.outputs(layer), context.activations(layer)
    tokens = outputs.ndim == 3
    grid = (int(features.shape[2]), int(features.shape[3]))
    size = (int(context.images.shape[2]), int(context.images.shape[3]))
    return Layout(layer, tokens, int(features.shape[1]), grid, size)


def note_unmasked(batch: Batch, unmasked: Tensor) -> None:
    """Say of which images (bool (B,)) the decoder saw all features, so that none falls back in silence."""
    batch.note(unmasked, UNMASKED)


@dataclass(frozen=True)
class Masked:
    """Features of some images with the entries that their gradients do not pick set to zero."""

    #: (B, C, h, w), or a transformer's tokens (B, N, D), float32, without a graph.
    values: Tensor
    layout: Layout
    #: Bool (B,): no gradient was positive, so nothing is masked.
    unmasked: Tensor


def masked_features(
    context: Context,
    targets: Tensor,
    layer: str,
    *,
    mask: str = "gradient",
    percentiles: Tensor | float = 95.0,
    score: str = "logit",
    noise: Tensor | None = None,
) -> Masked:
    """F M of eq. 1, by one forward pass and one backward pass to the layer, which a context shares.

    Args:
        context: the images.
        targets: (B,) classes.
        layer: dotted name of the layer.
        mask: one of `MASKS`.
        percentiles: P in [0, 100], one for all images or (B,).
        score: the gradient is of the target's "logit" (the authors' PyTorch code) or "probability" (their
            TensorFlow code, whose models end in a softmax). That of a probability vanishes where it rounds
            to 1.
        noise: uniform, of the features' shape; for the random mask alone.

    Raises:
        RequestError: there is no such mask or score, or a percentile is out of range.
    """
    if mask not in MASKS:
        raise RequestError(f"unknown mask '{mask}'; {nearest(mask, MASKS)}")
    values, gradients, layout = unmasked_features(context, targets, layer, score, gradients=mask != "none")
    return apply_mask(values, gradients, layout, mask=mask, percentiles=percentiles, noise=noise)


def unmasked_features(
    context: Context, targets: Tensor, layer: str, score: str = "logit", *, gradients: bool = True
) -> tuple[Tensor, Tensor | None, Layout]:
    """F and G of eq. 1, float32 and without a graph: all that a mask is made of; G where it is asked for.

    Args:
        context: the images.
        targets: (B,) classes.
        layer: dotted name of the layer.
        score: what the gradient is of; see `masked_features`.
        gradients: whether to take them.
    """
    layout = layout_in(context, layer)
    values = (context.outputs(layer) if layout.tokens else context.activations(layer)).float()
    if not gradients:
        return values, None, layout
    taken = context.output_gradients if layout.tokens else context.gradients
    return values, taken(targets, layer, score), layout


def apply_mask(
    values: Tensor,
    gradients: Tensor | None,
    layout: Layout,
    *,
    mask: str = "gradient",
    percentiles: Tensor | float = 95.0,
    noise: Tensor | None = None,
) -> Masked:
    """F M from F and G; arguments as for `masked_features`.

    Where gradients of an image are not finite, so that there is no percentile, all of it is NaN.
    """
    if mask == "none" or gradients is None:
        return Masked(values, layout, torch.zeros(len(values), dtype=torch.bool, device=values.device))
    chosen, unmasked = gradient_mask(gradients, 0.0 if mask == "positive" else percentiles)
    if mask == "random":
        if noise is None:
            raise RequestError("the random mask takes noise of the features' shape")
        chosen = random_mask(chosen, noise.to(chosen.device))
    finite = gradients.flatten(1).isfinite().all(1)
    kept = torch.where(finite.view(-1, *[1] * (values.ndim - 1)), values * chosen, torch.nan)
    return Masked(kept, layout, unmasked & finite)
