"""Attention Guided CAM (Leem and Seo 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _unreadable(model: Model) -> str | None:
    from faithmap.attention import unreadable

    return unreadable(model)


@explainer(
    version=1,
    source="Leem and Seo 2024 (arXiv:2402.04563), eq. 2, 7",
    families={"vit"},
    defined_for=_unreadable,
    forwards=1,
    backwards=1,
)
def attention_guided_cam(model: Model, batch: Batch) -> Maps:
    """Positive gradients of the class token's attention, weighted by its scores under a sigmoid.

    With S_h^k the scores of head h of block k before the softmax, of the class token's row: the features
    are F_h^k = sigmoid(S_h^k), the weights a_h^k the gradient of the target's logit with respect to that
    row of the attention behind the softmax, and the map is sum_k sum_h F_h^k ReLU(a_h^k), without the
    prefix tokens. Shape (B, h, w) of the patches' grid; not negative; unit: logit.

    The gradient is the paper's, which comes from the head down the skip connections: what each block's
    attention takes in is held constant, so that later attention passes nothing back, while the MLPs
    do. It therefore needs a backward pass of its own. Map and features are stated in the paper; that
    the MLPs stay open, and that the gradient is taken behind the softmax while the scores are taken
    before it, is read from the authors' code. Heads and blocks are summed in both.

    The paper treats networks that read the class token. A reading of ours beyond it: where several
    tokens are read (distilled DeiT, mean pooling) the rows of all of them are summed; the gradient
    already carries their weight in the logit.

    Args:
        model: the model; a vision transformer of timm.
        batch: images with targets.
    """
    import torch

    attention = batch.attention
    layers = zip(attention.scores, attention.skip_gradients(batch.targets), strict=True)
    tokens = [(scores.sigmoid() * gradients.clamp_min(0)).sum((1, 2)) for scores, gradients in layers]
    return attention.fold(torch.stack(tokens).sum(0))
