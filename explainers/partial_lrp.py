"""Partial LRP (Voita et al. 2019), as Chefer et al. 2021 compare with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _defined_for(model: Model) -> str:
    from faithmap.relevance import chefer_rules, why_no_attention

    return why_no_attention(model, chefer_rules())


@explainer(
    version=1,
    source="Voita et al. 2019 (arXiv:1905.09418), sec. 4; as baseline 'partial LRP' of Chefer et al. 2021 "
    "(arXiv:2012.09838), sec. 4",
    families={"vit"},
    defined_for=_defined_for,
    forwards=1,
    backwards=1,
)
def partial_lrp(model: Model, batch: Batch, *, alpha: float = 1.0) -> Maps:
    """Relevance of the last block's attention weights, from the class token to the patches.

    Relevance starts from one at the target's logit and goes down to the attention matrix of the last
    block alone, R of shape (heads, N, N), by the rules of `lrp` on transformers. The map is the row of
    the class token in mean_h(R^+), without the token itself. Shape (B, h, w) of the tokens' grid; not
    negative; unit: share of the logit.

    Where the head reads class and distillation token, or averages the patches, the mean of those rows
    takes the place of the class token's; the paper knows neither.

    Args:
        model: the model.
        batch: images with targets.
        alpha: weight of positive contributions in weighted layers; 1 as published.
    """
    import torch

    from faithmap.relevance import Rule, attention_relevance, chefer_rules, chunks, token_map

    rules = chefer_rules(linear=Rule("alpha-beta", alpha=alpha))
    maps = []
    for images, targets in chunks(model, batch.images, batch.targets):
        (last,) = attention_relevance(model, images, targets, rules, seed="one", blocks=slice(-1, None))
        maps.append(token_map(model, last.clamp_min(0).mean(1), batch.size).float())
    return torch.cat(maps)
