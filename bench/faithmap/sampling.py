"""Gradients of the target's logit averaged over random points around each image.

captum's NoiseTunnel and GradientShap draw from torch's and numpy's global random states for a whole
batch at once, so that a map depends on the images beside it. Here each image draws from a generator
of its own, and points of several images share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from faithmap.batch import Batch
from faithmap.models import Model
from faithmap.perturb import chunk_size

#: Takes an image (3, H, W) and its generator, both on the CPU; gives the point (3, H, W) at which
#: the gradient is taken and the factor (3, H, W) that it is multiplied with, None for one.
Draw = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class _Drawn:
    """One random point of one image."""

    image: int
    point: Tensor
    factor: Tensor | None


def target_gradients(model: Model, images: Tensor, targets: Tensor) -> Tensor:
    """Gradients (B, 3, H, W) of the targets' logits with respect to the pixels, in one pass."""
    with torch.enable_grad():  # whoever asks may have switched gradients off
        pixels = images.detach().clone().requires_grad_()
        chosen = model(pixels).gather(1, targets.view(-1, 1)).sum()
        (gradient,) = torch.autograd.grad(chosen, pixels)
    return gradient.detach()


def mean_gradients(
    model: Model, batch: Batch, samples: int, draw: Draw, transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean over random points of the target logit's gradient, in chunks on the device.

    The points of an image depend on its own generator alone, and are drawn one by one, so that
    neither the batch nor the size of a chunk changes them.

    Args:
        model: the model.
        batch: images with targets.
        samples: points an image, at least one.
        draw: makes one point.
        transform: applied to each product of gradient and factor (n, 3, H, W) before the mean.

    Returns:
        (B, 3, H, W) float32.
    """
    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model, batch.size) // 4)
    total = torch.zeros_like(batch.images, dtype=torch.float32)
    for part in _chunks(_draws(batch, samples, draw), chunk):
        owners = [drawn.image for drawn in part]
        index = torch.tensor(owners, device=batch.images.device)
        points = torch.stack([drawn.point for drawn in part]).to(batch.images.device)
        values = target_gradients(model, points, batch.targets[index])
        factors = [drawn.factor for drawn in part if drawn.factor is not None]
        if factors:
            values = values * torch.stack(factors).to(values.device)
        if transform is not None:
            values = transform(values)
        for owner in sorted(set(owners)):
            total[owner] += values[index == owner].sum(0)
    return total / samples


def _draws(batch: Batch, samples: int, draw: Draw) -> Iterator[_Drawn]:
    for i in range(len(batch)):
        image, generator = batch.images[i].detach().cpu(), batch.generator(i)
        for _ in range(samples):
            yield _Drawn(i, *draw(image, generator))


def _chunks(draws: Iterator[_Drawn], size: int) -> Iterator[list[_Drawn]]:
    part: list[_Drawn] = []
    for drawn in draws:
        part.append(drawn)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
