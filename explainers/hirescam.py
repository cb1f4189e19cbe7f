"""HiResCAM (Draelos and Carin 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(version=1, source="Draelos and Carin 2020 (arXiv:2011.08891)", forwards=1, backwards=1)
def hirescam(model: Model, batch: Batch, *, layer: str | None = None, relu: bool = True) -> Maps:
    """Every cell of every channel times its own gradient, summed over the channels, positive part.

    L = ReLU(sum_k dS/dA_ij^k A_ij^k), with S the target's logit. Where one linear layer follows the
    features, the sum before the ReLU splits the logit less its bias among the cells. Behind mean
    pooling and one linear layer, as at the last stage of a ResNet or a MobileNet, gradients do not
    depend on the cell and the map is Grad-CAM's. Shape (B, h, w) of the features' grid; not negative;
    unit: logit.

    The authors' formula and the library's method end with the sum; their programs clip it at zero
    before anything is drawn or measured, and so does the default here.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
        relu: clip negative cells to zero; without it the map is signed.
    """
    from pytorch_grad_cam.hirescam import HiResCAM

    from faithmap.cam import library_cam

    return library_cam(HiResCAM, batch.activations(layer), batch.gradients(layer), relu=relu)
