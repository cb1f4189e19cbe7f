"""Transformer explainability: relevance times gradient, rolled out (Chefer et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _defined_for(model: Model) -> str:
    from faithmap.relevance import chefer_rules, why_no_attention

    return why_no_attention(model, chefer_rules(rescale=True))


@explainer(
    version=1,
    source="Chefer, Gur and Wolf 2021 (arXiv:2012.09838), sec. 3.1-3.4",
    families={"vit"},
    defined_for=_defined_for,
    forwards=2,
    backwards=2,
)
def explainability(model: Model, batch: Batch, *, start_layer: int = 0, alpha: float = 1.0) -> Maps:
    """Attention weights times their gradients and relevances, positive part, rolled out over the blocks.

    Of every block b: A_b = I + mean_h((dy/dA_b * R_b)^+), with the gradient of the target's logit and
    the relevance R_b of the attention weights under the paper's rules (positive contributions in weighted
    layers, sums and products rescaled to conserve relevance), which starts from one. C = A_B ... A_1
    without any normalisation of rows; the map is the class token's row of C, without the token itself.
    Shape (B, h, w) of the tokens' grid; not negative; unit: none.

    The paper counts one forward and two backward passes on one graph. Here the true gradients and the
    relevances come from a pass each way of their own.

    Where the head reads class and distillation token, or averages the patches, the mean of those rows
    takes the place of the class token's; the paper knows neither. The authors' script for their table on
    ImageNet leaves the first block out: `start_layer=1`.

    Args:
        model: the model.
        batch: images with targets.
        start_layer: the first block of the product, counted from 0; all by default, as in the paper.
        alpha: weight of positive contributions in weighted layers; 1 as published.

    Raises:
        RequestError: there is no such block.
    """
    import torch

    from faithmap.errors import RequestError
    from faithmap.relevance import (
        Rule,
        attention_gradients,
        attention_relevance,
        chefer_rules,
        chunks,
        token_map,
    )

    depth = len(list(model.layer("blocks").children()))
    if not 0 <= start_layer < depth:
        raise RequestError(f"explainability, start_layer: got {start_layer}, expected 0 to {depth - 1}")
    rules = chefer_rules(linear=Rule("alpha-beta", alpha=alpha), rescale=True)
    blocks = slice(start_layer, None)
    maps = []
    for images, targets in chunks(model, batch.images, batch.targets):
        relevances = attention_relevance(model, images, targets, rules, seed="one", blocks=blocks)
        gradients = attention_gradients(model, images, targets, blocks=blocks)
        tokens = relevances[0].shape[-1]
        rolled = torch.eye(tokens, device=images.device, dtype=relevances[0].dtype).expand(
            len(images), -1, -1
        )
        for relevance, gradient in zip(relevances, gradients, strict=True):
            rolled = rolled + (gradient * relevance).clamp_min(0).mean(1) @ rolled
        maps.append(token_map(model, rolled, batch.size).float())
    return torch.cat(maps)
