"""Control: the features that SCAN's decoder is shown, without the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="control: what SCAN's decoder is given (arXiv:2603.06523, eq. 1)", forwards=1,
    backwards=1, role="control",
)  # fmt: skip
def masked_features(
    model: Model, batch: Batch, *, layer: str | None = None, percentile: float = 95.0, scalar: str = "logit"
) -> Maps:
    """Mean over the channels of the features that SCAN masks by the gradient: what its decoder adds to.

    F M with M = 1 where the positive gradient reaches its percentile (`faithmap.gradient_masks`). Shape
    (B, h, w) of the features' grid; signed where the features are; unit: that of the features. Of a
    transformer all tokens take part in the percentile and the patches alone in the map. An image without
    any positive gradient is not masked, which is noted.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; by default, as for `scan`, the block halfway up a vision transformer,
            of other models the target layer.
        percentile: of the positive gradients, 0 to 100; 95 as published for SCAN.
        scalar: what the gradient is of, "logit" or "probability" of the target.
    """
    from faithmap.gradient_masks import analysed_layer, masked_features, note_unmasked

    name = analysed_layer(model, layer)
    masked = masked_features(batch.context, batch.targets, name, percentiles=percentile, score=scalar)
    note_unmasked(batch, masked.unmasked)
    if not masked.layout.tokens:
        return masked.values.mean(1)
    height, width = masked.layout.grid
    return masked.values[:, masked.values.shape[1] - height * width :].mean(2).view(-1, height, width)
