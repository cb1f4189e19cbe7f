"""Meaningful perturbation: a learned mask (Fong and Vedaldi 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: Shares of the shorter side, published in pixels of 224: the blur that deletes, the blur of the mask,
#: the steps in which the first mask's radius grows, and the blur of its rim.
DELETING, SMOOTHING, STEP, RIM = 10 / 224, 5 / 224, 5 / 224, 10 / 224
#: The radii tried for the first mask: 0, 5, ..., 170 pixels of 224.
RADII = 35


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """One image an iteration, and one for each radius of the first mask."""
    return float(params.get("iterations", 300)) + RADII


def _backwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most one image an iteration: a probability that is exactly 0 or 1 has no gradient."""
    return float(params.get("iterations", 300))


@explainer(
    version=1, source="Fong and Vedaldi 2017 (arXiv:1704.03296), the deletion game", forwards=_forwards,
    backwards=_backwards, check_params={"iterations": 8}, exact_cost=False, iterative=True,
)  # fmt: skip
def mask(
    model: Model,
    batch: Batch,
    *,
    iterations: int = 300,
    rate: float = 0.1,
    grid: int = 28,
    area: float = 1e-4,
    variation: float = 1e-2,
    power: float = 3.0,
    jitter: int = 4,
) -> Maps:
    """What must be blurred for the class to vanish: one minus a learned mask.

    The mask m in [0, 1], 1 where the image is kept, minimises area sum |1 - m| + variation
    sum (|dm/dx|^power + |dm/dy|^power) + the target's probability on m x + (1 - m) blur(x), by Adam,
    clipped to [0, 1] after each step, in expectation over small shifts of the image under the mask.
    It is learned on a coarse grid, enlarged and smoothed. It begins as the smallest centred disc
    that takes away 99% of what blurring the whole image takes away of the probability. Shape
    (B, H, W); range [0, 1]; 1 where all evidence is deleted.

    Published: 300 iterations at rate 0.1, area 1e-4, variation 1e-2, power 3, a grid of 28x28,
    blurs of 10 and 5 pixels at 224, shifts of 0 to 3 pixels, and the disc, whose radii and blurred
    rim are those of the authors' code. Lengths scale with the image's shorter side. The sums run
    over the coarse grid; the power is taken along each axis as in the objective, where the authors' code
    takes it of the gradient's length. Shifts centre on zero (-2 to 1 pixels) and continue the
    border, where the authors cut from a larger image. All images of a batch are learned at once:
    Adam works entry by entry.

    Args:
        model: the model.
        batch: images with targets.
        iterations: steps of Adam, 1 or more.
        rate: its learning rate, above 0.
        grid: cells of the mask along the image's shorter side, 2 or more.
        area: weight of the area deleted, 0 or more.
        variation: weight of the mask's variation, 0 or more.
        power: the exponent of differences of neighbours, 1 or more.
        jitter: number of shifts along each axis, 1 for none.
    """
    import torch

    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size

    if min(iterations, jitter) < 1 or rate <= 0 or grid < 2 or min(area, variation) < 0 or power < 1:
        raise RequestError(
            f"mask: got iterations {iterations}, rate {rate}, grid {grid}, area {area}, "
            f"variation {variation}, power {power} and jitter {jitter}; expected iterations and jitter >= 1, "
            "rate > 0, grid >= 2, area and variation >= 0, power >= 1"
        )
    shifts = [
        torch.randint(0, jitter, (iterations, 2), generator=batch.generator(i)) - jitter // 2
        for i in range(len(batch))
    ]
    maps = []
    # A pass with a graph holds about four times what a pass without one does.
    for part in torch.arange(len(batch)).split(max(1, chunk_size(model, batch.size) // 4)):
        game = Deletion(model, batch.images[part], batch.targets[part], jitter)
        low = game.first_mask(grid)
        learned = _learn(
            game, low, torch.stack([shifts[i] for i in part.tolist()], 1), rate, area, variation, power
        )
        maps.append(1 - game.whole(learned))
    return torch.cat(maps)


def _learn(
    game: Deletion, low: Tensor, shifts: Tensor, rate: float, area: float, variation: float, power: float
) -> Tensor:
    """Masks (B, h, w) after one step of Adam for each of the shifts (iterations, B, 2)."""
    import torch

    low = low.detach().clone().requires_grad_()
    adam = torch.optim.Adam([low], lr=rate)
    for shift in shifts:
        with torch.enable_grad():  # whoever asks may have switched gradients off
            # Sums over the batch: the gradient of an image's mask is that of its own loss.
            loss = area * (1 - low).abs().sum() + variation * _variation(low, power)
            loss = loss + game.probabilities(game.whole(low), shift).sum()
            (low.grad,) = torch.autograd.grad(loss, low)
        adam.step()
        low.data.clamp_(0, 1)
    return low.detach()


def _variation(low: Tensor, power: float) -> Tensor:
    """Sum over all neighbours of masks (B, h, w) of their difference's power."""
    down, across = low.diff(dim=1).abs(), low.diff(dim=2).abs()
    return down.pow(power).sum() + across.pow(power).sum()


class Deletion:
    """The deletion game on some images: what a mask leaves, and the target's probability on it.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1].
        targets: (B,) explained classes.
        jitter: number of shifts along each axis.
    """

    def __init__(self, model: Model, images: Tensor, targets: Tensor, jitter: int = 1) -> None:
        from torch.nn import functional as F

        from faithmap.perturb import gaussian_blur

        self.model, self.targets = model, targets
        self.size = (int(images.shape[2]), int(images.shape[3]))
        self._margin = jitter // 2
        blurred = gaussian_blur(images, DELETING * min(self.size))
        margins = (self._margin,) * 4
        self._kept, self._deleted = (F.pad(part, margins, mode="replicate") for part in (images, blurred))

    def whole(self, low: Tensor) -> Tensor:
        """Coarse masks (B, h, w) enlarged to the image, cell by cell, and smoothed: (B, H, W)."""
        from torch.nn import functional as F

        from faithmap.perturb import gaussian_blur

        large = F.interpolate(low.unsqueeze(1), size=self.size, mode="nearest-exact")
        return gaussian_blur(large, SMOOTHING * min(self.size)).squeeze(1)

    def probabilities(
        self, masks: Tensor, shifts: Tensor | None = None, which: Tensor | slice = slice(None)
    ) -> Tensor:
        """The targets' probabilities (n,) under masks (n, H, W).

        Args:
            masks: one for each image looked at.
            shifts: (n, 2), how many pixels the images are shifted up and to the left.
            which: positions (n,) of those images; by default all.
        """
        from faithmap.cam import read_scores

        masks = masks.unsqueeze(1)
        kept, deleted = (self._cut(padded[which], shifts) for padded in (self._kept, self._deleted))
        logits = self.model(masks * kept + (1 - masks) * deleted)
        return read_scores(logits, self.targets[which], "probability")

    def _cut(self, padded: Tensor, shifts: Tensor | None) -> Tensor:
        import torch

        height, width = self.size
        starts = [(self._margin, self._margin)] * len(padded)
        if shifts is not None:
            starts = [(self._margin + down, self._margin + across) for down, across in shifts.tolist()]
        return torch.stack(
            [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, starts, strict=True)]
        )

    def first_mask(self, grid: int) -> Tensor:
        """Coarse masks (B, h, w): the smallest disc that deletes 99% of what blurring all deletes."""
        import torch
        from torch.nn import functional as F

        from faithmap.perturb import chunk_size

        discs, count = _discs(self.size).to(self._kept.device), len(self.targets)
        pairs = torch.arange(len(discs) * count, device=discs.device).split(chunk_size(self.model, self.size))
        with torch.no_grad():
            scores = torch.cat(
                [self.probabilities(discs[part // count], which=part % count) for part in pairs]
            )
        scores = scores.view(len(discs), count)
        # Radius 0 leaves the whole image, the largest disc nothing of it.
        change = scores[0] - scores[-1]
        left = (scores - scores[-1]) / torch.where(change == 0, 1, change)
        enough = (left < 0.01) & (change != 0)
        enough[-1] = True  # where blurring the image changes nothing, nothing less is enough
        chosen = discs[enough.int().argmax(0)]
        shorter = min(self.size)
        shape = [max(1, round(grid * side / shorter)) for side in self.size]
        return F.interpolate(chosen.unsqueeze(1), size=shape, mode="nearest-exact").squeeze(1)


def _discs(size: tuple[int, int]) -> Tensor:
    """Masks (RADII, H, W) that delete a centred disc with a blurred rim, the radius growing from 0."""
    import torch

    from faithmap.perturb import gaussian_blur

    height, width = size
    y = torch.arange(height).view(-1, 1) + 0.5 - height / 2
    x = torch.arange(width).view(1, -1) + 0.5 - width / 2
    radii = torch.arange(RADII) * STEP * math.hypot(height, width) / math.sqrt(2)
    inside = (y**2 + x**2).sqrt() < radii.view(-1, 1, 1)
    return 1 - gaussian_blur(inside.float().unsqueeze(1), RIM * min(size)).squeeze(1)
