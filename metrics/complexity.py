"""How concentrated a map is: its Gini index, its entropy, and the area that it takes up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored
from faithmap.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model

PARTS = ("absolute", "positive")


@metric(
    version=1,
    source="Chalasani et al. 2020 (arXiv:1810.06583): sparseness by the Gini index; Bhatt et al. 2020 "
    "(arXiv:2005.00631): complexity as entropy; effective area: faithmap",
    scores={"gini": "higher", "entropy": "lower", "effective_area": "none"},
    bounds={"gini": (0, 100), "entropy": (0, 100), "effective_area": (0, 100)},
    default=False,
)
def complexity(model: Model, batch: Batch, maps: Maps, *, part: str = "absolute") -> dict[str, Values]:
    """How few pixels a map spreads its relevance over, whatever they are.

    With a = |map| by pixel, p = a / sum(a) and N = H W pixels, the scores of a map are, in percent:

    - `gini` = 100 sum_k (2 k - N - 1) a_(k) / (N sum(a)), a_(k) being sorted upwards: 0 for a constant
      map, 100 (1 - 1/N) for a single pixel. The papers call sparse maps better, so higher is.
    - `entropy` = 100 H(p) / log N, H(p) = -sum p log p: the entropy of Bhatt et al. as a share of the
      largest there can be, so that it does not grow with the image. 100 for a constant map, 0 for a
      single pixel; lower is better there.
    - `effective_area` = 100 (sum a)^2 / (N sum(a^2)): a map that is one value on a share of the pixels
      and zero elsewhere has that share. It has no direction: how large an explanation should be is the
      model's matter. Unlike the drop's `area` it does not change with brightness.

    None of them looks at the model. A map that lights one pixel at random is as good as can be, and a
    coarse grid bounds how concentrated a map may get: they describe a map beside the scores that judge
    it, never alone. They do not change when a map is multiplied by a number, and not where its pixels
    are. Maps are seen as all metrics see them, on the run's grid.

    Args:
        model: not used.
        batch: not used.
        maps: (B, H, W), raw signs.
        part: "absolute", as published: negative relevance counts like positive; "positive": only what
            is above zero counts, as for the energy. Maps without any are then scored as empty maps.

    Raises:
        RequestError: there is no such part.
    """
    if part not in PARTS:
        raise RequestError(f"metric 'complexity', parameter 'part': got {part!r}; {nearest(part, PARTS)}")
    flat = maps.flatten(1).double()
    amounts = flat.abs() if part == "absolute" else flat.clamp_min(0)
    # Only shares count; sums of very small or very large maps stay in range this way.
    peak = amounts.amax(1, keepdim=True)
    amounts = amounts / peak.masked_fill(peak == 0, 1)
    empty = (peak.flatten() == 0).nonzero().flatten().tolist()

    def of(values: Tensor) -> Scored:
        return Scored(values.masked_fill(peak.flatten() == 0, torch.nan), empty=empty)

    return {
        "gini": of(100 * gini(amounts)),
        "entropy": of(100 * entropy(amounts)),
        "effective_area": of(100 * effective_area(amounts)),
    }


def gini(amounts: Tensor) -> Tensor:
    """The Gini index (B,) in [0, 1) of amounts (B, N) that are not negative."""
    count = amounts.shape[1]
    order = torch.arange(1, count + 1, dtype=amounts.dtype, device=amounts.device)
    weighted = (2 * order - count - 1) * amounts.sort(1).values
    # Rounding of a constant map must not fall below zero.
    return (weighted.sum(1) / (count * amounts.sum(1))).clamp_min(0)


def entropy(amounts: Tensor) -> Tensor:
    """The entropy (B,) of the amounts' shares, as a share of its largest value log N."""
    shares = amounts / amounts.sum(1, keepdim=True)
    largest = torch.tensor(float(amounts.shape[1]), dtype=amounts.dtype, device=amounts.device).log()
    found: Tensor = torch.special.entr(shares).sum(1) / largest
    return found.clamp(0, 1)


def effective_area(amounts: Tensor) -> Tensor:
    """(sum a)^2 / (N sum a^2), (B,) in (0, 1]: the share of pixels that equal amounts would take up."""
    return (amounts.sum(1).square() / (amounts.shape[1] * amounts.square().sum(1))).clamp_max(1)
