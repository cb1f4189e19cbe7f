"""Raw attention: what the last block's class token attends to."""

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
    source="Chefer et al. 2021 (arXiv:2012.09838), sec. 4, baseline raw attention",
    families={"vit"},
    defined_for=_unreadable,
    class_specific=False,
    forwards=1,
    backwards=0,
)
def raw_attention(model: Model, batch: Batch) -> Maps:
    """Attention of the last block from the token that the head reads to the patches, mean over heads.

    The same for every class. Shape (B, h, w) of the patches' grid; not negative; unit: share of the
    attention, of which prefix tokens (class, distillation, registers) take the rest.

    Published for networks that read the class token. A reading of ours beyond it: the mean of both rows
    where class and distillation token are read (distilled DeiT), the mean of the rows of all pooled
    tokens where tokens are pooled.

    Args:
        model: the model; a vision transformer of timm.
        batch: images.
    """
    from faithmap.attention import mix

    attention = batch.attention
    return attention.fold(mix(attention.start(), attention.maps[-1].mean(1)))
