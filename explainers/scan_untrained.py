"""Control: SCAN with a decoder that has learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _misfit(model: Model, params: Mapping[str, Any]) -> str | None:
    from faithmap.decoders import misfit

    return misfit(model, params["layer"])


@explainer(
    version=2, source="control: SCAN (arXiv:2603.06523) before its training", defined_for=_misfit, forwards=1,
    backwards=1, role="control", check_params={"width": 0.125},
)  # fmt: skip
def scan_untrained(
    model: Model,
    batch: Batch,
    *,
    layer: str | None = None,
    percentile: float = 95.0,
    scalar: str = "logit",
    width: float | None = None,
    stretch: float = 0.15,
    seed: int = 0,
) -> Maps:
    """The confidence that SCAN's decoder shows at its random initialisation.

    What is left of the map without training: the place of the masked features, passed through random
    convolutions. The decoder is in evaluation mode with its norms' initial statistics, so no image
    depends on another. Shape (B, H, W); range [0, 1]. An image without any positive gradient is not
    masked, which is noted.

    Args:
        model: the model.
        batch: images with targets.
        layer, percentile, scalar: what is masked and how; as for `masked-features`.
        width: multiplies the decoder's channels; by default as for `scan`.
        stretch: constant of the stretching sine.
        seed: of the decoder's weights, which are those that a fit of `scan` with that seed begins with.
    """
    from faithmap.batch import seed_of
    from faithmap.decoders import decode_batch, seeded_decoder
    from faithmap.gradient_masks import analysed_layer, masked_features, note_unmasked
    from faithmap.reconstruction import confidence_of

    name = analysed_layer(model, layer)
    masked = masked_features(batch.context, batch.targets, name, percentiles=percentile, score=scalar)
    note_unmasked(batch, masked.unmasked)
    decoder = seeded_decoder(masked.layout, width, seed_of(seed, "scan", "weights"), model.device).eval()
    return confidence_of(decode_batch(decoder, model, masked)[:, 0], stretch=stretch)
