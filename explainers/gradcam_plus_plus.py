"""Grad-CAM++ (Chattopadhay et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    name="gradcam++", version=1, source="Chattopadhay et al. 2018 (arXiv:1710.11063), eq. 5, 19, 20",
    forwards=1, backwards=1,
)  # fmt: skip
def gradcam_plus_plus(model: Model, batch: Batch, *, layer: str | None = None) -> Maps:
    """Channels weighted by their positive gradients, each cell by its own share alpha.

    With g = dS/dA_ij^k: alpha_ij^k = g^2 / (2 g^2 + (sum_ab A_ab^k) g^3) (eq. 19), zero where g is,
    w_k = sum_ij alpha_ij^k ReLU(g), L = ReLU(sum_k w_k A^k). The paper's score is exp(S), which
    multiplies the map of an image by a positive number and is left out. Shape (B, h, w) of the
    features' grid; not negative; unit: logit per cell.

    pytorch-grad-cam adds 1e-6 to the denominator. Mean pooling over 49 cells leaves gradients of
    about 1e-3, whose squares are no larger than that, so its weights tend to g^3 and depend on the
    unit of the features. The paper has no such term. Gradients and features are therefore brought
    to another unit first, which changes nothing in the formula but makes the term vanish.

    Where features are signed (transformers) the denominator can pass through zero, which the
    paper, made for rectified features, does not treat; the formula is used as it stands.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
    """
    from pytorch_grad_cam.grad_cam_plusplus import GradCAMPlusPlus

    from faithmap.cam import library_cam

    activations, gradients = batch.activations(layer).float(), batch.gradients(layer).float()
    unit = _unit(gradients)
    return library_cam(GradCAMPlusPlus, activations * unit, gradients / unit)


def _unit(gradients: Tensor) -> Tensor:
    """(B, 1, 1, 1): a power of two, so that scaling does not round, in which gradients reach 1e3."""
    import torch

    largest = gradients.abs().amax((1, 2, 3), keepdim=True)
    exponent = torch.log2(largest / 1e3).floor().clamp(-100, 100)
    return torch.where(largest > 0, torch.exp2(exponent), 1.0)
