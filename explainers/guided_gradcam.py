"""Guided Grad-CAM (Selvaraju et al. 2017), with guided backpropagation (Springenberg et al. 2014)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _undefined(model: Model) -> str | None:
    """Why the rule for rectifiers does not cover a model."""
    from faithmap.operations import LEAKY, RECTIFIERS, SMOOTH, operations_of

    called = operations_of(model)
    # Sigmoids stand in gates beside rectifiers, where the plain gradient is what is meant.
    others = called & (LEAKY | SMOOTH) - {"sigmoid", "hardsigmoid"}
    what = ", ".join(sorted(others)) or ("" if called & RECTIFIERS else "neither")
    return (
        f"guided backpropagation is a rule for ReLU and ReLU6, and the model applies {what}" if what else None
    )


@explainer(
    version=1,
    source="Selvaraju et al. 2017 (arXiv:1610.02391), sec. 3.2; Springenberg et al. 2014 (arXiv:1412.6806)",
    families={"cnn"}, defined_for=_undefined, forwards=2, backwards=2,
)  # fmt: skip
def guided_gradcam(model: Model, batch: Batch, *, layer: str | None = None) -> Maps:
    """Grad-CAM, brought to the size of the image, times the guided gradient of each pixel.

    The guided gradient is that of the target's logit, set to zero wherever it is negative on its way
    back into a ReLU, beside where the ReLU's own input is negative. ReLU6 counts as a ReLU (its cap
    stops the gradient as in the plain one), and so do rectifiers that are functions or work in place.
    The product is signed and has three channels, which the paper shows as a picture; here they are
    summed, as for the other gradients. Shape (B, H, W); unit: squared logit per cell and full range
    of a channel.

    Where a network has no ReLU, or other activations beside it, the rule does not say what to do, and
    libraries fall back on the plain gradient without a word; the method is then not defined.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of Grad-CAM's layer; the model's target layer by default.
    """
    from faithmap import registry
    from faithmap.resize import upsample

    coarse: Tensor = registry.get("explainer", "gradcam").target(model, batch, layer=layer)
    return upsample(coarse, batch.size) * guided_gradients(model, batch.images, batch.targets).sum(1)


def guided_gradients(model: Model, images: Tensor, targets: Tensor) -> Tensor:
    """Guided gradients (B, 3, H, W) of the targets' logits with respect to images in [0, 1]."""
    import torch

    from faithmap.perturb import chunk_size

    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model) // 4)
    parts = []
    for some, chosen in zip(images.split(chunk), targets.split(chunk), strict=True):
        pixels = some.detach().clone().requires_grad_()
        with torch.enable_grad():
            with _guided():
                logits = model(pixels)
            score = logits.gather(1, chosen.view(-1, 1)).sum()
        parts.append(torch.autograd.grad(score, pixels)[0])
    return torch.cat(parts)


def _guided() -> Any:
    """A block in which every rectifier lets only positive gradients in from above."""
    from faithmap.operations import RECTIFIERS, Operations

    class Guided(Operations):
        def see(
            self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> Any:
            output = call(*args, **kwargs)
            if name in RECTIFIERS and output.requires_grad:
                output.register_hook(_positive)
            return output

    return Guided()


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp_min(0)
