"""Null: independent random pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


# Neither file nor function is called `random`: run from this folder, it would hide Python's own module.
@explainer(
    name="random", version=1, source="null: i.i.d. U(0, 1) pixels (SCAN, random-map calibration)",
    class_specific=False, forwards=0, backwards=0, role="null",
)  # fmt: skip
def random_pixels(model: Model, batch: Batch, *, draw: int = 0) -> Maps:
    """Independent uniform pixels: a map that knows nothing, as fine as the image.

    Shape (B, H, W); range [0, 1).

    Args:
        model: not used.
        batch: images; only their size and ids count.
        draw: number of the draw; each has other pixels.
    """
    import torch

    del draw  # a parameter is part of the seed: nothing is left to do with it
    fields = [torch.rand(batch.size, generator=batch.generator(i)) for i in range(len(batch))]
    return torch.stack(fields).to(batch.images.device)
