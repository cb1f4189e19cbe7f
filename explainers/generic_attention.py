"""Generic attention explainability (Chefer et al. 2021b), for self-attention."""

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
    source="Chefer et al. 2021b (arXiv:2103.15679), eq. 5-6",
    families={"vit"},
    defined_for=_unreadable,
    forwards=1,
    backwards=1,
)
def generic_attention(model: Model, batch: Batch) -> Maps:
    """Attention weighted by its positive effect on the target's logit, gathered through all blocks.

    R starts as the identity; each block, from the first, adds A_ R to it, where A_ is the mean over heads
    of the positive part of attention times the gradient of the target's logit (eq. 5, 6). The map is
    the row of R of the token that the head reads. Shape (B, h, w) of the patches' grid; not negative;
    unit: of the logit and its powers.

    Rows as in `raw-attention` where other tokens than the class token are read. There R less the
    identity is taken, lest every patch show itself; for the class token this changes nothing.

    Args:
        model: the model; a vision transformer of timm.
        batch: images with targets.
    """
    from faithmap.attention import mix

    attention = batch.attention
    start = attention.start()
    gained = start.new_zeros(start.shape)
    # The row of (I + A_L) ... (I + A_1), from the last block down; less the identity all along, since
    # gradients may be too small beside it to survive a subtraction.
    layers = zip(attention.maps, attention.gradients(batch.targets), strict=True)
    for heads, gradients in reversed(list(layers)):
        gained = gained + mix(start + gained, (gradients * heads).clamp_min(0).mean(1))
    return attention.fold(gained)
