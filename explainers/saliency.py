"""Gradient saliency (Simonyan et al. 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(version=1, source="Simonyan et al. 2014 (arXiv:1312.6034), sec. 3.1", forwards=1, backwards=1)
def saliency(model: Model, batch: Batch, *, abs: bool = True) -> Maps:
    """Gradient of the target's logit with respect to the pixels, the largest magnitude of the channels.

    Shape (B, H, W); not negative, signed with abs=False; unit: logit per full range of a channel.

    Args:
        model: the model.
        batch: images with targets.
        abs: the paper's reading, by default; else the signed gradient, summed over the channels.
    """
    from captum.attr import Saliency

    images = batch.images.detach().clone().requires_grad_()
    gradient: Tensor = Saliency(model).attribute(images, target=batch.targets, abs=abs).detach()
    return gradient.amax(1) if abs else gradient.sum(1)
