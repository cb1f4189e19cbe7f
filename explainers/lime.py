"""LIME for images (Ribeiro et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """One image a sample; the first sample is the whole image."""
    return float(params.get("n_samples", 1000))


@explainer(
    version=1, source="Ribeiro et al. 2016 (arXiv:1602.04938), eq. 1 and algorithm 1", forwards=_forwards,
    backwards=0, check_params={"n_samples": 64, "segments": 12},
)  # fmt: skip
def lime(
    model: Model,
    batch: Batch,
    *,
    n_samples: int = 1000,
    segments: int = 50,
    compactness: float = 20.0,
    sigma: float = 1.0,
    kernel_width: float = 0.25,
    penalty: float = 1.0,
    fill: str = "mean",
    score: str = "probability",
) -> Maps:
    """Coefficients of a linear model of the score, fitted near the image, painted on its superpixels.

    Samples z hide each superpixel with a chance of one half; z = (1, ..., 1), the whole image, is the
    first. Weighted by pi(z) = exp(-D(z)^2 / (2 width^2)) with the cosine distance D of z to the whole
    image, a ridge regression with an intercept fits the scores. Shape (B, H, W); signed; unit: that
    of the score.

    Published: the defaults of the authors' image explainer, which the paper leaves open: 1000
    samples, the width 0.25, cosine distance, the penalty 1, all superpixels kept, probabilities.
    Deviations: superpixels come from SLIC, where the authors' default is quickshift, the paper names
    neither; hidden superpixels are in the image's mean colour, theirs in their own ("segment"), which
    the dev part speaks against.

    Args:
        model: the model.
        batch: images with targets.
        n_samples: samples an image, 2 or more.
        segments: roughly how many superpixels an image is cut into, 2 or more.
        compactness: SLIC's weight of nearness against colour, above 0.
        sigma: smoothing before SLIC, in pixels.
        kernel_width: width of the kernel, above 0; distances lie in [0, 1].
        penalty: of the squared coefficients, 0 or more.
        fill: what a hidden superpixel shows: "mean", "segment", "black" or "blur".
        score: "probability" (softmax over the classes) or "logit".
    """
    from faithmap.errors import RequestError
    from faithmap.superpixels import coalition_scores, superpixels, weighted_ridge

    if n_samples < 2 or kernel_width <= 0 or penalty < 0:
        raise RequestError(
            f"lime: got n_samples {n_samples}, kernel_width {kernel_width} and penalty {penalty}; "
            "expected n_samples >= 2, kernel_width > 0 and penalty >= 0"
        )
    regions = superpixels(batch.images, segments, compactness=compactness, sigma=sigma)
    samples = [_samples(batch, i, n_samples, count) for i, count in enumerate(regions.counts)]
    scores = coalition_scores(
        model, batch.images, batch.targets, regions, samples, fill=fill, score=score
    )  # fmt: skip
    coefficients = [
        weighted_ridge(z, values, _nearness(z, kernel_width), penalty)
        for z, values in zip(samples, scores, strict=True)
    ]
    return regions.paint(coefficients)


def _samples(batch: Batch, i: int, number: int, count: int) -> Tensor:
    """Bool (number, count): the whole image, and coin flips for each superpixel."""
    import torch

    samples = torch.rand(number, count, generator=batch.generator(i)) < 0.5
    samples[0] = True
    return samples


def _nearness(samples: Tensor, width: float) -> Tensor:
    """The kernel's weight (n,) of each sample, float64.

    The cosine of z to the vector of ones is sqrt(share shown); that of nothing shown is zero.
    """
    import torch

    distance = 1 - samples.double().mean(1).sqrt()
    return torch.exp(-0.5 * (distance / width) ** 2)
