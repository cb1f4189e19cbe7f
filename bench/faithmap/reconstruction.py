"""What SCAN's decoder is trained for: reconstruct a blurred image, and be confident where it may.

SCAN (arXiv:2603.06523), eq. 4 to 10. The printed formulas were not to be had: they are written from
the paper's text and the authors' two codes, which differ in places. Each function says which it follows, and
what differs is a parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from faithmap.errors import RequestError, nearest

#: From the decoder's first channel to a confidence in [0, 1]: the paper's stretching sine, or its ablation.
SQUASHES = ("sine", "sigmoid")
#: How confidence weighs an error in eq. 9: alpha times ("amplified", 9a), or 1 / alpha times
#: ("discounted", 9b).
WEIGHTINGS = ("amplified", "discounted")
#: Floor under the mean confidence and the denominator of eq. 6.
TINY = 1e-13


def stretching_sine(values: Tensor, stretch: float = 0.15) -> Tensor:
    """C = (1 + sin(2 pi x / (8 + a |x|))) / 2, in [0, 1] (eq. 4, in both codes).

    One half at 0, with slope pi / 8. First maximum at x = 2 / (1 - a / 4), beyond which it falls again: it
    swings ever more slowly, so that no gradient vanishes for good.

    Args:
        values: x, any real numbers.
        stretch: a, 0 or more. 0.15 in the PyTorch code, which says it is the paper's; 1.5 in all
            versions of the TensorFlow code.
    """
    return (1 + torch.sin(2 * math.pi * values / (8 + stretch * values.abs()))) / 2


def confidence_of(values: Tensor, squash: str = "sine", stretch: float = 0.15) -> Tensor:
    """The self-confidence map in [0, 1] from the decoder's first channel, of the same shape.

    Raises:
        RequestError: there is no such function, or the stretch is negative.
    """
    if squash not in SQUASHES:
        raise RequestError(f"unknown squash '{squash}'; {nearest(squash, SQUASHES)}")
    if stretch < 0:
        raise RequestError(f"stretch: got {stretch:g}, expected 0 or more; the paper's is 0.15")
    return values.sigmoid() if squash == "sigmoid" else stretching_sine(values, stretch)


def target_area(alpha: float) -> float:
    """A = 1 / (1 + alpha) (eq. 5, in both codes): the share of the image that should be confident.

    alpha A = 1 - A: under 9a the confident and the other part then weigh the same.
    """
    return 1 / (1 + alpha)


def area_deviation(mean: Tensor, area: float) -> Tensor:
    """omega = (m - A)^2 / (m (1 - m)) of mean confidences m (B,) (eq. 6, in both codes).

    Zero where the mean is the target area, without bound as it nears 0 or 1.
    """
    mean = mean.clamp_min(TINY)
    return (mean - area).square() / (mean * (1 - mean)).clamp_min(TINY)


def blur_matrix(length: int, cells: int, factor: float) -> Tensor:
    """(length, length) float32: the Gaussian filter of eq. 7 along one axis, borders mirrored.

    The kernel has 2 floor(length / cells) + 1 taps (both codes): 65, 33, 17 and 9 for 7, 14, 28 and 56 cells
    on 224 pixels. Rows add up to one.

    Args:
        length: pixels along the axis.
        cells: cells of the features along it.
        factor: sigma in cells.
    """
    radius = min(length // cells, length - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    bell = torch.exp(-0.5 * (offsets * cells / (length * factor)).square())
    bell /= bell.sum()
    mirrored = (torch.arange(length)[:, None] + offsets.long()).abs()
    mirrored = torch.where(mirrored < length, mirrored, 2 * (length - 1) - mirrored)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored, bell.expand(length, -1)).float()


def blurred_target(images: Tensor, grid: tuple[int, int], factor: float = 1.0) -> Tensor:
    """The image blurred by about a cell of the features, in [-1, 1] (eq. 7): what is to be reconstructed.

    Args:
        images: (B, 3, H, W) in [0, 1], whatever the model's own normalisation.
        grid: (h, w) of the features. For tokens it is that of the patches; both codes read it off the
            wrong axis there, which leaves the image sharp.
        factor: sigma in cells: 1 in the PyTorch code, 0.5 in the TensorFlow code (the kernel's length, the
            same in both, leaves 0.55 and 0.44 cells of it). 0 for none.

    Raises:
        RequestError: the factor is negative.
    """
    if factor < 0:
        raise RequestError(f"blur: got {factor:g}, expected 0 (none) or more; 1 is a sigma of one cell")
    if factor > 0:
        height, width = int(images.shape[2]), int(images.shape[3])
        down, across = blur_matrix(height, grid[0], factor), blur_matrix(width, grid[1], factor)
        images = down.to(images.device) @ images @ across.T.to(images.device)
    return 2 * images - 1


def error_weights(confidence: Tensor, alpha: float, weighting: str = "amplified") -> Tensor:
    """How each pixel's error counts (eq. 9): w C + 1 - C, of the confidence's shape.

    The paper's text ("increases as the self-confidence value increases") and the PyTorch code have
    w = alpha (9a, "amplified"): it pays to be confident where the error is small. Every version of
    the TensorFlow code has w = 1 / alpha (9b, "discounted"): it pays where the error is large. This reverses
    the meaning of the map.

    Raises:
        RequestError: there is no such weighting, or alpha is not positive.
    """
    if weighting not in WEIGHTINGS:
        raise RequestError(f"unknown weighting '{weighting}'; {nearest(weighting, WEIGHTINGS)}")
    if alpha <= 0:
        raise RequestError(f"alpha: got {alpha:g}, expected a positive number; the paper's is 4")
    weight = alpha if weighting == "amplified" else 1 / alpha
    return weight * confidence + (1 - confidence)


@dataclass(frozen=True)
class Losses:
    """The loss of each image, and its parts."""

    #: L_c + L_r (eq. 10), (B,).
    total: Tensor
    #: L_c = (1 + omega) (MSE + lambda) - lambda (eq. 8), (B,).
    confidence: Tensor
    #: L_r (eq. 9), (B,).
    reconstruction: Tensor
    #: Mean squared error over pixels and colours, (B,).
    error: Tensor
    #: Mean confidence, (B,).
    area: Tensor


def over_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The means (B, h, w) of maps (B, H, W) over the cells of the features."""
    cells: Tensor = torch.nn.functional.adaptive_avg_pool2d(maps.float().unsqueeze(1), grid).squeeze(1)
    return cells


def told_apart(confidence: Tensor, reconstruction: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Correlation of confidence and squared error over the cells of an image, the mean over images: a scalar.

    A decoder that has learnt no more than the area of its map is as confident everywhere, whatever it gets
    wrong, and the correlation is near 0; images where one of the two does not vary count as 0. Pixels would
    show the pattern of the transposed convolutions instead.

    Args:
        confidence: (B, H, W).
        reconstruction: (B, 3, H, W).
        target: (B, 3, H, W).
        grid: (h, w) cells.
    """
    squared = (target - reconstruction).square().mean(1)
    cells = [over_cells(each, grid).flatten(1) for each in (confidence, squared)]
    one, two = (each - each.mean(1, keepdim=True) for each in cells)
    scale = one.norm(dim=1) * two.norm(dim=1)
    found = (one * two).sum(1) / scale.clamp_min(1e-12)
    return torch.where(scale > 1e-9, found, torch.zeros_like(found)).mean()


def losses(
    confidence: Tensor,
    reconstruction: Tensor,
    target: Tensor,
    *,
    alpha: float = 4.0,
    flexibility: float = 0.1,
    weighting: str = "amplified",
) -> Losses:
    """Both losses and their sum (eq. 8 to 10), image by image; no gradient is stopped.

    The TensorFlow code multiplies the batch's mean omega by its mean error; the PyTorch code does so image by
    image, as here.

    Args:
        confidence: C, (B, H, W) in [0, 1].
        reconstruction: (B, 3, H, W), the decoder's colours.
        target: (B, 3, H, W) in [-1, 1], from `blurred_target`.
        alpha: the weight of eq. 9, above 0; it also sets the target area.
        flexibility: lambda of eq. 8, 0 or more: what a wrong area costs where there is no error left.
        weighting: one of `WEIGHTINGS`.

    Raises:
        RequestError: a parameter is out of range.
    """
    if flexibility < 0:
        raise RequestError(f"flexibility: got {flexibility:g}, expected 0 or more; the paper's lambda is 0.1")
    squared = (target - reconstruction).square().mean(1)
    weighted = (error_weights(confidence, alpha, weighting) * squared).mean((1, 2))
    error, area = squared.mean((1, 2)), confidence.mean((1, 2))
    omega = area_deviation(area, target_area(alpha))
    confident = (1 + omega) * (error + flexibility) - flexibility
    return Losses(confident + weighted, confident, weighted, error, area)
