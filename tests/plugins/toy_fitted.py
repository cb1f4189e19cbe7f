"""An explainer that must be fitted: it learns a colour, by gradient steps that a kill may interrupt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from faithmap import Batch, Model, explainer


@explainer(
    version=1, source="a test", forwards=0, backwards=0, class_specific=False,
    fit_params={"start"}, check_fit={"epochs": 2, "batch_size": 2},
)  # fmt: skip
class ToyFitted:
    """How far each pixel is from a colour that was learnt."""

    def __init__(
        self, *, start: float = 0.0, power: float = 2.0, learn: bool = True, dim: float = 0.0
    ) -> None:
        self.start, self.power, self.learn, self.dim = start, power, learn, dim
        self.colour = torch.full((3,), start)

    @property
    def wants_fit(self) -> bool:
        return self.learn

    def fit(
        self,
        model: Model,
        data: Any,
        session: Any,
        *,
        epochs: int = 3,
        batch_size: int = 4,
        rate: float = 0.1,
    ) -> dict[str, Tensor]:
        """Gradient descent with momentum towards the mean colour."""
        steps = data.steps(batch_size)
        fresh = {"colour": torch.full((3,), self.start), "momentum": torch.zeros(3), "done": 0}
        state: dict[str, Any] = session.resume() or fresh
        for epoch in range(state["done"] // steps, epochs):
            for images, _ in data.batches(batch_size, epoch, start=state["done"] - epoch * steps):
                state["done"] += 1
                if not len(images):
                    continue
                gap = state["colour"].to(images.device) - images.mean((0, 2, 3))
                state["momentum"] = 0.5 * state["momentum"] + gap.cpu()
                state["colour"] = state["colour"] - rate * state["momentum"]
                session.report(state["done"], epochs * steps, {"loss": float(gap.square().sum())})
                session.checkpoint(state.copy)
        return {"colour": state["colour"]}

    def load(self, model: Model, tensors: dict[str, Tensor]) -> None:
        """Keep the colour."""
        self.colour = tensors["colour"].to(model.device)

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """The distance to the colour, to a power."""
        batch.note(batch.images.mean((1, 2, 3)) < self.dim, "the image is dim")
        gap = batch.images - self.colour.to(batch.images.device).view(1, 3, 1, 1)
        return torch.linalg.vector_norm(gap, dim=1).pow(self.power)
