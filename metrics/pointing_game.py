"""The pointing game: does the highest pixel of a map hit the object?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored
from faithmap.perturb import removal_ranks
from faithmap.regions import blanked, judged_region, left_out

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model


@metric(
    version=1,
    source="Zhang et al. 2018 (Excitation Backprop), sec. 4.2: a hit within 15 pixels of the object",
    scores={"pointing": "higher"},
    needs={"region"},
    bounds={"pointing": (0, 100)},
)
def pointing_game(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    region: str = "auto",
    tolerance: float = 15.0,
    only_correct: bool = True,
    least_share: float = 0.02,
    most_share: float = 0.5,
) -> dict[str, Values]:
    """Hit or miss of the map's highest pixel.

    `pointing` = 100 where the highest pixel lies on the object or no farther than the tolerance
    from one of its pixels, else 0. Among tied pixels the first in the order of removal counts. Pixels
    that a mask leaves open, such as VOC's void (255), are passed over. Scored are the images of
    `energy-pointing-game`.

    Args:
        model: the model.
        batch: images with masks or boxes.
        maps: (B, H, W), raw signs.
        region: "mask", "box" (the union of the boxes), or "auto": the mask where there are masks.
        tolerance: distance in pixels, between pixel centres, at a shorter side of 224 pixels;
            scaled with the shorter side.
        only_correct: score only images whose prediction is the label.
        least_share: smallest share of the image, in [0, 1], that an object may cover.
        most_share: largest share.
    """
    mask, known, share = judged_region(batch, region)
    reasons = left_out(batch, share, only_correct, least_share, most_share)
    ranks = removal_ranks(maps, batch.ties())
    points = ranks.masked_fill(~known.flatten(1), ranks.shape[1]).argmin(1)
    reach = tolerance * min(batch.size) / 224
    hits = distance(mask, points) <= reach
    return {"pointing": Scored(blanked(100 * hits.double(), reasons), reasons=reasons)}


def distance(mask: Tensor, points: Tensor) -> Tensor:
    """Distances (B,) in pixels from pixels (B,), as flat indices, to the nearest pixel of masks (B, H, W).

    Infinite where a mask is empty.
    """
    height, width = mask.shape[1:]
    ys = torch.arange(height, device=mask.device).view(1, -1, 1) - (points // width).view(-1, 1, 1)
    xs = torch.arange(width, device=mask.device).view(1, 1, -1) - (points % width).view(-1, 1, 1)
    squared = (ys**2 + xs**2).double().masked_fill(~mask, torch.inf)
    return squared.flatten(1).amin(1).sqrt()
