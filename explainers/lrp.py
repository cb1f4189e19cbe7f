"""Layer-wise relevance propagation (Bach et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model
    from faithmap.relevance import Rules


def _rules(
    model: Model, linear: str, conv: str, first: str, epsilon: float, alpha: float, gamma: float
) -> Rules:
    from faithmap.relevance import Rule, Rules, chefer_rules

    if linear == "family":
        linear = "epsilon" if model.family == "cnn" else "alpha-beta"
    dense, convolution, reads = (Rule(kind, epsilon, alpha, gamma) for kind in (linear, conv, first))
    if model.family == "cnn":
        return Rules(dense, convolution, reads)
    return chefer_rules(linear=dense, conv=convolution, first=reads)


def _defined_for(model: Model) -> str:
    from faithmap.relevance import why_not

    return why_not(model, _rules(model, "family", "alpha-beta", "box", 1e-6, 1.0, 0.25))


@explainer(
    version=1,
    source="Bach et al. 2015 (doi:10.1371/journal.pone.0130140), eq. 58 and 60; the composite of "
    "Montavon et al. 2019 (doi:10.1007/978-3-030-28954-6_10); on transformers the baseline 'LRP' "
    "of Chefer et al. 2021 (arXiv:2012.09838), sec. 4",
    defined_for=_defined_for,
    forwards=1,
    backwards=1,
)
def lrp(
    model: Model,
    batch: Batch,
    *,
    linear: str = "family",
    conv: str = "alpha-beta",
    first: str = "box",
    epsilon: float = 1e-6,
    alpha: float = 1.0,
    gamma: float = 0.25,
) -> Maps:
    """The target's logit handed down to the pixels, layer by layer, each by its rule.

    Signed, summed over the channels. A map adds up to the logit, but for the share of biases under
    "epsilon" and "gamma", of embeddings and of positions (Swin's within a window, too) that are no
    function of the image, and of neurons without a contribution of the sign that their rule asks for.
    Shape (B, H, W); unit: logit.

    Rules by layer, as is usual today: "epsilon" for fully connected layers, "alpha-beta" with alpha = 1
    (z-plus) for convolutions, and the box rule for the layer that reads the image, whose pixels lie in
    [0, 1]. Bach et al. give the first two and no composite. Batch norm is part of its convolution;
    activations pass relevance unchanged; maxima take all; sums share in proportion; layer norm divides
    by a constant and is linear else.

    On transformers the rules are those that Chefer et al. compare with: z-plus for all layers, norms and
    the softmax pass relevance entry by entry, and products of two matrices give half to each. Their code
    starts from one instead of the logit, which only scales the map; it bounds the box by the image's own
    least and largest value; and where a linear layer reads negative inputs it divides their part by twice
    its own sum instead of the whole. None of these is taken over.

    Args:
        model: the model.
        batch: images with targets.
        linear: rule of fully connected layers: "epsilon", "alpha-beta", "gamma", or "family", which is
            "epsilon" for CNNs and "alpha-beta" for transformers.
        conv: rule of convolutions, likewise without "family".
        first: rule of the layer that reads the image: the same, "box" or "flat".
        epsilon: stabiliser, in the unit of activations; Bach et al. try 0.01 to 100.
        alpha: weight of positive contributions under "alpha-beta", 1 or more; negative get 1 - alpha.
        gamma: how far "gamma" prefers contributions of the output's sign.

    Raises:
        RequestError: a rule is unknown or a number out of range.
    """
    from faithmap.relevance import image_relevance

    rules = _rules(model, linear, conv, first, epsilon, alpha, gamma)
    return image_relevance(model, batch.images, batch.targets, rules).sum(1)
