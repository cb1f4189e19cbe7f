"""DeepLIFT with the rescale rule (Shrikumar et al. 2017)."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: Below this difference of inputs a multiplier is the slope, as a quotient would be of roundings.
NEAR_ZERO = 1e-6
#: Activations that work entry by entry, to which the rescale rule applies (names in torch.nn).
ENTRYWISE = (
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Softplus", "Sigmoid",
    "Tanh", "Hardtanh", "Hardsigmoid", "Hardswish", "LogSigmoid", "Softsign",
)  # fmt: skip

_known: WeakKeyDictionary[Model, str] = WeakKeyDictionary()


def _undefined(model: Model) -> str | None:
    """Why the rule is not exact for a model: it is tried on one image, once."""
    from faithmap.explaining import describe

    if model not in _known:
        try:
            _known[model] = _try(model)
        except Exception as error:  # networks of other people may do anything
            _known[model] = f"the rescale rule could not be tried: {describe(error)}"
    return _known[model] or None


@explainer(
    version=1, source="Shrikumar et al. 2017 (arXiv:1704.02685), eq. 1 and sec. 3.5.2 (rescale rule)",
    defined_for=_undefined, forwards=2, backwards=1,
)  # fmt: skip
def deeplift(model: Model, batch: Batch, *, baseline: str = "black") -> Maps:
    """Difference to a reference image times multipliers, which carry differences through the network.

    An activation's multiplier is the quotient of the differences of its output and input between
    the image and the reference; linear layers pass multipliers on as they do gradients. Summed over
    the channels, a map adds up to the logit's gain over the reference. Shape (B, H, W); signed;
    unit: logit.

    Only on networks for which that sum is exact, which is tried before anything is computed: linear
    layers, batch norm, pooling, sums, and activations and max pooling that are modules.
    Transformers, layer norms, gates that multiply and activations called as functions have no
    multipliers here. The paper has no rule for max pooling; captum's is followed: a rise counts for
    the pixel of the image's maximum, a fall for that of the reference's.

    captum's DeepLift is not used. It fails where a module is used twice (torchvision's ResNets),
    takes ReLU6 for linear (MobileNetV2), and its contributions do not add up where max pooling
    follows an activation; where none of this holds, the tests compare with it.

    Args:
        model: the model.
        batch: images with targets.
        baseline: the reference: "black", or "mean", the colour that the model's normalisation
            subtracts. The paper leaves it to the user.
    """
    import torch

    from faithmap.errors import RequestError, nearest
    from faithmap.perturb import chunk_size

    if baseline not in ("black", "mean"):
        raise RequestError(f"deeplift: unknown baseline '{baseline}'; {nearest(baseline, ('black', 'mean'))}")
    colour = torch.zeros_like(model.mean) if baseline == "black" else model.mean
    paired = _with_multipliers(model)
    # An image and its reference, with a graph that holds about four times what a pass without does.
    chunk = max(1, chunk_size(model, batch.size) // 8)
    maps = [
        _contributions(paired, images, colour, targets)[0].sum(1)
        for images, targets in zip(batch.images.split(chunk), batch.targets.split(chunk), strict=True)
    ]
    return torch.cat(maps)


def _contributions(paired: Model, images: Tensor, colour: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Contributions (B, 3, H, W) and the logits' gains (B,) that they should add up to."""
    import torch

    references = colour.expand_as(images)
    with torch.enable_grad():  # whoever asks may have switched gradients off
        pixels = images.detach().clone().requires_grad_()
        chosen = paired(torch.cat([pixels, references])).gather(1, targets.repeat(2).view(-1, 1))
        scores, at_reference = chosen.squeeze(1).chunk(2)
        (multipliers,) = torch.autograd.grad(scores.sum(), pixels)
    return ((images - references) * multipliers).detach(), (scores - at_reference).detach()


def _with_multipliers(model: Model) -> Model:
    """A copy of the model, sharing its weights and its meter, whose activations pass multipliers on.

    It takes images and, behind them, as many references.
    """
    from torch import nn

    shared = [*model.parameters(), *model.buffers()]
    paired = copy.deepcopy(model, {id(tensor): tensor for tensor in shared} | {id(model.meter): model.meter})
    entrywise = tuple(getattr(nn, name) for name in ENTRYWISE)
    module: Any
    for module in paired.modules():
        rule = _through_max_pool if type(module) is nn.MaxPool2d else _through_activation
        if rule is _through_max_pool or type(module) in entrywise:
            module.inplace = False
            module.forward = partial(rule, module)
    return paired


def _through_activation(module: Any, inputs: Tensor) -> Tensor:
    """An activation's outputs, with the rescale rule's multipliers for gradients.

    `inputs - inputs.detach()` is zero, so that what it is multiplied with becomes the gradient and
    leaves the value alone.
    """
    import torch

    with torch.enable_grad():
        free = inputs.detach().requires_grad_()
        outputs = type(module).forward(module, free)
        (slopes,) = torch.autograd.grad(outputs.sum(), free)
    outputs = outputs.detach()
    image, reference = inputs.detach().chunk(2)
    change, moved = image - reference, _difference(outputs)
    far = change.abs() > NEAR_ZERO
    multipliers = torch.where(far, moved / torch.where(far, change, 1), slopes.chunk(2)[0])
    moving = inputs.chunk(2)[0]
    return torch.cat([outputs.chunk(2)[0] + multipliers * (moving - image), outputs.chunk(2)[1]])


def _through_max_pool(module: Any, inputs: Tensor) -> Tensor:
    """Maxima, with multipliers for gradients.

    Where the image's maximum is the higher, its excess counts for the pixel that holds it; where
    the reference's is, the loss counts for the pixel that holds that.
    """
    import torch
    from torch.nn import functional as F

    outputs, places = F.max_pool2d(
        inputs.detach(), module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode,
        return_indices=True,
    )  # fmt: skip
    moving, (image, reference) = inputs.chunk(2)[0].flatten(2), inputs.detach().flatten(2).chunk(2)
    at_image, at_reference = places.flatten(2).chunk(2)
    # Of several maxima of the reference (a black one is full of them), that of the image is meant.
    tied = reference.gather(2, at_reference) - reference.gather(2, at_image) <= NEAR_ZERO
    at_reference = torch.where(tied, at_image, at_reference)
    moved = _difference(outputs).flatten(2)
    result = outputs.chunk(2)[0].flatten(2)
    for part, place in ((moved.clamp_min(0), at_image), (moved.clamp_max(0), at_reference)):
        change = (image - reference).gather(2, place)
        far = change.abs() > NEAR_ZERO
        multipliers = torch.where(far, part / torch.where(far, change, 1), 0)
        result = result + multipliers * (moving - image).gather(2, place)
    first, second = outputs.chunk(2)
    return torch.cat([result.view_as(first), second])


def _difference(pairs: Tensor) -> Tensor:
    image, reference = pairs.chunk(2)
    return image - reference


def _try(model: Model) -> str:
    """Explain one image of noise; the reason why it does not add up, or nothing."""
    import torch

    from faithmap.models import Meter

    paired = _with_multipliers(model)
    paired.meter, paired.precision = Meter(), "fp32"
    image = torch.rand(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0)).to(model.device)
    image = image.to(model.mean.dtype)
    black = torch.zeros_like(model.mean)
    with torch.no_grad():
        gains = (paired(torch.cat([image, black.expand_as(image)]))).chunk(2)
    target = (gains[0] - gains[1]).abs().argmax(1)
    found, gain = _contributions(paired, image, black, target)
    missing = float((found.sum() - gain.sum()).abs())
    if missing <= 1e-3 * float(gain.abs().sum()) + 1e-5 * float(found.abs().sum()):
        return ""
    return (
        f"the rescale rule is not exact here: contributions add up to {float(found.sum()):.4g} where the "
        f"logit gains {float(gain.sum()):.4g}; {_culprits(model)}"
    )


def _culprits(model: Model) -> str:
    """Names the kinds of modules that have no multipliers, or what else there may be."""
    without = ("LayerNorm", "GroupNorm", "Attention", "SqueezeExcite")
    kinds = {type(module).__name__ for module in model.module.modules()}
    found = sorted(kind for kind in kinds if any(word in kind for word in without))
    if found:
        return f"there is no rule for {', '.join(found)}"
    return "an activation may be called as a function, or features multiplied"
