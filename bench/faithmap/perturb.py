"""Perturbation: the order of pixels, the fills, and the model's logits along a masking curve.

Pixels are whole (all channels at once), every step starts from the clean image, and the masked
images of all steps, both directions and all images of a batch run through the model in chunks of
one size, built in place on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faithmap.errors import RequestError
from faithmap.models import Model

#: Shares of pixels removed, s = 0, .1, ..., .9 (protocols, section A).
STEPS = tuple(step / 10 for step in range(10))


def removal_ranks(maps: Tensor, ties: Tensor) -> Tensor:
    """The position of every pixel in the order of removal, highest first.

    Pixels are ordered lexicographically by the map, then by the tie field, then by their index;
    the tie field is never added to the map. The order for the negative curve is that of the
    negated map with the same tie field, so that the curves of a map and of its negative are
    exchanged exactly.

    Args:
        maps: (B, H, W), any sign.
        ties: (B, H, W), equal for all maps of an image.

    Returns:
        (B, H * W) int32; 0 is removed first.
    """
    return _inverse(_order(maps, tie_order(ties))[0])


def tie_order(ties: Tensor) -> Tensor:
    """Pixel indices (B, H * W) of tie fields (B, H, W), highest first, then by index."""
    return ties.flatten(1).sort(dim=1, descending=True, stable=True).indices


def removal_ranks_both(maps: Tensor, ties: Tensor, by_tie: Tensor | None = None) -> Tensor:
    """The orders of removal of the maps and of their negatives, from one sort.

    Args:
        maps: (B, H, W), any sign.
        ties: (B, H, W), equal for all maps of an image.
        by_tie: `tie_order(ties)`, where many maps share it.

    Returns:
        (2, B, H * W) int32, equal to `removal_ranks(maps, ties)` and `removal_ranks(-maps, ties)`.
    """
    order, values = _order(maps, tie_order(ties) if by_tie is None else by_tie)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    # In the negated map plateaus follow each other the other way round, but within a plateau the
    # tie field orders the pixels as before: a pixel keeps its distance from its plateau's start.
    fresh = F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)
    start = positions.where(fresh, 0).cummax(1).values
    ends = F.pad(fresh[:, 1:], (0, 1), value=True)
    last = positions.where(ends, order.shape[1]).flip(1).cummin(1).values.flip(1)
    negated = order.shape[1] - 1 - last + positions - start
    ranks = torch.empty_like(order, dtype=torch.int32, memory_format=torch.contiguous_format)
    return torch.stack([_inverse(order), ranks.scatter_(1, order, negated.int())])


def _order(maps: Tensor, by_tie: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel indices (B, H * W) in the order of removal, and the map's values in that order."""
    # Adding zero turns -0.0 into 0.0, which a sort by bits would put apart.
    in_tie_order = maps.flatten(1).gather(1, by_tie) + 0.0
    values, by_map = in_tie_order.sort(dim=1, descending=True, stable=True)
    return by_tie.gather(1, by_map), values


def _inverse(order: Tensor) -> Tensor:
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty_like(positions, memory_format=torch.contiguous_format).scatter_(1, order, positions)


def tied_share(maps: Tensor) -> Tensor:
    """The share (B,) of pixels in [0, 1] whose value occurs more than once in their map."""
    values = maps.flatten(1).sort(dim=1).values
    equal = values[:, 1:] == values[:, :-1]
    return (F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))).float().mean(1)


def step_counts(pixels: int, steps: Sequence[float] = STEPS) -> list[int]:
    """How many pixels are removed at each share: k = int(pixels * s), as published.

    >>> step_counts(224 * 224)[1:4]
    [5017, 10035, 15052]
    """
    # A share like 0.3 is stored a little below or above; rounding first keeps int() honest.
    return [int(round(pixels * share, 6)) for share in steps]


def _black(images: Tensor) -> Tensor:
    return images.new_zeros(*images.shape[:2], 1, 1)


def _mean(images: Tensor) -> Tensor:
    return images.mean((2, 3), keepdim=True)


def _blur(images: Tensor) -> Tensor:
    """Gaussian blur whose sigma is a tenth of the shorter side, by which every shape is gone."""
    return gaussian_blur(images, min(images.shape[2:]) / 10)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur (B, C, H, W) with a sigma in pixels, one axis after the other.

    Cut off at three sigma, borders mirrored.
    """
    radius = max(1, min(int(3 * sigma + 0.5), min(images.shape[2:]) - 1))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    bell = torch.exp(-0.5 * (offsets / sigma) ** 2)
    bell = (bell / bell.sum()).view(1, 1, -1, 1)
    batch, channels, height, width = images.shape
    planes = images.reshape(batch * channels, 1, height, width)
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="reflect"), bell)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="reflect"), bell.transpose(2, 3))
    return planes.reshape(images.shape)


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "black": _black,
    "mean": _mean,
    "blur": _blur,
}
FILL_NAMES = (*FILLS, "noisy-linear")


def make_fill(name: str, images: Tensor) -> Tensor | None:
    """The colours that take the place of removed pixels: (B, 3, H, W), or (B, 3, 1, 1) for one colour.

    "black" is zero in [0, 1] space, "mean" the mean colour of the image, "blur" the image blurred
    with a sigma of a tenth of its shorter side. "noisy-linear" depends on which pixels are removed
    and is computed for each masked image: then None is returned and `noisy_linear` does the work.

    Raises:
        RequestError: there is no such fill.
    """
    if name == "noisy-linear":
        return None
    if name not in FILLS:
        raise RequestError(f"unknown fill '{name}'; known are: {', '.join(FILL_NAMES)}")
    return FILLS[name](images)


def noisy_linear(images: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
    """Replace removed pixels by a weighted mean of their neighbours, plus noise (ROAD).

    Each removed pixel is asked to equal the mean of its neighbours within the image, direct ones
    weighing 1/6 and diagonal ones 1/12 before their weights are made to sum to one at the border
    (Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods",
    sec. 4). The reference solves this linear system exactly, pixel lists on the CPU; here it is
    solved to a small error by two steps of conjugate gradients behind a multigrid cycle, from
    coarse to fine, for all images at once on the device. Without noise the largest error of any
    pixel and channel stays below 0.01 on smooth images and below 0.03 on white noise, for masks
    from single pixels to half planes and shares removed of 0.1 to 0.9 (tests/test_perturb.py).

    Args:
        images: (N, 3, H, W) in [0, 1].
        keep: bool (N, 1, H, W), true where the pixel stays. Where none stays, the image's mean
            colour is filled in: the system then has no solution of its own.
        noise: (N, 3, H, W) or a number, added to the removed pixels, then clipped to [0, 1].
    """
    known = keep.to(images.dtype)
    levels = _levels(images * known, known)
    share = levels[0].share.sum((2, 3), keepdim=True)
    solution = levels[0].target.sum((2, 3), keepdim=True) / share.clamp_min(1)
    for depth in reversed(range(len(levels))):
        solution = _refine(levels[depth:], solution)
    solution = torch.where(share > 0, solution, images.mean((2, 3), keepdim=True))
    return images * known + (solution + noise).clamp(0, 1) * (1 - known)


@dataclass(frozen=True)
class _Level:
    """The linear system of `noisy_linear` on one grid; each is half as fine as the one before."""

    #: (N, 3, h, w) mean colour of the known pixels of a cell, zero where none is known.
    target: Tensor
    #: (N, 1, h, w) share of the cell's pixels that are known.
    share: Tensor
    #: (N, 1, h, w) one where nothing is known.
    unknown: Tensor
    #: (1, 1, h, w) sum of the weights of the neighbours that lie in the image.
    degree: Tensor
    #: (N, 1, h, w) `unknown / degree`.
    scale: Tensor


def _levels(values: Tensor, share: Tensor) -> list[_Level]:
    levels = []
    while True:
        unknown = (share == 0).to(values.dtype)
        degree = _neighbours(torch.ones_like(share[:1])).clamp_min(1)
        levels.append(_Level(values / share.clamp_min(1e-9), share, unknown, degree, unknown / degree))
        if min(share.shape[2:]) <= 3:
            return levels
        values, share = _halve(values), _halve(share)


def _halve(planes: Tensor) -> Tensor:
    return F.avg_pool2d(planes, 2, ceil_mode=True, count_include_pad=False)


def _double(planes: Tensor, size: torch.Size) -> Tensor:
    doubled = F.interpolate(planes, scale_factor=2.0, mode="bilinear", align_corners=False)
    return doubled[..., : size[-2], : size[-1]]


def _neighbours(planes: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours, direct ones twice as heavy; zero outside the image."""
    rows = planes * 2
    rows[..., 1:] += planes[..., :-1]
    rows[..., :-1] += planes[..., 1:]
    both = rows * 2
    both[..., 1:, :] += rows[..., :-1, :]
    both[..., :-1, :] += rows[..., 1:, :]
    return both.sub_(planes, alpha=4)


def _refine(levels: list[_Level], coarser: Tensor) -> Tensor:
    """Solve on the first level, starting from the solution on the next."""
    level = levels[0]
    start = _double(coarser, level.target.shape) if coarser.shape[-1] > 1 else coarser
    solution = torch.addcmul(level.target, level.unknown, start)
    residual = torch.addcmul(-solution * level.unknown, level.scale, _neighbours(solution))
    if len(levels) == 1:
        return solution + _cycle(levels, residual)
    return _conjugate_gradients(levels, solution, residual)


def _conjugate_gradients(levels: list[_Level], solution: Tensor, residual: Tensor, steps: int = 2) -> Tensor:
    """Steps along conjugate directions that multigrid cycles propose, and a last averaging step.

    Every image and channel is a system of its own: inner products run over pixels alone.
    """
    degree, scale = levels[0].degree, levels[0].scale
    direction: Tensor | None = None
    image = energy = solution
    for _ in range(steps):
        proposed = _cycle(levels, residual)
        if direction is not None:
            overlap = (proposed * image).sum((2, 3), keepdim=True)
            proposed = proposed - direction * (overlap / energy)
        direction = proposed
        change = torch.addcmul(direction, scale, _neighbours(direction), value=-1)
        image = change * degree
        # Below this floor there is nothing left to solve, and a quotient would be of roundings.
        energy = (direction * image).sum((2, 3), keepdim=True).clamp_min(1e-10)
        length = (residual * direction * degree).sum((2, 3), keepdim=True) / energy
        solution, residual = solution + length * direction, residual - length * change
    return solution + residual


def _cycle(levels: list[_Level], residual: Tensor) -> Tensor:
    """One multigrid cycle: the correction that would cure `residual`, roughly.

    Plain averaging damps fine ripples by a third each time (the stencil's eigenvalues lie between
    -1/3 and 1/3 there), so two steps before and after the coarse correction suffice.
    """
    level, last = levels[0], len(levels) == 1
    correction = residual
    for _ in range(8 if last else 1):
        correction = torch.addcmul(residual, level.scale, _neighbours(correction))
    if last:
        return correction
    left = torch.addcmul(residual - correction, level.scale, _neighbours(correction))
    # On cells twice as wide the same stencil stands for four times the curvature.
    coarse = _cycle(levels[1:], 4 * _halve(left) * levels[1].unknown)
    correction = torch.addcmul(correction, level.unknown, _double(coarse, left.shape))
    for _ in range(2):
        correction = torch.addcmul(residual, level.scale, _neighbours(correction))
    return correction


def chunk_size(model: Model, size: tuple[int, int] | None = None) -> int:
    """Images in one forward pass of masked images: a function of the image size and the device alone.

    Args:
        model: the model.
        size: (H, W) of the images; the model's input size by default.
    """
    height, width = size or model.input_size
    budget = (16 if model.device.type == "cpu" else 256) * 224 * 224
    count = 8
    while count * 2 * height * width <= budget and count < 1024:
        count *= 2
    return count


def laid_out(model: Model, images: Tensor) -> Tensor:
    """The images in the memory order in which the model's convolutions are fast.

    Pixel by pixel ("channels last") on a CPU, where it saves a third of the time, and under
    reduced precision; plane by plane otherwise. Masked images built from these keep the order.
    """
    pixelwise = model.device.type == "cpu" or model.precision != "fp32"
    return images.contiguous(memory_format=torch.channels_last if pixelwise else torch.contiguous_format)


def logits_in_chunks(model: Model, count: int, make: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Logits (count, classes) of images that are built only when their chunk is due, without a graph.

    Args:
        model: the model.
        count: how many images there are.
        make: takes positions (n,) among them, on the model's device, and gives images (n, 3, H, W).
        chunk: images in one forward pass.
    """
    with torch.no_grad():
        return torch.cat([model(make(part)) for part in _chunks(count, chunk, model.device)])


def _chunks(count: int, size: int, device: torch.device) -> Iterator[Tensor]:
    yield from torch.arange(count, device=device).split(size)


def masked_logits(
    model: Model,
    images: Tensor,
    ranks: Tensor,
    counts: Sequence[int],
    fill: Tensor | None,
    noise: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Logits of every image with its first `k` pixels removed, for each k in `counts`.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1].
        ranks: (R, B, H * W) orders of removal from `removal_ranks`; R orders an image.
        counts: pixels removed at each step; at least one step.
        fill: colours put in their place, (B, 3, H, W) or (B, 3, 1, 1), or None for the noisy
            linear fill.
        noise: (B, 3, H, W), only for the noisy linear fill.
        chunk: images in one forward pass; by default `chunk_size` of the images' size.

    Returns:
        (R, B, len(counts), classes) float32.
    """
    orders, batch = ranks.shape[:2]
    size = (int(images.shape[2]), int(images.shape[3]))
    flat = ranks.flatten(0, 1)
    removed = torch.tensor(list(counts), dtype=torch.int32, device=images.device)
    # The noisy fill works plane by plane; all else is built in the order that the model likes.
    source = images.contiguous() if fill is None else laid_out(model, images)
    black = fill is not None and not bool(fill.any())

    def make(part: Tensor) -> Tensor:
        row = part.div(len(removed), rounding_mode="floor")
        keep = flat[row] >= removed[part % len(removed)].unsqueeze(1)
        which, keep = row % batch, keep.view(-1, 1, *size)
        if fill is None:
            added = images.new_zeros(()) if noise is None else noise[which]
            return laid_out(model, noisy_linear(source[which], keep, added))
        return blend(source[which], keep, None if black else fill[which])

    logits = logits_in_chunks(model, orders * batch * len(removed), make, chunk or chunk_size(model, size))
    return logits.view(orders, batch, len(removed), -1)


def blend(images: Tensor, keep: Tensor, fill: Tensor | None) -> Tensor:
    """The image where `keep` (N, 1, H, W) is true, the fill elsewhere; in the image's memory order.

    No fill means black.

    A sum of products in which one term is exactly zero: several times faster on a CPU than a
    choice by a mask that broadcasts, and equal to it for finite values.
    """
    kept = keep.to(images.dtype)
    return images * kept if fill is None else torch.addcmul(images * kept, fill, 1 - kept)
