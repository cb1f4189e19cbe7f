"""FullGrad (Srinivas and Fleuret 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

RESCALES = ("layer", "channel")
#: How far, as a share of the logit and of the parts' sizes, the parts may miss the logit.
TOLERANCE = 1e-3


def _undefined(model: Model) -> str | None:
    """Why the full gradient of a model is not whole: its parts are added up on one image."""
    import torch

    noise = torch.rand(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    images = noise.to(model.device, model.mean.dtype)
    sums: list[Tensor] = []
    target = torch.zeros(1, dtype=torch.long, device=model.device)
    # Past the model's own call: neither counted nor in reduced precision.
    network = partial(_uncounted, model)
    first, logits = full_gradient(network, model, images, target, lambda part: sums.append(part.sum()))
    terms = torch.stack([first.sum(), *sums]).cpu().double()
    logit = logits[0, 0].cpu().double()
    if float((terms.sum() - logit).abs()) <= TOLERANCE * float(logit.abs() + terms.abs().sum()):
        return None
    return (
        f"full gradients are defined for networks that are piecewise linear but for biases; here they add "
        f"up to {float(terms.sum()):.3g} where the logit is {float(logit):.3g} (normalisation by the "
        "features' own statistics, gates or attention)"
    )


def _uncounted(model: Model, images: Tensor) -> Tensor:
    logits: Tensor = model.module(model.normalise(images))
    return logits


@explainer(
    version=1, source="Srinivas and Fleuret 2019 (arXiv:1905.00780), full gradients and FullGrad",
    families={"cnn"}, defined_for=_undefined, forwards=1, backwards=1,
)  # fmt: skip
def fullgrad(model: Model, batch: Batch, *, rescale: str = "layer") -> Maps:
    """Input times gradient and every layer's biases times their gradients, in size, laid over each other.

    A network that is linear but for rectifiers and biases splits its logit exactly:
    S = sum x dS/dx + sum_l sum b_l dS/db_l. The map is psi(x dS/dx) + sum_l sum_k psi(b_l dS/db_l)
    over the layers with a place, channel by channel, psi being absolute value, rescaling to [0, 1] and
    bilinear upsampling. Shape (B, H, W); not negative; no unit.

    x is the image as the network takes it, normalised: in that space, and no other, the split is
    whole. Biases are those of convolutions and linear layers, for batch normalisations the shift that
    is left when mean, deviation, weight and bias are one affine map, and for activations that are not
    linear through the origin, such as ReLU6 beyond its cap, what is missing at the point where they
    stand: f(z) - f'(z) z. A model on which the parts do not add up to the logit (attention, layer
    norms, gates that multiply features) has no full gradient. Layers of one cell, such as the head,
    have no place and are left out, as in the paper.

    Paper and code differ in the rescaling: the formula applies psi to each channel, the authors' code
    rescales the channels of a layer together. The code is the default. It aligns corners when it
    upsamples; here they are not aligned, as nowhere else.

    Args:
        model: the model.
        batch: images with targets.
        rescale: "layer", all channels of a layer by their common range, or "channel", each by its own.
    """
    import torch

    from faithmap.errors import RequestError, nearest
    from faithmap.perturb import chunk_size
    from faithmap.resize import upsample

    if rescale not in RESCALES:
        raise RequestError(f"unknown rescale '{rescale}'; {nearest(rescale, RESCALES)}")
    maps = []
    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model) // 4)
    for images, targets in zip(batch.images.split(chunk), batch.targets.split(chunk), strict=True):
        total = torch.zeros(len(images), *batch.size, device=images.device)

        def add(part: Tensor, total: Tensor = total) -> None:
            if part.ndim == 4 and part.shape[2] * part.shape[3] > 1:
                # Bilinear upsampling is linear: the channels' sum is upsampled in their place.
                total += upsample(_rescaled(part.abs(), rescale).sum(1), batch.size)

        add(full_gradient(model, model, images, targets, add)[0])
        maps.append(total)
    return torch.cat(maps)


def _rescaled(parts: Tensor, rescale: str) -> Tensor:
    """Stretch (B, C, h, w) to [0, 1] over a layer or over each channel; what is constant becomes zero."""
    from faithmap.cam import min_max

    rows = parts.flatten(2) if rescale == "channel" else parts.flatten(1).unsqueeze(1)
    return min_max(rows.flatten(0, 1).unsqueeze(1)).view(parts.shape)


def full_gradient(
    network: Callable[[Tensor], Tensor],
    model: Model,
    images: Tensor,
    targets: Tensor,
    take: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Split the targets' logits into shares of the input and of every bias.

    Args:
        network: images in [0, 1] to logits.
        model: says how images are normalised.
        images: (B, 3, H, W) in [0, 1].
        targets: (B,).
        take: called with each layer's share, the product of bias and gradient, of the shape of the
            layer's output with channels second, last layer first. Shares are not kept here.

    Returns:
        The input's share (B, 3, H, W), and logits (B, classes).
    """
    import torch

    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        with _bias_hooks(take):
            logits = network(pixels)
        score = logits.gather(1, targets.view(-1, 1)).sum()
    (gradient,) = torch.autograd.grad(score, pixels)
    # The normalised image times its gradient: the deviations cancel.
    return gradient * (images - model.mean), logits.detach()


def _bias_hooks(take: Callable[[Tensor], None]) -> Any:
    """A block in which every operation with a bias hands on bias times gradient when that is known."""
    from faithmap.operations import Operations

    class BiasHooks(Operations):
        def see(
            self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> Any:
            bias = _bias_of(name, call, args, kwargs)  # first: the operation may work in place
            output = call(*args, **kwargs)
            if bias is not None and output.requires_grad:
                output.register_hook(partial(_hand_on, take, bias, name == "linear"))
            return output

    return BiasHooks()


def _hand_on(take: Callable[[Tensor], None], bias: Tensor, last: bool, gradient: Tensor) -> None:
    """Multiply and hand on; a linear layer's channels stand last and are brought to the second place."""
    if not last and bias.ndim == 1:
        bias = bias.view(-1, *[1] * (gradient.ndim - 2))
    share = bias.float() * gradient.float() if gradient.dtype.itemsize < 4 else bias * gradient
    take(share.movedim(-1, 1) if last else share)


def _bias_of(
    name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What an operation adds to a linear map of its input: (C,), of the output's shape, or None."""
    from faithmap.operations import RECTIFIERS, SMOOTH

    if name in ("conv1d", "conv2d", "conv3d", "linear") or name.startswith("conv_transpose"):
        bias: Tensor | None = _argument(args, kwargs, 2, "bias")
        return None if bias is None else bias.detach()
    if name == "batch_norm":
        return _shift(*(_argument(args, kwargs, i, key) for i, key in enumerate(_BATCH_NORM)))
    if name in SMOOTH or name in RECTIFIERS - {"relu"}:
        return _missing(call, args, kwargs)
    return None


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def _shift(
    _input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool | None,
    _momentum: float | None,
    eps: float | None,
) -> Tensor | None:
    """The shift of a batch normalisation as one affine map; None with the batch's own statistics."""
    import torch

    if mean is None or variance is None or training:
        return None
    shift = -mean / torch.sqrt(variance + (1e-5 if eps is None else eps))
    if weight is not None:
        shift = shift * weight
    return (shift if bias is None else shift + bias).detach()


def _missing(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """f(z) - f'(z) z of an activation, value by value."""
    import torch

    values: Tensor = args[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        output: Tensor = call(values.clone(), *args[1:], **kwargs)  # a copy: it may work in place
        (slope,) = torch.autograd.grad(output.sum(), values)
    return (output - slope * values).detach()
