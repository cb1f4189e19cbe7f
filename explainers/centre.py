"""Control: the middle of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="control: photographers put objects in the middle (Judd et al. 2009)",
    class_specific=False, forwards=0, backwards=0, role="control",
)  # fmt: skip
def centre(model: Model, batch: Batch, *, sigma: float = 0.2) -> Maps:
    """A Gaussian on the middle of the image, whatever the image shows.

    Shape (B, H, W); range (0, 1].

    Args:
        model: not used.
        batch: images; only their size counts.
        sigma: standard deviation as a share of each side.
    """
    import torch

    from faithmap.errors import RequestError

    if sigma <= 0:
        raise RequestError(f"centre, sigma: got {sigma}, expected a positive share of the side")
    height, width = batch.size
    device = batch.images.device
    y = ((torch.arange(height, device=device) + 0.5) / height - 0.5).view(-1, 1)
    x = ((torch.arange(width, device=device) + 0.5) / width - 0.5).view(1, -1)
    return torch.exp(-(x.square() + y.square()) / (2 * sigma**2)).repeat(len(batch), 1, 1)
