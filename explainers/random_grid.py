"""Null: independent random cells of the run's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="null: i.i.d. U(0, 1) cells of the grid (SCAN, random-map calibration)",
    class_specific=False, forwards=0, backwards=0, role="null",
)  # fmt: skip
def random_grid(model: Model, batch: Batch, *, draw: int = 0) -> Maps:
    """Independent uniform cells: a map that knows nothing, as coarse as the maps it is compared with.

    Shape (B, h, w) of the run's grid, of the model's features where the run has none; range [0, 1).

    Args:
        model: only its feature grid counts.
        batch: images; only their ids count.
        draw: number of the draw; each has other cells.
    """
    import torch

    del draw  # a parameter is part of the seed: nothing is left to do with it
    grid = batch.grid or model.grid
    fields = [torch.rand(grid, generator=batch.generator(i)) for i in range(len(batch))]
    return torch.stack(fields).to(batch.images.device)
