"""LayerCAM (Jiang et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1,
    source="Jiang et al. 2021 (doi:10.1109/TIP.2021.3089943), maps of one layer",
    forwards=1,
    backwards=1,
)
def layercam(model: Model, batch: Batch, *, layer: str | None = None) -> Maps:
    """Every cell of every channel weighted by its own positive gradient.

    L = ReLU(sum_k ReLU(dS/dA_ij^k) A_ij^k), with S the target's logit. Shape (B, h, w) of the
    features' grid; not negative; unit: logit. The paper rescales maps by tanh only to merge those of
    several layers, which is not done here.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
    """
    from pytorch_grad_cam.layer_cam import LayerCAM

    from faithmap.cam import library_cam

    return library_cam(LayerCAM, batch.activations(layer), batch.gradients(layer))
