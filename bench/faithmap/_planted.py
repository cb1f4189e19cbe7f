"""A classifier whose right answer is known by construction, and images for it: where metrics are tried.

The network counts coloured pixels: a colour's logit grows with each of them, the logit of the class
"grey" with each grey one. An image is grey noise with one coloured patch, so the patch is all the
evidence there is, and everything else speaks against it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.models import Model
from faithmap.pool import Pool
from faithmap.records import Sample
from faithmap.removal import noise_field

#: (height, width) in pixels, not square on purpose.
SIZE = (32, 40)
PATCH = 12
IMAGES = 6
#: Evidence of a whole patch, of the whole grey ground, and what "grey" has without any.
PATCH_LOGIT, GROUND_LOGIT, GREY_BIAS = 6.0, 2.0, 2.0
BRIGHT, DARK, GREY = 0.9, 0.1, 0.5


class Evidence(nn.Module):
    """Features (B, 4, H, W): how grey each pixel is, and how red, green and blue."""

    def forward(self, images: Tensor) -> Tensor:
        """A colour counts by how far its channel exceeds the mean of the other two."""
        colours = (1.5 * images - 0.5 * images.sum(1, keepdim=True)).clamp_min(0)
        return torch.cat([images.amin(1, keepdim=True), colours], 1)


class Counter(nn.Module):
    """Logits (B, 4) of grey, red, green and blue: sums of the features of all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.evidence = Evidence()
        ground = GREY * (SIZE[0] * SIZE[1] - PATCH**2)
        patch = (BRIGHT - DARK) * PATCH**2
        self.register_buffer("weights", torch.tensor([GROUND_LOGIT / ground, *([PATCH_LOGIT / patch] * 3)]))

    def forward(self, images: Tensor) -> Tensor:
        """Weigh and add the features up."""
        logits: Tensor = self.evidence(images).sum((2, 3)) * self.weights
        return logits + logits.new_tensor([GREY_BIAS, 0.0, 0.0, 0.0])


def planted_model() -> Model:
    """The counter, whose target layer is its evidence."""
    return Model(Counter(), mean=0.0, std=1.0, input_size=SIZE, target_layer="evidence", name="planted patch")


def planted_batch(model: Model, seed: int = 0) -> Batch:
    """Images with a patch each, labelled by its colour, with the patch as mask and box."""
    generator = torch.Generator().manual_seed(seed)
    ground = GREY + 0.4 * (torch.rand(IMAGES, 1, *SIZE, generator=generator) - 0.5)
    images = ground.expand(-1, 3, -1, -1).clone()
    masks = torch.zeros(IMAGES, *SIZE, dtype=torch.bool)
    boxes = []
    for i in range(IMAGES):
        # Never at the rim: there is ground on every side.
        top = int(torch.randint(1, SIZE[0] - PATCH - 4, (1,), generator=generator))
        left = int(torch.randint(1, SIZE[1] - PATCH, (1,), generator=generator))
        masks[i, top : top + PATCH, left : left + PATCH] = True
        boxes.append(torch.tensor([[left, top, left + PATCH, top + PATCH]], dtype=torch.float32))
        images[i, :, masks[i]] = DARK
        images[i, i % 3, masks[i]] = BRIGHT
    labels = torch.arange(IMAGES) % 3 + 1
    return Batch(
        images=images,
        targets=labels.clone(),
        ids=tuple(f"planted-{i}" for i in range(IMAGES)),
        context=Context(model, images),
        labels=labels,
        masks=masks,
        boxes=boxes,
        explainer=lambda _model, batch: _region(batch).float(),
        pool=_planted_pool(model, images, labels, ground),
    )


def _planted_pool(model: Model, images: Tensor, labels: Tensor, ground: Tensor) -> Pool:
    """The images, and one without a patch, which is grey: four classes."""
    grey = (ground.flip(0)[0]).expand(3, -1, -1)
    samples = [
        Sample(id=f"planted-{i}", image=image, label=label)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]
    return Pool([*samples, Sample(id="planted-grey", image=grey, label=0)], model, split=lambda _: "")


def planted_maps(batch: Batch) -> dict[str, Tensor]:
    """Maps (B, H, W) by name: "oracle", "inverse", four of "random", "signed" noise, and "tied"."""
    patch = _region(batch).float()
    generator = torch.Generator().manual_seed(1)
    maps = {"oracle": patch, "inverse": 1 - patch}
    for draw in range(4):
        maps[f"random {draw}"] = torch.rand(patch.shape, generator=generator)
    maps["signed"] = torch.randn(patch.shape, generator=generator)
    # The patch and all that lies below it: in memory the first of these is on the patch, the last is not.
    rows = patch.amax(2).cumsum(1) > PATCH - 0.5
    maps["tied"] = torch.maximum(patch, rows.float().unsqueeze(2).expand_as(patch))
    return maps


def turned(batch: Batch, maps: Tensor) -> tuple[Batch, Tensor]:
    """All turned by 180 degrees, ties and noise too: the same question in the reverse order of memory."""
    height, width = SIZE
    images = batch.images.flip(2, 3)
    boxes = None
    if batch.boxes is not None:
        corner = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = [(corner - box)[:, [2, 3, 0, 1]] for box in batch.boxes]
    other = Batch(
        images=images,
        targets=batch.targets,
        ids=batch.ids,
        context=Context(batch.context.model, images),
        labels=batch.labels,
        masks=None if batch.masks is None else batch.masks.flip(1, 2),
        boxes=boxes,
        seed=batch.seed,
        explainer=batch.explainer,
        cache={"ties": batch.ties().flip(1, 2), "fill noise": noise_field(batch).flip(2, 3)},
    )
    return other, maps.flip(1, 2)


def _region(batch: Batch) -> Tensor:
    region = batch.region()
    assert region is not None
    return region
