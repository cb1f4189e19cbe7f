"""An explainer that lives in a package of its own."""

import torch

from faithmap import Batch, Model, explainer


@explainer(version=1, source="blurmap 1.0", forwards=1, backwards=1)
def blurred_gradient(model: Model, batch: Batch, *, width: int = 5) -> torch.Tensor:
    """Gradient times image, averaged over squares of an odd width."""
    images = batch.images.clone().requires_grad_()
    with torch.enable_grad():
        scores = model(images).gather(1, batch.targets[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    product = (gradient * batch.images).sum(1, keepdim=True)
    return torch.nn.functional.avg_pool2d(product, width, stride=1, padding=width // 2)[:, 0]
