"""The two resizings of the protocol: area mean down to the run's grid, bilinear up to the image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def reduce_to_grid(maps: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Area mean of maps (B, H, W) over the cells of a grid; a map that is no finer stays as it is."""
    if grid is None:
        return maps
    height, width = min(grid[0], maps.shape[1]), min(grid[1], maps.shape[2])
    if (height, width) == tuple(maps.shape[1:]):
        return maps
    return F.adaptive_avg_pool2d(maps.unsqueeze(1), (height, width)).squeeze(1)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps (B, h, w) to (B, H, W), corners not aligned, no antialias."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)
