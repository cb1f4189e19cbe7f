"""XGrad-CAM (Fu et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="Fu et al. 2020 (arXiv:2008.02312), the weights of XGrad-CAM", forwards=1, backwards=1
)
def xgradcam(model: Model, batch: Batch, *, layer: str | None = None) -> Maps:
    """Channels weighted by their gradients, averaged with the features as weights.

    w_k = sum_ij (A_ij^k / sum_ab A_ab^k) dS/dA_ij^k and L = ReLU(sum_k w_k A^k), with S the target's
    logit. A channel of zeros weighs nothing. Shape (B, h, w) of the features' grid; not negative;
    unit: logit per cell. Made for rectified features: where they are signed (transformers) the sum
    in the denominator may be close to zero, and the formula is used as it stands.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
    """
    from pytorch_grad_cam.xgrad_cam import XGradCAM

    from faithmap.cam import library_cam

    return library_cam(XGradCAM, batch.activations(layer), batch.gradients(layer))
