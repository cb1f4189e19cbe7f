"""Attention rollout (Abnar and Zuidema 2020)."""

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
    source="Abnar and Zuidema 2020 (arXiv:2005.00928), sec. 3, eq. 1",
    families={"vit"},
    defined_for=_unreadable,
    class_specific=False,
    forwards=1,
    backwards=0,
)
def rollout(model: Model, batch: Batch, *, start_layer: int = 0) -> Maps:
    """Attention followed through all blocks down to the patches, half of it along the skip connections.

    With A_l the block's attention, mean over heads, and A^_l = 0.5 A_l + 0.5 I, whose rows add up to
    one: the row of A^_L ... A^_1 of the token that the head reads. The same for every class. Shape
    (B, h, w) of the patches' grid; not negative; unit: share of the attention.

    The paper treats language models. On images, Chefer et al. 2021 (arXiv:2012.09838) take the class
    token's row, as here, and leave out the first block (`start_layer=1`); the default is the paper's
    product over all blocks. Rows as in `raw-attention` where other tokens are read.

    Args:
        model: the model; a vision transformer of timm.
        batch: images.
        start_layer: the first block of the product, from 0.

    Raises:
        RequestError: the model has no such block.
    """
    from faithmap.attention import mix
    from faithmap.errors import RequestError

    attention = batch.attention
    maps = attention.maps
    if not 0 <= start_layer < len(maps):
        raise RequestError(
            f"rollout, start_layer: got {start_layer}, expected 0 to {len(maps) - 1}: "
            f"model '{model.name}' has {len(maps)} blocks"
        )
    # From the last block down only one row of the product is needed.
    row = attention.start()
    for heads in reversed(maps[start_layer:]):
        row = 0.5 * mix(row, heads.mean(1)) + 0.5 * row
    return attention.fold(row)
