"""AttnLRP: relevance propagation that knows attention (Achtibat et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model
    from faithmap.relevance import Rules


def _rules(linear_gamma: float, conv_gamma: float, epsilon: float) -> Rules:
    from faithmap.relevance import Rule, Rules

    return Rules(
        linear=Rule("gamma", epsilon=epsilon, gamma=linear_gamma),
        conv=Rule("gamma", epsilon=epsilon, gamma=conv_gamma),
        attention=Rule("epsilon", epsilon=epsilon),
        norm="fixed",
        softmax="taylor",
        epsilon=epsilon,
    )


def _defined_for(model: Model) -> str:
    from faithmap.relevance import why_not

    return why_not(model, _rules(0.05, 0.25, 1e-6))


@explainer(
    version=1,
    source="Achtibat et al. 2024 (arXiv:2402.05602), propositions 3.1 (softmax), 3.3 (products of matrices), "
    "3.4 (norms)",
    families={"vit"},
    defined_for=_defined_for,
    forwards=1,
    backwards=1,
)
def attnlrp(
    model: Model,
    batch: Batch,
    *,
    linear_gamma: float = 0.05,
    conv_gamma: float = 0.25,
    epsilon: float = 1e-6,
) -> Maps:
    """The target's logit handed down to the pixels, with rules for each part of attention.

    Softmax s of x: R_i = x_i (R_i - s_i sum_j R_j), its first-order Taylor expansion. Products of two
    matrices: half to each, in proportion to the terms of the sums. Layer norm divides by a constant and
    is linear else; activations pass relevance unchanged. Linear layers within attention follow the
    epsilon rule; the others and the patch embedding follow the gamma rule, which the paper advises for
    vision transformers against noise.

    Signed, summed over the channels. Biases, embeddings and the constant term of the softmax's expansion
    keep their share, so that a map need not add up to the logit. Shape (B, H, W); unit: logit.

    The paper leaves gamma to a search for each model. The defaults lie within the grid of the authors'
    example for vision transformers (convolutions 0.1 to 100, linear layers 0 to 1).

    Args:
        model: the model.
        batch: images with targets.
        linear_gamma: gamma of linear layers outside attention; 0 is the epsilon rule.
        conv_gamma: gamma of the patch embedding and other convolutions.
        epsilon: stabiliser of every denominator, in the unit of activations.

    Raises:
        RequestError: a number is out of range.
    """
    from faithmap.relevance import image_relevance

    rules = _rules(linear_gamma, conv_gamma, epsilon)
    return image_relevance(model, batch.images, batch.targets, rules).sum(1)
