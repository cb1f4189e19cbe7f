"""The energy-based pointing game: how much of a map's positive relevance lies on the object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import metric
from faithmap.batch import Scored
from faithmap.regions import blanked, judged_region, left_out

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model


@metric(
    version=1,
    source="Wang et al. 2020 (Score-CAM), sec. 4.3; with masks the relevance mass accuracy of Arras et al. "
    "2022",
    scores={"energy_pg": "higher", "object_share": "none"},
    needs={"region"},
    fallback={"energy_pg": "object_share"},
    bounds={"energy_pg": (0, 100), "object_share": (0, 100)},
    map_free={"object_share"},
)
def energy_pointing_game(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    region: str = "auto",
    only_correct: bool = True,
    least_share: float = 0.02,
    most_share: float = 0.5,
) -> dict[str, Values]:
    """Share of the positive relevance that falls on the object.

    `energy_pg` = 100 <S, M> / <S, 1>, percent, 0 to 100, where S is the map after ReLU (no min-max)
    and M the object: its mask, or the union of its boxes. A constant map scores `object_share` =
    100 |M| / (HW), the level of a map that knows nothing, which also stands in for maps without
    positive relevance. Pixels that a mask leaves open, such as VOC's void (255), are in neither sum
    nor in HW. Both are stored for the same images whatever the method: those where the map explains
    the label, the model is right and the object is neither too small nor too large. The score does
    not change when a map is multiplied by a positive number.

    Args:
        model: the model.
        batch: images with masks or boxes.
        maps: (B, H, W), raw signs.
        region: "mask", "box" (the union of the boxes), or "auto": the mask where there are masks.
        only_correct: score only images whose prediction is the label.
        least_share: smallest share of the image, in [0, 1], that an object may cover.
        most_share: largest share.
    """
    mask, known, share = judged_region(batch, region)
    reasons = left_out(batch, share, only_correct, least_share, most_share)
    positive = (maps.clamp_min(0).double() * known).flatten(1)
    # Only the ratio counts; sums of very small or very large maps stay in range this way.
    peak = positive.amax(1, keepdim=True)
    positive = positive / peak.masked_fill(peak == 0, 1)
    energy = 100 * (positive * mask.flatten(1)).sum(1) / positive.sum(1)
    return {
        "energy_pg": Scored(
            blanked(energy, reasons),
            reasons=reasons,
            empty=(peak.flatten() == 0).nonzero().flatten().tolist(),
        ),
        "object_share": Scored(blanked(100 * share, reasons), reasons=reasons),
    }
