"""KernelSHAP on superpixels (Lundberg and Lee 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: the coalitions, all superpixels and none of them."""
    return 2.0 + float(params.get("n_samples", 2048))


@explainer(
    version=1, source="Lundberg and Lee 2017 (arXiv:1705.07874), theorem 2 (Shapley kernel)",
    forwards=_forwards, backwards=0, check_params={"n_samples": 64, "segments": 12},
    exact_cost=False,
)  # fmt: skip
def kernel_shap(
    model: Model,
    batch: Batch,
    *,
    n_samples: int = 2048,
    segments: int = 50,
    compactness: float = 20.0,
    sigma: float = 1.0,
    fill: str = "mean",
    score: str = "logit",
) -> Maps:
    """Shapley values of the superpixels, by weighted least squares over coalitions.

    The game's value v(z) is the target's score of the image that shows the superpixels z alone. The
    values phi minimise sum_z pi(z) (v(z) - v(0) - z phi)^2 with pi(z) = (M - 1) / (C(M, |z|) |z|
    (M - |z|)), M superpixels, and add up to v(1) - v(0) exactly. Shape (B, H, W); signed; unit:
    that of the score. A pixel holds the value of its superpixel, undivided.

    Where 2^M - 2 coalitions are within the budget all are taken and the values are exact. Else
    whole sizes of coalitions are taken, the smallest and largest first, as long as the budget has a
    draw for each of their members, and the rest of it is drawn by pi, each coalition together with
    its complement. A budget too small to determine all values gives the smallest ones that fit.

    Published: the authors' package takes 2048 + 2 M coalitions and counts probabilities or whatever
    the model returns; captum takes 25. The paper leaves open what a missing part of an image is; in
    the authors' example it is the image's mean colour. The logit is the rule for maps that add up
    here. captum's KernelShap is not used: one image at a time, and from torch's global random state.

    Args:
        model: the model.
        batch: images with targets.
        n_samples: coalitions an image at most, beside all and none; 2 or more.
        segments: roughly how many superpixels an image is cut into, 2 or more.
        compactness: SLIC's weight of nearness against colour, above 0.
        sigma: smoothing before SLIC, in pixels.
        fill: what a hidden superpixel shows: "mean" (the image's mean colour), "segment" (its own
            mean colour), "black" or "blur".
        score: "logit" or "probability" (softmax over the classes).
    """
    import torch

    from faithmap.errors import RequestError
    from faithmap.superpixels import coalition_scores, constrained_least_squares, superpixels

    if n_samples < 2:
        raise RequestError(f"kernel-shap, n_samples: got {n_samples}, expected 2 or more")
    regions = superpixels(batch.images, segments, compactness=compactness, sigma=sigma)
    drawn = [_coalitions(count, n_samples, batch.generator(i)) for i, count in enumerate(regions.counts)]
    played = [torch.cat([_ends(coalitions.shape[1]), coalitions]) for coalitions, _ in drawn]
    scores = coalition_scores(
        model, batch.images, batch.targets, regions, played, fill=fill, score=score
    )  # fmt: skip
    maps = []
    for (coalitions, weights), values in zip(drawn, scores, strict=True):
        none, everything = float(values[0]), float(values[1])
        maps.append(constrained_least_squares(coalitions, values[2:] - none, weights, everything - none))
    return regions.paint(maps)


def _ends(count: int) -> Tensor:
    """Bool (2, count): no superpixel, all of them."""
    import torch

    return torch.tensor([[False], [True]]).expand(2, count)


def _coalitions(count: int, budget: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coalitions bool (n, count), n <= budget, and their weights (n,) in the regression."""
    import torch

    # The kernel's mass of all coalitions of a size, and of those not yet dealt with.
    mass = {size: (count - 1) / (size * (count - size)) for size in range(1, count)}
    everything = 2**count - 2 <= budget
    parts, weights = [], []
    for small in range(1, count // 2 + 1):
        sizes = {small, count - small}
        members = len(sizes) * math.comb(count, small)
        share = sum(mass[size] for size in sizes) / sum(mass.values())
        if budget * share < members and not everything:
            break
        for size in sorted(sizes):
            parts.append(_all_of(count, size))
            weights.append(
                torch.full((len(parts[-1]),), mass.pop(size) / len(parts[-1]), dtype=torch.float64)
            )
        budget -= members
    pairs = budget // 2
    if mass and pairs:
        half = _drawn(count, list(mass), list(mass.values()), pairs, generator)
        parts += [half, ~half]
        weights.append(torch.full((2 * pairs,), sum(mass.values()) / (2 * pairs), dtype=torch.float64))
    return torch.cat(parts), torch.cat(weights)


def _all_of(count: int, size: int) -> Tensor:
    """Bool (C(count, size), count): every coalition of a size."""
    import torch

    members = torch.tensor(list(combinations(range(count), size)))
    return torch.zeros(len(members), count, dtype=torch.bool).scatter_(1, members, True)


def _drawn(
    count: int, sizes: list[int], mass: list[float], number: int, generator: torch.Generator
) -> Tensor:
    """Bool (number, count): sizes drawn by their mass, then coalitions of the size with equal chance."""
    import torch

    chosen = torch.multinomial(torch.tensor(mass, dtype=torch.float64), number, True, generator=generator)
    order = torch.rand(number, count, generator=generator).argsort(1).argsort(1)
    return order < torch.tensor(sizes)[chosen].view(-1, 1)
