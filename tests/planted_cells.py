"""Networks that read the means of cells, and batches for them: what each cell tells is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from faithmap import registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.explaining import bind
from faithmap.models import Model


def explain(name: str, model: Model, batch: Batch, **params: Any) -> torch.Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch.select(range(len(batch))))


class Sensor(nn.Module):
    """Features are cell means of the channels; a linear head, or a small network, reads the cells."""

    def __init__(self, head: nn.Module, cell: int = 4) -> None:
        super().__init__()
        self.body = nn.AvgPool2d(cell)
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(images).flatten(1))
        return logits


def sensor(head: nn.Module, side: int = 16, cell: int = 4) -> Model:
    return Model(Sensor(head, cell), mean=0.0, std=1.0, input_size=side, name="sensor", target_layer="body")


def planted(gain: float = 20.0) -> Model:
    """Class 1 is seen in the red of the four cells in the upper left, and nowhere else."""
    head = nn.Linear(3 * 16, 2)
    weight = torch.zeros(2, 3, 4, 4)
    weight[1, 0, :2, :2] = gain / 4
    head.weight.data = weight.flatten(1)
    head.bias.data = torch.tensor([0.0, -gain / 2])
    return sensor(head)


def batch_of(model: Model, images: torch.Tensor, target: int = 1) -> Batch:
    ids = tuple(f"image-{i}" for i in range(len(images)))
    return Batch(images, torch.full((len(images),), target), ids, Context(model, images))


def bright(count: int = 2, side: int = 16) -> torch.Tensor:
    """Noise around light grey."""
    return 0.8 + 0.2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
