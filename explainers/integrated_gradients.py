"""Integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _passes(model: Model, params: Mapping[str, Any]) -> float:
    """One forward and one backward a step."""
    return float(params.get("n_steps", 50))


@explainer(
    version=1,
    source="Sundararajan et al. 2017 (arXiv:1703.01365), eq. 1",
    forwards=_passes,
    backwards=_passes,
    check_params={"n_steps": 6},
)
def integrated_gradients(
    model: Model, batch: Batch, *, n_steps: int = 50, method: str = "gausslegendre"
) -> Maps:
    """Image times the mean gradient of the target's logit on the way from black to the image.

    Signed and summed over the channels, so that a map adds up to the logit's gain over the black
    image, as far as the steps resolve it. Shape (B, H, W); unit: logit.

    Published: black as the baseline of images, and 20 to 300 steps of equal size, which bring the sum
    within 5% of the integral. 50 and the Gauss-Legendre rule are captum's defaults.

    Args:
        model: the model.
        batch: images with targets.
        n_steps: points of the integral.
        method: the rule of integration, as captum names it: "gausslegendre", "riemann_trapezoid",
            "riemann_middle", "riemann_left" or "riemann_right".
    """
    import torch
    from captum.attr import IntegratedGradients

    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size

    if n_steps < 2:
        raise RequestError(f"integrated-gradients, n_steps: got {n_steps}, expected 2 or more")
    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model) // 4)
    attribution = IntegratedGradients(model)
    maps = []
    for images, targets in zip(batch.images.split(chunk), batch.targets.split(chunk), strict=True):
        parts = attribution.attribute(
            images, baselines=0.0, target=targets, n_steps=n_steps, method=method, internal_batch_size=chunk
        )
        maps.append(parts.detach().sum(1))
    return torch.cat(maps)
