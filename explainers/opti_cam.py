"""Opti-CAM (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _backwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: an image that has settled is not passed again."""
    return float(params.get("iterations", 100))


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most one masked image an iteration, and the clean image for its features."""
    return 1 + _backwards(model, params)


@explainer(
    name="opti-cam", version=1, source="Zhang et al. 2023 (arXiv:2301.07002), the objective and its map",
    forwards=_forwards, backwards=_backwards, check_params={"iterations": 5}, exact_cost=False,
    iterative=True,
)  # fmt: skip
def opti_cam(
    model: Model,
    batch: Batch,
    *,
    layer: str | None = None,
    score: str = "logit",
    iterations: int = 100,
    learning_rate: float = 0.1,
    tolerance: float = 1e-10,
    space: str = "pixel",
) -> Maps:
    """Channels weighted so that the image, masked by their sum, has the highest score for the class.

    S(u) = sum_k softmax(u)_k A^k, and u maximises F(u) = f_c(x n(up(S(u)))), where
    up is bilinear and n stretches a map to [0, 1]. Adam starts from u = 0, equal weights.
    The map is the S of the last u on the features' grid, shifted and scaled as n does:
    enlarged to the image it is the mask that was optimised. Shape (B, h, w); in [0, 1] once enlarged,
    and zero where S is constant.

    Published: Adam at a rate of 0.1, at most 100 iterations, an early stop where the objective
    changes by less than 1e-10, the logit as score, no ReLU on S. Here every image stops by itself,
    so that its map does not depend on the batch. In single precision the published threshold asks
    for two equal scores; in bf16, where unequal ones are rounded to equal, nothing stops. The
    authors' code masks pixels in [0, 1], before the normalisation, and applies a ReLU to the
    features, which matters where they are signed; the paper has none, and neither has this.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default, as in the paper for
            residual networks and transformers (for VGG it takes the last convolution before pooling).
        score: "logit", or "probability" (softmax over the classes).
        iterations: steps of Adam, at most; with 0 the weights stay equal.
        learning_rate: Adam's rate.
        tolerance: an image is done when its score changes by less than this from one step to the next.
        space: "pixel" masks towards black, "normalised" towards the model's mean colour.
    """
    import torch

    from faithmap.cam import READINGS, SPACES
    from faithmap.errors import RequestError, nearest

    for what, given, known in (("score", score, READINGS), ("space", space, SPACES)):
        if given not in known:
            raise RequestError(f"opti-cam: unknown {what} '{given}'; {nearest(given, known)}")
    if iterations < 0 or learning_rate <= 0 or tolerance < 0:
        raise RequestError(
            f"opti-cam: got iterations {iterations}, learning_rate {learning_rate}, tolerance {tolerance}; "
            "expected a count, a positive rate and a tolerance that is not negative"
        )
    maps = []
    for part in torch.arange(len(batch)).split(_together(model)):
        some = batch if len(part) == len(batch) else batch.select(part.tolist())
        features = some.activations(layer).float()
        u = _fitted(
            model, some.images, some.targets, features,
            score=score, iterations=iterations, learning_rate=learning_rate, tolerance=tolerance, space=space,
        )  # fmt: skip
        maps.append(_stretched(_combined(u, features), batch.size))
    return torch.cat(maps)


def _together(model: Model) -> int:
    """How many images are optimised in the same passes.

    Sums are rounded differently when a pass holds more images, and a hundred steps of Adam on a
    function with kinks make percents of that. On a CPU, where larger passes save little, every image
    has passes of its own, and its map is the same in any batch, to the bit.
    """
    from faithmap.perturb import chunk_size

    # A pass with a graph holds about four times what a pass without one does.
    return 1 if model.device.type == "cpu" else max(1, chunk_size(model) // 4)


def _fitted(
    model: Model,
    images: Tensor,
    targets: Tensor,
    features: Tensor,
    *,
    score: str,
    iterations: int,
    learning_rate: float,
    tolerance: float,
    space: str,
) -> Tensor:
    """The u (n, C) of every image after its last step; the images do not touch each other."""
    import torch

    from faithmap.cam import read_scores
    from faithmap.resize import upsample

    size = (int(images.shape[2]), int(images.shape[3]))
    colour = model.mean if space == "normalised" else torch.zeros_like(model.mean)
    u = torch.zeros(features.shape[:2], device=features.device)
    optimizer = torch.optim.Adam([u], lr=learning_rate)
    moving = torch.ones(len(u), dtype=torch.bool, device=u.device)
    before = torch.full((len(u),), torch.inf, device=u.device)
    for _ in range(iterations):
        which = moving.nonzero().squeeze(1)
        if not len(which):
            break
        with torch.enable_grad():
            leaf = u[which].detach().requires_grad_()
            masks = upsample(_stretched(_combined(leaf, features[which]), size), size).unsqueeze(1)
            scores = read_scores(model((images[which] - colour) * masks + colour), targets[which], score)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        scores = scores.detach()
        # Rounding to few bits makes scores equal that are not: under reduced precision none stops.
        if model.precision == "fp32":
            moving[which] = (scores - before[which]).abs() >= tolerance
        before[which] = scores
        held = u.clone()
        u.grad = torch.zeros_like(u).index_copy(0, which, -gradient)
        optimizer.step()
        u.copy_(torch.where(moving.unsqueeze(1), u, held))
    return u


def _combined(u: Tensor, features: Tensor) -> Tensor:
    """Features (n, C, h, w) summed with the weights softmax(u), u (n, C): maps (n, h, w)."""
    return (u.softmax(1)[:, :, None, None] * features).sum(1)


def _stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Shift and scale maps (n, h, w) so that they span [0, 1] once enlarged; constant ones become zero."""
    import torch

    from faithmap.resize import upsample

    enlarged = upsample(maps, size)
    low, high = enlarged.amin((1, 2), keepdim=True), enlarged.amax((1, 2), keepdim=True)
    # Enlarging rounds, and a constant map would be stretched into its rounding: ask the map itself.
    constant = (maps.amax((1, 2), keepdim=True) == maps.amin((1, 2), keepdim=True)) | (high <= low)
    return torch.where(constant, 0.0, (maps - low) / torch.where(constant, 1.0, high - low))
