"""Eigen-CAM (Muhammad and Yeasin 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="Muhammad and Yeasin 2020 (arXiv:2008.00299)",
    class_specific=False, forwards=1, backwards=0,
)  # fmt: skip
def eigencam(model: Model, batch: Batch, *, layer: str | None = None, centre: bool = True) -> Maps:
    """Features of every cell along the direction in which they vary most.

    With O the matrix of features, one row a cell and one column a channel, each channel less its mean
    over the cells, and O = U S V^T its singular value decomposition, L = O v_1. Neither class nor
    gradient enters. Shape (B, h, w) of the features' grid; unit: that of the features; signed, as the
    paper has no ReLU.

    A singular vector is determined up to its sign only, which the paper leaves to chance. Here it is
    the one with which the cell of the largest size is positive (Chung and Ying 2025,
    doi:10.3390/app15137562, eq. 13). Rectified features that are not centred then give a map without
    negative cells.

    Deviation: the paper does not centre; pytorch-grad-cam does (with a ReLU behind it, and a sign left
    to chance), and the dev part supports it.

    Args:
        model: the model.
        batch: images; targets play no part.
        layer: dotted name of the layer; the model's target layer by default.
        centre: subtract each channel's mean over the cells first; false as in the paper.
    """
    import torch

    features = batch.activations(layer)
    # Double precision, on the CPU: nearly equal singular values would mix by rounding.
    cells = features.flatten(2).transpose(1, 2).cpu().double()
    if centre:
        cells = cells - cells.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(cells, full_matrices=False)
    maps: Tensor = left[:, :, 0] * values[:, :1]
    sign = torch.where(maps.amin(1, keepdim=True).abs() > maps.amax(1, keepdim=True).abs(), -1.0, 1.0)
    maps = (maps * sign).reshape(len(maps), *features.shape[2:])
    return maps.to(features.device, torch.float32)
