"""SmoothGrad (Smilkov et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: What is averaged over the noisy images: squares of gradients, their magnitudes, or themselves.
KINDS = ("square", "abs", "signed")


def _passes(model: Model, params: Mapping[str, Any]) -> float:
    """One forward and one backward a noisy image."""
    return float(params.get("n_samples", 50))


@explainer(
    version=1, source="Smilkov et al. 2017 (arXiv:1706.03825), sec. 2.2 and 3.2",
    forwards=_passes, backwards=_passes, check_params={"n_samples": 6},
)  # fmt: skip
def smoothgrad(
    model: Model, batch: Batch, *, n_samples: int = 50, noise: float = 0.15, kind: str = "square"
) -> Maps:
    """Squared gradient of the target's logit averaged over copies of the image with Gaussian noise.

    M(x) = 1/n sum_i (dS(x + N(0, sigma^2))/dx)^2, summed over the channels. Shape (B, H, W); not
    negative, unless kind is "signed"; unit: logit per full range of a channel, squared by default.

    Published: n = 50 and sigma between 10% and 20% of the image's range of values; 15% lies between
    and is what the authors' library takes. Noisy pixels are not clipped, as there. The paper
    writes the gradient itself, leaves the sign open and finds magnitudes better on natural images;
    the authors' library squares by default (SmoothGrad-Squared in Hooker et al. 2019), which the dev
    part supports. "signed" averages gradients, "abs" their magnitudes. captum's NoiseTunnel is not
    used, because its noise depends on the batch.

    Args:
        model: the model.
        batch: images with targets.
        n_samples: noisy copies an image, 1 or more.
        noise: sigma as a share of the range between the image's lowest and highest value; 0 or more.
        kind: "square", "abs" or "signed", taken of each copy's gradient before averaging.
    """
    import torch

    from faithmap.errors import RequestError, nearest
    from faithmap.sampling import mean_gradients

    if n_samples < 1 or noise < 0:
        raise RequestError(
            f"smoothgrad: got n_samples {n_samples} and noise {noise}, expected n_samples >= 1 and noise >= 0"
        )
    if kind not in KINDS:
        raise RequestError(f"smoothgrad: unknown kind '{kind}'; {nearest(kind, KINDS)}")

    def draw(image: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        sigma = noise * float(image.amax() - image.amin())
        return image + sigma * torch.randn(image.shape, generator=generator), None

    transform = {"signed": None, "abs": torch.abs, "square": torch.square}[kind]
    return mean_gradients(model, batch, n_samples, draw, transform).sum(1)
