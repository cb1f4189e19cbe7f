"""Control: an edge detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: Luminance of R, G, B (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


@explainer(
    version=1, source="control: Adebayo et al. 2018 (arXiv:1810.03292), edge detector; Sobel operator",
    class_specific=False, forwards=0, backwards=0, role="control",
)  # fmt: skip
def edges(model: Model, batch: Batch, *, blur: float = 1.0) -> Maps:
    """Sobel magnitude of the luminance, blurred: what an image gives away without a model.

    Shape (B, H, W); not negative; unit: luminance per pixel, as the Sobel operator weighs it / 8.

    Args:
        model: only its feature grid counts, where the run has no grid.
        batch: images.
        blur: standard deviation of the Gaussian blur, in cells of the run's grid; 0 for none.
    """
    import torch

    weights = torch.tensor(LUMINANCE, device=batch.images.device).view(1, 3, 1, 1)
    magnitude = _sobel((batch.images * weights).sum(1, keepdim=True))
    if blur > 0:
        grid = batch.grid or model.grid
        magnitude = _blurred(
            magnitude, [blur * side / cells for side, cells in zip(batch.size, grid, strict=True)]
        )
    return magnitude.squeeze(1)


def _sobel(luminance: Tensor) -> Tensor:
    """Length of the gradient (B, 1, H, W); borders are continued, so that they are no edges."""
    from torch.nn import functional as F

    across = (
        luminance.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).div(8).view(1, 1, 3, 3)
    )
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, across).square() + F.conv2d(padded, across.mT).square()).sqrt()


def _blurred(maps: Tensor, sigma: list[float]) -> Tensor:
    """Gaussian blur of maps (B, 1, H, W), borders continued; `sigma` in pixels along height and width."""
    import torch
    from torch.nn import functional as F

    # One direction after the other: a cell is many pixels wide, and the plane kernel its square.
    for turn, width in enumerate(sigma):
        reach = max(1, round(3 * width))
        offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
        kernel = torch.exp(-offsets.square() / (2 * width**2))
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if turn == 0 else (1, 1, 1, -1))
        pad = (0, 0, reach, reach) if turn == 0 else (reach, reach, 0, 0)
        maps = F.conv2d(F.pad(maps, pad, mode="replicate"), kernel)
    return maps
