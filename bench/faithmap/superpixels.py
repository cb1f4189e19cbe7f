"""What LIME and KernelSHAP share: superpixels, scores of images with some of them hidden, least squares.

The lime package and captum's Lime and KernelShap explain one image at a time, and draw from global
random states. Here the hidden-superpixel images of a whole batch run through the model in chunks of
one size, built on the device, and each image draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faithmap.cam import read_scores
from faithmap.errors import RequestError, nearest
from faithmap.models import Model
from faithmap.perturb import FILLS, blend, chunk_size, laid_out, make_fill

#: What hides a superpixel: its own mean colour, or one of the fills of a whole image.
HIDING = ("segment", *FILLS)


@dataclass(frozen=True)
class Superpixels:
    """Each image of a batch cut into regions of like colour."""

    #: (B, H, W) int64: the region of every pixel, 0 to the image's count less one.
    labels: Tensor
    #: How many regions each image has, at least two.
    counts: list[int]

    def paint(self, values: Sequence[Tensor]) -> Tensor:
        """Maps (B, H, W) float32 that hold on each pixel the value of its region."""
        device = self.labels.device
        painted = [
            value.to(device, torch.float32)[label] for value, label in zip(values, self.labels, strict=True)
        ]
        return torch.stack(painted)


def superpixels(
    images: Tensor, segments: int = 50, *, compactness: float = 20.0, sigma: float = 1.0
) -> Superpixels:
    """Cut images into superpixels by scikit-image's SLIC (Achanta et al. 2012), each on its own.

    scikit-image's own defaults (compactness 10, no smoothing) leave noisy images with far fewer
    regions than asked for: 6 of 50 at worst among a dozen of the embedded shapes, where these left
    45 or more, and 42 or more of eight photographs.

    Args:
        images: (B, 3, H, W) in [0, 1].
        segments: roughly how many regions an image is cut into, at least 2.
        compactness: how much nearness counts against likeness of colour (CIELAB); above 0.
        sigma: width in pixels of a Gaussian that smooths the image first; 0 or more.

    Raises:
        RequestError: a parameter is out of its range.
    """
    from skimage.segmentation import slic

    if segments < 2 or compactness <= 0 or sigma < 0:
        raise RequestError(
            f"superpixels: got segments {segments}, compactness {compactness} and sigma {sigma}; "
            "expected segments >= 2, compactness > 0 and sigma >= 0"
        )
    labels, counts = [], []
    for image in images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu():
        found = slic(image.numpy(), n_segments=segments, compactness=compactness, sigma=sigma, start_label=0)
        regions = torch.from_numpy(found).long()
        # Small images may come back whole, and labels may have gaps.
        if int(regions.amax()) == int(regions.amin()):
            regions = _cells(regions.shape[0], regions.shape[1], segments)
        names, label = regions.unique(return_inverse=True)
        labels.append(label)
        counts.append(len(names))
    return Superpixels(torch.stack(labels).to(images.device), counts)


def _cells(height: int, width: int, count: int) -> Tensor:
    """(H, W): a regular grid of about `count` square cells, at least two."""
    side = max(1, round((height * width / count) ** 0.5))
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    if rows * columns < 2:
        rows, columns = (2, 1) if height >= width else (1, 2)
    row = torch.arange(height).mul(rows).div(height, rounding_mode="floor").view(-1, 1)
    column = torch.arange(width).mul(columns).div(width, rounding_mode="floor").view(1, -1)
    cells: Tensor = row * columns + column
    return cells


def hiding_colours(images: Tensor, regions: Superpixels, fill: str) -> Tensor:
    """What hidden superpixels show: (B, 3, H, W), or (B, 3, 1, 1) where it is one colour.

    Args:
        images: (B, 3, H, W) in [0, 1].
        regions: their superpixels.
        fill: "segment" (each region's mean colour), "black", "mean" (the image's mean colour) or
            "blur" (the image, blurred until every shape is gone).

    Raises:
        RequestError: there is no such fill.
    """
    if fill not in HIDING:
        raise RequestError(f"unknown fill '{fill}'; {nearest(fill, HIDING)}")
    if fill != "segment":
        colours = make_fill(fill, images)
        assert colours is not None  # only the noisy linear fill has no colours of its own
        return colours
    most = max(regions.counts)
    flat = regions.labels.flatten(1)
    sums = images.new_zeros(len(images), 3, most)
    where = flat.unsqueeze(1).expand(-1, 3, -1)
    sums.scatter_add_(2, where, images.flatten(2))
    sizes = images.new_zeros(len(images), most).scatter_add_(1, flat, torch.ones_like(flat, dtype=sums.dtype))
    means = sums / sizes.clamp_min(1).unsqueeze(1)
    return means.gather(2, where).view_as(images)


def coalition_scores(
    model: Model,
    images: Tensor,
    targets: Tensor,
    regions: Superpixels,
    coalitions: Sequence[Tensor],
    *,
    fill: str = "segment",
    score: str = "logit",
) -> list[Tensor]:
    """The targets' scores of images that show only some of their superpixels.

    Masked images of several images share a pass; only one chunk of them exists at a time.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1].
        targets: (B,) explained classes.
        regions: the images' superpixels.
        coalitions: for each image bool (n, count): which regions show; n may differ.
        fill: what hides the others, one of `HIDING`.
        score: "logit" or "probability".

    Returns:
        For each image (n,) float64, on the CPU.
    """
    device, size = images.device, (int(images.shape[2]), int(images.shape[3]))
    colours = hiding_colours(images, regions, fill)
    source, flat = laid_out(model, images), regions.labels.flatten(1)
    shown, owner = _stacked(coalitions, max(regions.counts), device)
    scores = torch.zeros(len(owner), device=device)
    with torch.no_grad():
        for part in torch.arange(len(owner), device=device).split(chunk_size(model, size)):
            which = owner[part]
            keep = shown[part].gather(1, flat[which]).view(-1, 1, *size)
            masked = blend(source[which], keep, None if fill == "black" else colours[which])
            scores[part] = read_scores(model(masked), targets[which], score)
    return [part.double() for part in scores.cpu().split([len(coalition) for coalition in coalitions])]


def _stacked(coalitions: Sequence[Tensor], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All coalitions (total, width) bool one below the other, and the image (total,) of each."""
    rows = torch.zeros(sum(map(len, coalitions)), width, dtype=torch.bool)
    owner = torch.zeros(len(rows), dtype=torch.int64)
    start = 0
    for i, coalition in enumerate(coalitions):
        end = start + len(coalition)
        rows[start:end, : coalition.shape[1]] = coalition
        owner[start:end] = i
        start = end
    return rows.to(device), owner.to(device)


def weighted_ridge(features: Tensor, values: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """Coefficients of a weighted ridge regression with an intercept that is not penalised.

    Minimises sum_i w_i (y_i - b_0 - x_i b)^2 + penalty |b|^2 over b_0 and b.

    Args:
        features: (n, d), the x_i.
        values: (n,), the y_i.
        weights: (n,), not negative, not all zero.
        penalty: 0 or more; at 0 the shortest of all solutions where there are several.

    Returns:
        b (d,), float64.
    """
    x, y, w = features.double(), values.double(), weights.double()
    share = w / w.sum()
    x, y = x - share @ x, y - share @ y
    gram = x.T @ (w.unsqueeze(1) * x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return _solve(gram, x.T @ (w * y))


def constrained_least_squares(features: Tensor, values: Tensor, weights: Tensor, total: float) -> Tensor:
    """The b (d,) that minimises sum_i w_i (y_i - x_i b)^2 and adds up to `total`; float64.

    Args:
        features: (n, d), the x_i.
        values: (n,), the y_i.
        weights: (n,), not negative, not all zero.
        total: what the coefficients add up to.
    """
    x, y, w = features.double(), values.double(), weights.double()
    w = w / w.sum()
    size = x.shape[1]
    # Stationary points of the Lagrangian: [X'WX 1; 1' 0] [b; multiplier] = [X'Wy; total].
    system = torch.ones(size + 1, size + 1, dtype=x.dtype)
    system[:size, :size] = x.T @ (w.unsqueeze(1) * x)
    system[size, size] = 0
    right = torch.cat([x.T @ (w * y), torch.tensor([total], dtype=x.dtype)])
    return _solve(system, right)[:size]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The shortest least-squares solution of a symmetric system, which may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    usable = values.abs() > 1e-10 * values.abs().amax()
    inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
    solution: Tensor = vectors @ (inverse * (vectors.T @ right))
    return solution
