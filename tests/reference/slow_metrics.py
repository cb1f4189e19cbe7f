"""The metrics once more, from their definitions, one pixel and one image at a time.

The formulas are loops over plain numbers or a direct solve, in float64 where it matters; they share
nothing with the package but the model that classifies. At the end stand the models whose right answer
is known, and short ways to make batches of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap.batch import Batch, Scored, Values
from faithmap.context import Context
from faithmap.models import Model

Array = npt.NDArray[np.float64]
Classify = Callable[[Tensor], Tensor]


def removal_order(values: Tensor, ties: Tensor) -> list[int]:
    """Flat pixel indices in the order of removal: by value, then tie field, both falling, then index."""
    v, j = values.flatten().tolist(), ties.flatten().tolist()
    return sorted(range(len(v)), key=lambda pixel: (-v[pixel], -j[pixel], pixel))


def without(image: Tensor, pixels: Sequence[int], colour: Tensor) -> Tensor:
    """The image (3, H, W) with some whole pixels taken from `colour` (3, H, W)."""
    masked = image.clone()
    width = image.shape[2]
    for pixel in pixels:
        masked[:, pixel // width, pixel % width] = colour[:, pixel // width, pixel % width]
    return masked


def probability(classify: Classify, image: Tensor, target: int) -> float:
    """Softmax probability of the target for one image (3, H, W)."""
    logits = classify(image[None])[0].double()
    return float(torch.exp(logits[target] - torch.logsumexp(logits, 0)))


def trapezoid(ys: Sequence[float], xs: Sequence[float]) -> float:
    """Area under straight lines between points."""
    return sum((xs[i + 1] - xs[i]) * (ys[i] + ys[i + 1]) / 2 for i in range(len(xs) - 1))


def perturbation_curves(
    classify: Classify,
    image: Tensor,
    target: int,
    label: int,
    values: Tensor,
    ties: Tensor,
    colour: Tensor,
    shares: Sequence[float],
) -> dict[str, list[float]]:
    """Agreement, label and probability curve of one image while its highest values are removed."""
    order = removal_order(values, ties)
    clean = int(classify(image[None])[0].argmax())
    curves: dict[str, list[float]] = {"": [], "@label": [], "@probability": []}
    for share in shares:
        masked = without(image, order[: int(len(order) * share + 1e-9)], colour)
        decided = int(classify(masked[None])[0].argmax())
        curves[""].append(float(decided == clean))
        curves["@label"].append(float(decided == label))
        curves["@probability"].append(probability(classify, masked, target))
    return curves


def drop_view(values: Tensor) -> Array | None:
    """ReLU, then min-max; None where nothing is left to stretch."""
    positive = np.maximum(values.double().numpy(), 0.0)
    low, high = positive.min(), positive.max()
    return None if high == low else np.asarray((positive - low) / (high - low))


def equalised_view(values: Tensor, ties: Tensor) -> Array:
    """The rank of each pixel / (HW - 1): 1 for the pixel removed first, 0 for the last."""
    order = removal_order(values, ties)
    view = np.zeros(len(order))
    for position, pixel in enumerate(order):
        view[pixel] = 1 - position / (len(order) - 1)
    return view.reshape(values.shape)


def half_muted(view: Array, values: Tensor, ties: Tensor) -> Array:
    """The view with every pixel but the first half of the order of removal set to zero."""
    muted = np.zeros(view.size)
    order = removal_order(values, ties)
    for pixel in order[: len(order) // 2]:
        muted[pixel] = view.reshape(-1)[pixel]
    return muted.reshape(view.shape)


def seen_through(image: Tensor, view: Array, mean: Tensor | None) -> Tensor:
    """The image times a map: around black, or around a mean colour (3,)."""
    ground = torch.zeros(3) if mean is None else mean
    return (image - ground[:, None, None]) * torch.from_numpy(view).float() + ground[:, None, None]


def drop_scores(clean: float, kept: float, margin: float) -> dict[str, float]:
    """Drop, increase and gains of one image from its two probabilities."""
    won = kept > clean + margin
    return {
        "average_drop": 100 * max(0.0, clean - kept) / clean,
        "increase": 100.0 if won else 0.0,
        "average_gain": 100 * max(0.0, kept - clean) / (1 - clean),
        "scan_inc": 100 * (kept - clean) if won else float("nan"),
    }


def union_of_boxes(boxes: Sequence[Sequence[float]], height: int, width: int) -> list[list[bool]]:
    """Pixels whose centre lies in any box `x0, y0, x1, y1`."""
    return [
        [any(x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes) for x in range(width)]
        for y in range(height)
    ]


def energy(
    values: Tensor, region: Sequence[Sequence[bool]], void: Sequence[Sequence[bool]] | None = None
) -> float:
    """Percent of the positive relevance inside a region, void pixels aside; NaN where there is none."""
    inside = total = 0.0
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            if void is not None and void[y][x]:
                continue
            total += max(0.0, value)
            inside += max(0.0, value) if region[y][x] else 0.0
    return 100 * inside / total if total else float("nan")


def pointing(
    values: Tensor,
    ties: Tensor,
    region: Sequence[Sequence[bool]],
    tolerance: float,
    void: Sequence[Sequence[bool]] | None = None,
) -> float:
    """100 where the highest pixel, void ones aside, is within the tolerance of the region, else 0."""
    height, width = values.shape
    order = removal_order(values, ties)
    pixel = next(p for p in order if void is None or not void[p // width][p % width])
    py, px = pixel // width, pixel % width
    near = any(
        region[y][x] and ((y - py) ** 2 + (x - px) ** 2) ** 0.5 <= tolerance
        for y in range(height)
        for x in range(width)
    )
    return 100.0 if near else 0.0


NEIGHBOURS = [
    (dy, dx, 1 / 12 if dy and dx else 1 / 6) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
]


def noisy_linear_exact(image: Tensor, keep: Tensor) -> Tensor:
    """ROAD's fill without noise, by a direct sparse solve: image (3, H, W), keep (H, W)."""
    height, width = keep.shape
    unknown = [(y, x) for y in range(height) for x in range(width) if not keep[y, x]]
    position = {pixel: i for i, pixel in enumerate(unknown)}
    matrix = sparse.lil_matrix((len(unknown), len(unknown)))
    right = np.zeros((len(unknown), 3))
    pixels = image.double().numpy()
    for i, (y, x) in enumerate(unknown):
        for dy, dx, weight in NEIGHBOURS:
            there = (y + dy, x + dx)
            if not (0 <= there[0] < height and 0 <= there[1] < width):
                continue
            matrix[i, i] += weight
            if there in position:
                matrix[i, position[there]] -= weight
            else:
                right[i] += weight * pixels[:, there[0], there[1]]
    filled = pixels.copy()
    solved = spsolve(matrix.tocsc(), right)
    for i, (y, x) in enumerate(unknown):
        filled[:, y, x] = solved[i]
    return torch.from_numpy(filled)


class PatchSum(nn.Module):
    """A model whose right answer is known: the first logit is a sum of independent patch scores.

    Logits are (sum over patches of weight x mean brightness of the patch, `bar`). Removing a patch
    (black) lowers the first logit by exactly its score, so the best order of removal is the order
    of the weights.
    """

    def __init__(self, weights: Tensor, bar: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Buffer(weights)
        self.bar = bar

    def forward(self, images: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), tuple(self.weights.shape)).squeeze(1)
        score = (means * self.weights).sum((1, 2))
        return torch.stack([score, torch.full_like(score, self.bar)], 1)


class Glance(nn.Module):
    """A small classifier without a layer of features: pooled colours through a bent linear map."""

    def __init__(self, classes: int = 4, cells: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.cells = cells
        self.first = nn.Buffer(torch.randn(3 * cells * cells, 12, generator=generator))
        self.second = nn.Buffer(torch.randn(12, classes, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(images, self.cells).flatten(1)
        logits: Tensor = torch.tanh(pooled @ self.first) @ self.second
        return logits


def model_of(network: nn.Module, side: int) -> Model:
    """Wrap a network that takes images in [0, 1] with a mild normalisation."""
    return Model(network, mean=[0.4, 0.5, 0.6], std=[0.3, 0.2, 0.25], input_size=side, family="cnn")


def batch_of(model: Model, images: Tensor, **known: Any) -> Batch:
    """A batch of images with the predictions as targets, and what else is known of them."""
    context = Context(model, images)
    return Batch(
        images=images,
        targets=known.pop("targets", context.logits.argmax(1)),
        ids=tuple(f"image-{i}" for i in range(len(images))),
        context=context,
        **known,
    )


def random_images(count: int, side: int, seed: int = 0) -> Tensor:
    """Images (count, 3, side, side) of uniform noise."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def values_of(scored: Values) -> Tensor:
    """The values (B,) of a score in float64."""
    return (scored.values if isinstance(scored, Scored) else scored).double()
