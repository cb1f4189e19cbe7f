"""IBA: information bottlenecks for attribution, one for each image (Schulz et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _passes(model: Model, params: Mapping[str, Any]) -> float:
    """One noisy copy a sample and an iteration."""
    return float(params.get("iterations", 10) * params.get("samples", 10))


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """The noisy copies, and the clean image for its features."""
    return 1 + _passes(model, params)


@explainer(
    version=1, source="Schulz et al. 2020 (arXiv:2001.00396), sec. 3.1, eq. 2, 5, 6",
    forwards=_forwards, backwards=_passes, check_params={"iterations": 4, "samples": 3, "beta": 0.1},
)  # fmt: skip
def iba(
    model: Model,
    batch: Batch,
    *,
    statistics: str = "zero",
    layer: str | None = None,
    beta: float = 10.0,
    iterations: int = 10,
    samples: int = 10,
    learning_rate: float = 1.0,
    start: float = 5.0,
    sigma: float = 1.0,
    min_std: float = 0.01,
) -> Maps:
    """Bits that each cell of a layer lets pass when all that the class can do without is noise.

    Every feature R of the layer becomes Z = lambda R + (1 - lambda) eps with eps ~ N(mu, sigma^2)
    (eq. 2); lambda in (0, 1) is the sigmoid of alpha, smoothed in space. Adam minimises the mean
    cross-entropy of noisy copies plus beta times the mean over the layer's features of
    KL(Z given R || N(mu, sigma^2)) (eq. 5, 6). The map is that divergence under the last lambda,
    summed over the channels. Shape (B, h, w) of the features' grid; not negative; unit: bit per cell.

    Published: beta 10 divided by the number of features, which the mean does; alpha from 5, Adam at a
    rate of 1, 10 steps, 10 copies, smoothing with sigma 1; on VGG-16 conv4_1, on ResNet-50 the
    output of the second or third stage. The floor under sigma is that of the authors' library. Its
    features that are zero on 99% of all images are not left out here, and the copies are not clamped
    after a ReLU. Its map is taken before the last step of Adam; this one after it.

    mu and sigma come from the training set in the paper. To reproduce that, give `statistics` a file:
    `faithmap.bottleneck.fit_statistics(model, images, layer).save(path)`. By default no data is
    needed: noise lies around zero with the root mean square of the channel over the image. With
    "image" it lies around the channel's mean. Then noise keeps the mean of every channel, so a head
    that averages the layer right behind it (the last stage of most CNNs) loses nothing, and the map
    is nearly blank; before other layers and for transformers it is a fair choice.

    A transformer's class and other prefix tokens pass as they are. Information that goes round the
    layer, in those tokens or on a residual path, is neither limited nor counted; at the default
    layer of transformers (the last block's first norm) both do. `layer="blocks.N"` is a cut but for
    the tokens.

    Args:
        model: the model.
        batch: images with targets.
        statistics: "zero", "image", or the path of a file made for this model and layer.
        layer: dotted name of the layer; the model's target layer by default.
        beta: weight of the mean information, in nats, against the cross-entropy.
        iterations: steps of Adam.
        samples: noisy copies an image and step.
        learning_rate: Adam's rate.
        start: alpha before the first step.
        sigma: standard deviation of the smoothing in cells; 0 for none.
        min_std: floor under the noise's standard deviation, in the unit of the features.
    """
    import torch

    from faithmap.bottleneck import gates, information, reference
    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size

    if min(iterations, samples) < 1 or min(beta, sigma) < 0 or min(learning_rate, min_std) <= 0:
        raise RequestError(
            f"iba: got iterations {iterations}, samples {samples}, beta {beta}, sigma {sigma}, learning_rate "
            f"{learning_rate}, min_std {min_std}; expected at least one iteration and sample, beta and sigma "
            "not negative, the others positive"
        )
    features = batch.activations(layer).float()
    mean, std = reference(statistics, features, model, layer)
    mean, std = mean.expand_as(features), std.clamp_min(min_std).expand_as(features)
    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model) // 4)
    maps = []
    for part in torch.arange(len(batch), device=features.device).split(max(1, chunk // samples)):
        here = _Images(batch.images[part], batch.targets[part], features[part], mean[part], std[part])
        generators = [batch.generator(i) for i in part.tolist()]
        alpha = torch.full_like(here.features, start)
        optimizer = torch.optim.Adam([alpha], lr=learning_rate)
        for _ in range(iterations):
            drawn = [torch.randn(samples, *alpha.shape[1:], generator=one) for one in generators]
            noise = torch.stack(drawn).to(alpha.device)
            alpha.grad = _gradient(
                model, here, alpha, noise, layer=layer, beta=beta, sigma=sigma, chunk=chunk
            )
            optimizer.step()
        nats = information(here.normed, *gates(alpha, sigma))
        maps.append(nats.sum(1) / math.log(2))
    return torch.cat(maps)


@dataclass(frozen=True)
class _Images:
    """Images whose masks are fitted together, each on its own: nothing is shared between them."""

    #: (n, 3, H, W) and (n,).
    images: Tensor
    targets: Tensor
    #: (n, C, h, w) each: the layer's features, and mean and standard deviation of the noise.
    features: Tensor
    mean: Tensor
    std: Tensor

    @property
    def normed(self) -> Tensor:
        """The features as the noise's unit sees them."""
        return (self.features - self.mean) / self.std


def _gradient(
    model: Model,
    here: _Images,
    alpha: Tensor,
    noise: Tensor,
    *,
    layer: str | None,
    beta: float,
    sigma: float,
    chunk: int,
) -> Tensor:
    """Gradient of every image's loss with respect to its alpha (n, C, h, w).

    The loss is the mean cross-entropy of the noisy copies plus beta times the mean information.

    Args:
        model: the model.
        here: the images, targets and features.
        alpha: (n, C, h, w).
        noise: (n, samples, C, h, w), standard normal.
        layer, beta, sigma: as in `iba`.
        chunk: copies in one pass.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from faithmap.bottleneck import gates, information, logits_with

    samples = noise.shape[1]
    with torch.enable_grad():
        leaf = alpha.detach().requires_grad_()
        nats = information(here.normed, *gates(leaf, sigma)).mean((1, 2, 3)).sum()
        (gradient,) = torch.autograd.grad(beta * nats, leaf)
    for copies in torch.arange(noise[:, :, 0, 0, 0].numel(), device=alpha.device).split(chunk):
        i, j = copies // samples, copies % samples
        with torch.enable_grad():
            passed, damped = gates(leaf, sigma)
            mixed = passed[i] * here.features[i] + damped[i] * (here.mean[i] + here.std[i] * noise[i, j])
            logits = logits_with(model, here.images[i], mixed, layer)
            loss = cross_entropy(logits, here.targets[i], reduction="sum") / samples
            gradient = gradient + torch.autograd.grad(loss, leaf)[0]
    return gradient
