"""Input times gradient (Shrikumar et al. 2016)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1,
    source="Shrikumar et al. 2016 (arXiv:1605.01713), gradient times input",
    forwards=1,
    backwards=1,
)
def input_x_gradient(model: Model, batch: Batch, *, space: str = "pixel") -> Maps:
    """Gradient of the target's logit times the image, summed over the channels.

    Signed. Shape (B, H, W); unit: logit. A map of a linear model adds up to the logit's gain over
    the image that counts as zero.

    The paper multiplies with the network's input and leaves open what zero means there. With
    `space="pixel"` zero is black; with "normalised" it is the mean colour that the model's
    normalisation subtracts, as where captum is given normalised images.

    Args:
        model: the model.
        batch: images with targets.
        space: "pixel" or "normalised".
    """
    from captum.attr import InputXGradient

    from faithmap.cam import vanishing_colour
    from faithmap.sampling import target_gradients

    zero = vanishing_colour(model, space)
    if space == "normalised":
        difference: Tensor = batch.images - zero
        return (difference * target_gradients(model, batch.images, batch.targets)).sum(1)
    images = batch.images.detach().clone().requires_grad_()
    product: Tensor = InputXGradient(model).attribute(images, target=batch.targets)
    return product.detach().sum(1)
