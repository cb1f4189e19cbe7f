"""What several class activation maps share: pytorch-grad-cam's formulas, and scores of masked images.

pytorch-grad-cam hands out maps that are already min-max normalised and resized, and it hooks the
model for as long as its objects live. Here only its formulas are used, on features and gradients
that all explainers of a batch share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from faithmap.errors import RequestError, nearest
from faithmap.models import Model, accounted_for
from faithmap.perturb import chunk_size, laid_out
from faithmap.resize import upsample

#: How a masked image's logits are read: the target's logit, or its softmax probability.
READINGS = ("logit", "probability")
#: Where an image is multiplied with a mask: "pixel" fades to black, "normalised" to the mean colour
#: that the model's normalisation subtracts.
SPACES = ("pixel", "normalised")


class _NoHooks:
    """Stands where pytorch-grad-cam keeps its hooks: there are none to release."""

    def release(self) -> None:
        pass


def library_cam(method: type[Any], activations: Tensor, gradients: Tensor, *, relu: bool = True) -> Tensor:
    """A CAM by pytorch-grad-cam's formula of a class, before any rescaling, with the final ReLU.

    The object is made without its constructor, which would hook the model.

    Args:
        method: a subclass of pytorch-grad-cam's `BaseCAM` that needs no forward pass of its own.
        activations: (B, C, h, w) features.
        gradients: (B, C, h, w) gradients of the explained scores with respect to them.
        relu: set negative cells to zero, as all of the library's maps do in the end.

    Returns:
        (B, h, w), on the features' device; not negative unless `relu` is off.
    """
    cam: Any = object.__new__(method)
    cam.activations_and_grads = _NoHooks()
    arrays = [tensor.detach().float().cpu().numpy() for tensor in (activations, gradients)]
    image = cam.get_cam_image(None, None, None, *arrays, False)
    maps = torch.as_tensor(image, device=activations.device)
    return maps.clamp_min(0) if relu else maps


def channel_count(model: Model, layer: str | None = None) -> int:
    """The number of channels of a layer's features, by one uncounted pass of a blank image."""
    held: list[Any] = []
    handle = model.layer(layer).register_forward_hook(lambda _module, _inputs, output: held.append(output))
    blank = torch.zeros(1, 3, *model.input_size, device=model.device)
    try:
        with torch.no_grad(), accounted_for():
            model.module(model.normalise(blank))
    finally:
        handle.remove()
    if not held:
        raise RequestError(f"layer '{layer}' takes no part in the forward pass of model '{model.name}'")
    return int(model.features(held[-1], layer).shape[1])


def min_max(maps: Tensor) -> Tensor:
    """Stretch each of the maps (N, H, W) to [0, 1]; a constant one becomes zero."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (maps - low) / spread.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def constant_channels(activations: Tensor) -> Tensor:
    """Bool (B, C): channels (B, C, h, w) that hold one value, compared before any upsampling rounds."""
    return activations.amax((2, 3)) == activations.amin((2, 3))


def blank_scores(
    model: Model, targets: Tensor, size: tuple[int, int], *, score: str = "logit", space: str = "pixel"
) -> Tensor:
    """The targets' scores (B,) on the (H, W) image that a mask of zeros leaves: one forward for all."""
    colour = vanishing_colour(model, space)
    with torch.no_grad():
        logits = model(colour.expand(1, 3, *size).contiguous())
    return read_scores(logits.expand(len(targets), -1), targets, score)


def masked_scores(
    model: Model,
    images: Tensor,
    targets: Tensor,
    activations: Tensor,
    gate: Callable[[Tensor], Tensor],
    constant: Tensor,
    *,
    score: str = "logit",
    space: str = "pixel",
    reorder: bool = False,
    each: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Scores of every image multiplied by a mask from each of its channels, in chunks on the device.

    Only one chunk of masked images exists at a time, whatever the number of channels.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1].
        targets: (B,) explained classes.
        activations: (B, C, h, w) features.
        gate: turns upsampled channels (n, H, W) into masks of the same shape.
        constant: (B, C), the value of each mask that is known to be the same everywhere, NaN for the
            others. Of an image, equal ones share a forward; those of zero share the score of one blank
            image, one forward in all.
        score: one of `READINGS`.
        space: one of `SPACES`.
        reorder: bring masked images into the order in memory in which the model is fast, which rounds
            scores differently.
        each: called after each chunk of masks that are not constant, with their images' positions
            (n,), in rising order, the masks (n, H, W) and their scores (n,).

    Returns:
        (B, C) float32.
    """
    scores = torch.zeros(activations.shape[:2], device=images.device)
    colour = vanishing_colour(model, space)
    size = (int(images.shape[2]), int(images.shape[3]))
    blank = constant == 0
    if bool(blank.any()):
        scores += blank_scores(model, targets, size, score=score, space=space).view(-1, 1) * blank
    shown = images - colour

    def judged(b: Tensor, masks: Tensor) -> Tensor:
        """Scores (n,) of images behind masks (n, 1, H, W) or (n, 1, 1, 1)."""
        masked = shown.index_select(0, b).mul_(masks).add_(colour)
        return read_scores(model(laid_out(model, masked) if reorder else masked), targets[b], score)

    flat, leaders, kind = _alike(constant)
    with torch.no_grad():
        for b, k in _chunks(constant.isnan().nonzero(), chunk_size(model)):
            masks = gate(upsample(activations[b, k].float(), size))
            found = judged(b, masks.unsqueeze(1))
            scores[b, k] = found
            if each is not None:
                each(b, masks, found)
        for b, k in _chunks(leaders, chunk_size(model)):
            scores[b, k] = judged(b, constant[b, k].view(-1, 1, 1, 1))
    scores[flat.unbind(1)] = scores[leaders[kind].unbind(1)]
    return scores


def _chunks(channels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and channels (n, 2), some at a time; none where there are none."""
    for part in channels.split(size) if len(channels) else ():
        yield part[:, 0], part[:, 1]


def _alike(constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks that are constant and not zero, and which of them are equal.

    Returns:
        All of them (n, 2), as image and channel; the first of each kind (kinds, 2); and each one's
        kind (n,).
    """
    flat = (~constant.isnan() & (constant != 0)).nonzero()
    if not len(flat):  # as a rule: what follows costs a GPU more than a chunk of masks
        return flat, flat, flat[:, 0]
    keys = torch.stack([flat[:, 0].to(constant.dtype), constant[flat.unbind(1)]], 1)
    kinds, kind = keys.unique(dim=0, return_inverse=True)
    places = torch.arange(len(flat), device=flat.device)
    first = places.new_full((len(kinds),), len(flat)).scatter_reduce(0, kind, places, "amin")
    return flat, flat[first], kind


def read_scores(logits: Tensor, targets: Tensor, score: str) -> Tensor:
    """The targets' logits or softmax probabilities (N,) from logits (N, classes)."""
    if score not in READINGS:
        raise RequestError(f"unknown score '{score}'; {nearest(score, READINGS)}")
    values = logits.float() if score == "logit" else logits.float().softmax(1)
    return values.gather(1, targets.view(-1, 1)).squeeze(1)


def vanishing_colour(model: Model, space: str) -> Tensor:
    """The colour (1, 3, 1, 1) in [0, 1] that masked pixels fade to in one of `SPACES`."""
    if space not in SPACES:
        raise RequestError(f"unknown space '{space}'; {nearest(space, SPACES)}")
    mean: Tensor = model.mean
    return torch.zeros_like(mean) if space == "pixel" else mean
