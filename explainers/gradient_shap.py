"""GradientSHAP, also called expected gradients (Lundberg and Lee 2017; Erion et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: Where a map starts from: black, an image of uniform noise, or either with equal chance.
BASELINES = ("black", "noise", "black+noise")


def _passes(model: Model, params: Mapping[str, Any]) -> float:
    """One forward and one backward a random point."""
    return float(params.get("n_samples", 200))


@explainer(
    version=1,
    source="Erion et al. 2019 (arXiv:1906.10670), expected gradients; Lundberg and Lee 2017",
    forwards=_passes,
    backwards=_passes,
    check_params={"n_samples": 6},
)
def gradient_shap(
    model: Model, batch: Batch, *, n_samples: int = 200, baseline: str = "black+noise", noise: float = 0.0
) -> Maps:
    """Integrated gradients in expectation over baselines: one random point of one way a sample.

    E over baselines x' and a ~ U(0, 1) of (x - x') dS/dx at x' + a (x - x'), summed over the
    channels. Shape (B, H, W); signed; unit: logit. In expectation a map adds up to the logit's gain
    over the mean of its baselines.

    The papers draw baselines from the training images, which an explainer does not have here and
    other images of the batch may not stand in for: a map would depend on its neighbours. Of what
    captum's users take in their place (black images and random ones) the default draws either with
    equal chance. 200 samples are the default of the authors' own GradientExplainer; captum's is 5.
    captum's GradientShap is not used, because it draws from the global random states of torch and
    numpy for the batch as a whole.

    Args:
        model: the model.
        batch: images with targets.
        n_samples: random points an image, 1 or more.
        baseline: "black", "noise" (independent uniform values) or "black+noise".
        noise: standard deviation of Gaussian noise added to the image, as captum's `stdevs`; 0 or
            more; images have the range [0, 1].
    """
    import torch

    from faithmap.errors import RequestError, nearest
    from faithmap.sampling import mean_gradients

    if n_samples < 1 or noise < 0:
        raise RequestError(
            f"gradient-shap: got n_samples {n_samples} and noise {noise}, "
            "expected n_samples >= 1 and noise >= 0"
        )
    if baseline not in BASELINES:
        raise RequestError(f"gradient-shap: unknown baseline '{baseline}'; {nearest(baseline, BASELINES)}")

    def draw(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        place, coin = torch.rand(2, generator=generator).tolist()
        start = torch.zeros_like(image)
        if baseline == "noise" or (baseline == "black+noise" and coin < 0.5):
            start = torch.rand(image.shape, generator=generator)
        if noise:
            image = image + noise * torch.randn(image.shape, generator=generator)
        difference = image - start
        return start + place * difference, difference

    return mean_gradients(model, batch, n_samples, draw).sum(1)
