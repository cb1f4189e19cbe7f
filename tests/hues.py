"""Images of few colours and a network that reads them pixel by pixel: mosaics whose parts are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.models import Model
from faithmap.pool import Pool
from faithmap.records import Sample

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1], [0.1, 0.9, 0.9]])
HEIGHT, WIDTH = 8, 12


class Hues(nn.Module):
    """A logit for each colour: by how much its share of the pixels counts. Of any size, or of one alone."""

    def __init__(self, size: tuple[int, int] | None = None, weight: float = 8.0) -> None:
        super().__init__()
        self.evidence = Closest()
        self.size, self.weight = size, weight

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            raise ValueError(f"made for {self.size}")
        logits: Tensor = self.weight * self.evidence(images).mean((2, 3))
        return logits


class Closest(nn.Module):
    """Features (B, 5, H, W): how like each colour every pixel is."""

    def forward(self, images: Tensor) -> Tensor:
        apart = (images[:, None] - COLOURS.to(images)[None, :, :, None, None]).abs().sum(2)
        return (1 - 2 * apart).clamp_min(0)  # none of the colours is at all like another


def hue_model(fixed: bool = False, weight: float = 8.0) -> Model:
    network = Hues((HEIGHT, WIDTH) if fixed else None, weight)
    return Model(
        network, mean=0.0, std=1.0, input_size=(HEIGHT, WIDTH), target_layer="evidence", family="cnn",
        name="hues",
    )  # fmt: skip


def hue_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 8, 12) of a colour each, with noise, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(COLOURS)
    noise = 0.1 * torch.rand(count, 3, HEIGHT, WIDTH, generator=generator)
    return (COLOURS[labels][:, :, None, None] + noise - 0.05).clamp(0, 1), labels


def evidence_of(model: Model, batch: Batch) -> Tensor:
    """The evidence of the class explained, pixel by pixel: the truth."""
    with torch.no_grad():
        found: Tensor = Closest()(batch.images)
    return found[torch.arange(len(batch)), batch.targets]


def hue_batch(model: Model, count: int = 10, pool: Pool | None = None, **known: object) -> Batch:
    """The first images as a batch, in a pool of all twenty."""
    images, labels = hue_images(20)
    samples = [Sample(f"hue-{i}", images[i], int(labels[i])) for i in range(20)]
    fields: dict[str, object] = {
        "images": images[:count],
        "targets": labels[:count],
        "labels": labels[:count],
        "ids": tuple(sample.id for sample in samples[:count]),
        "context": Context(model, images[:count]),
        "explainer": evidence_of,
        "pool": pool or Pool(samples, model, split=lambda _: ""),
    }
    return Batch(**{**fields, **known})  # type: ignore[arg-type]
