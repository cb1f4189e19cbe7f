"""A network of which each channel's part in each class is known, and images that hold its features."""

from __future__ import annotations

from typing import Any

import torch
from conftest import inside
from torch import nn

from faithmap import registry, streams
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.cuts import cut_at, tail_of
from faithmap.models import Model
from faithmap.streams import Gates

#: 3 x 5 x 5 channels of 8 x 8 cells are the pixels of an image of 40 x 40.
FACTOR, GRID = 5, 8
CHANNELS = 3 * FACTOR**2
CLASSES, EACH = 5, 4
#: Four channels for each class, then four that speak against all but the last, then ten loud ones.
CONTRA = slice(CLASSES * EACH, CLASSES * EACH + 4)
LOUD = slice(CONTRA.stop, CONTRA.stop + 10)


def evidence(target: int) -> slice:
    """The channels that speak for a class."""
    return slice(target * EACH, (target + 1) * EACH)


class Pooled(nn.Module):
    """Pixels taken apart into channels, mean pooling, and one linear layer."""

    def __init__(self, weight: torch.Tensor, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.PixelUnshuffle(FACTOR)
        self.tail = tail or nn.Identity()
        self.fc = nn.Linear(CHANNELS, CLASSES, bias=False)
        self.fc.weight.data = weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.tail(self.body(images)).mean((2, 3)))
        return logits


def planted(gain: float = 12.0, tail: nn.Module | None = None) -> Model:
    """Each class is seen in its four channels; four more speak against it; nothing else counts."""
    weight = torch.zeros(CLASSES, CHANNELS)
    for target in range(CLASSES):
        weight[target, evidence(target)] = gain
    weight[:-1, CONTRA] = -gain / 2
    side = FACTOR * GRID
    return Model(
        Pooled(weight, tail), mean=0.0, std=1.0, input_size=side, name="planted channels", target_layer="body"
    )


def planted_batch(model: Model, count: int, seed: int = 0, present: tuple[int, ...] = ()) -> Batch:
    """Images of the classes 0, 1, ... in turn, or all of the classes named; masks show where each is."""
    generator = torch.Generator().manual_seed(seed)
    features = 0.1 * torch.rand(count, CHANNELS, GRID, GRID, generator=generator)
    features[:, LOUD] = torch.rand(count, 10, GRID, GRID, generator=generator)
    targets = torch.arange(count) % (CLASSES - 1)
    masks = torch.zeros(count, GRID, GRID, dtype=torch.bool)
    for i in range(count):
        for target in present or (int(targets[i]),):
            top, left = torch.randint(0, GRID - 3, (2,), generator=generator).tolist()
            region = (slice(top, top + 4), slice(left, left + 4))
            block = 0.6 + 0.4 * torch.rand(EACH, 4, 4, generator=generator)
            features[i, evidence(target)][:, region[0], region[1]] = block
            masks[i][region] = True
        if i % 2:
            features[i, CONTRA, :2] = 0.8
    images = nn.functional.pixel_shuffle(features, FACTOR)
    if present:
        targets = torch.full((count,), present[0])
    enlarged = masks.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)
    ids = tuple(f"image-{i}" for i in range(count))
    return Batch(images, targets, ids, Context(model, images), labels=targets, masks=enlarged)


def fitted(model: Model, batch: Batch, **given: Any) -> tuple[streams.Features, Gates]:
    """Features and gates as the explainer finds them."""
    params = {**registry.get("explainer", "infocam").parameters, **given}
    cut = cut_at(model, params["layer"])
    chosen = inside("infocam")._settle(model, cut, params)
    features = streams.with_noise(
        model, cut, batch.context.outputs(cut.layer), batch.targets, params["statistics"],
        min_std=params["min_std"], min_active=params["min_active"],
    )  # fmt: skip
    generators = [batch.generator(i) for i in range(len(batch))]
    gates = inside("infocam")._fitted(tail_of(model, cut), features, generators, chosen, 4000)
    return features, gates
