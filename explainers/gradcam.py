"""Grad-CAM (Selvaraju et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(version=1, source="Selvaraju et al. 2017 (arXiv:1610.02391), eq. 1-2", forwards=1, backwards=1)
def gradcam(model: Model, batch: Batch, *, layer: str | None = None) -> Maps:
    """Channels weighted by their mean gradient, summed, positive part.

    w_k = mean_ij dS/dA_ij^k (eq. 1) and L = ReLU(sum_k w_k A^k) (eq. 2), where S is the target's
    logit and A the features of the layer. Shape (B, h, w) of the features' grid; not negative; unit:
    logit per cell.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
    """
    from pytorch_grad_cam.grad_cam import GradCAM

    from faithmap.cam import library_cam

    return library_cam(GradCAM, batch.activations(layer), batch.gradients(layer))
