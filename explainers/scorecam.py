"""Score-CAM (Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: the features, one image a channel, and the blank image if it is subtracted."""
    from faithmap.cam import channel_count

    return 1 + channel_count(model, params.get("layer")) + bool(params.get("subtract_blank"))


@explainer(
    version=1, source="Wang et al. 2020 (arXiv:1910.01279), algorithm 1", forwards=_forwards, backwards=0,
    exact_cost=False,
)  # fmt: skip
def scorecam(
    model: Model,
    batch: Batch,
    *,
    layer: str | None = None,
    score: str = "logit",
    channel_softmax: bool = True,
    subtract_blank: bool = False,
    space: str = "pixel",
) -> Maps:
    """Channels weighted by the score that remains where the image shows only what they light up.

    Each channel is upsampled and stretched to [0, 1]: the mask H_k. S_k is the target's score on the
    image times H_k, w = softmax of S over the channels, L = ReLU(sum_k w_k A^k). Shape (B, h, w) of
    the features' grid; not negative; unit: that of the features. A constant channel masks
    everything; all of them share one forward pass.

    The defaults are algorithm 1 and agree with pytorch-grad-cam but for its corner-aligned
    upsampling. The paper's score less that of a blank image changes nothing under the softmax over
    channels. The authors' own code is `score="probability", channel_softmax=False,
    space="normalised"`.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
        score: "logit", or "probability" (softmax over the classes).
        channel_softmax: weights are the softmax of the scores over the channels, else the scores.
        subtract_blank: subtract the blank image's score; of effect without the channel softmax.
        space: "pixel" masks towards black, "normalised" towards the model's mean colour.
    """
    import torch

    from faithmap.cam import blank_scores, constant_channels, masked_scores, min_max

    activations = batch.activations(layer).float()
    constant = torch.where(constant_channels(activations), 0.0, torch.nan)
    scores = masked_scores(
        model, batch.images, batch.targets, activations, min_max, constant, score=score, space=space
    )
    if subtract_blank:
        scores = scores - blank_scores(model, batch.targets, batch.size, score=score, space=space).view(-1, 1)
    weights = scores.softmax(1) if channel_softmax else scores
    return (weights[:, :, None, None] * activations).sum(1).clamp_min(0)
