"""Positive and negative perturbation AUC and their difference (Chefer et al. 2021; SCAN)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import metric
from faithmap.batch import Scored
from faithmap.perturb import tied_share
from faithmap.regions import blanked
from faithmap.removal import (
    by_reading,
    curve_area,
    removal_curves,
    steps_to,
    without_labels,
)

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

DIRECTIONS: dict[str, Direction] = {"pos_auc": "lower", "neg_auc": "higher", "auc_d": "higher"}
SCORES = by_reading(DIRECTIONS)


@metric(
    version=1,
    source="Chefer et al. 2021, sec. 4 (perturbation tests); SCAN, AUC-D = negative - positive AUC",
    scores={**SCORES, "ties": "none"},
    bounds={**{name: (-90 if name.startswith("auc_d") else 0, 90) for name in SCORES}, "ties": (0, 100)},
    calibrate=True,
)
def perturbation(
    model: Model, batch: Batch, maps: Maps, *, fill: str = "black", span: float = 0.9, steps: int = 9
) -> dict[str, Values]:
    """Area under the model's curve while pixels are removed, most or least relevant first.

    At shares s = 0, .1, ..., .9 the k = int(H W s) pixels that rank highest (positive curve) or
    lowest (negative curve) are replaced by the fill, always from the clean image. One pass of logits
    gives three curves: agreement (the argmax equals the clean prediction), label (it equals the
    label) and the probability of the target. AUC = 100 x trapezoid over the shares, not divided
    by the span: percent, 0 to 90. `auc_d` = `neg_auc` - `pos_auc`, -90 to 90, zero in the mean for a
    map that knows nothing. `ties` is the share of pixels in percent whose value another pixel has
    too: tied pixels are ordered by a random field that is the same for every map of an image.

    Args:
        model: the model.
        batch: images with targets; labels for the label curves (-1 where unknown).
        maps: (B, H, W) ranked as they are, any sign.
        fill: "black", "mean", "blur" or "noisy-linear".
        span: the last share removed; 0.9 as published, 1.0 to remove everything.
        steps: how many equal steps lead there.

    Returns:
        Every score in percent (B,), with the curves (B, steps + 1) in [0, 1] beside the areas.
        The scores of the label curve are left out where the batch has no labels.
    """
    shares = steps_to("perturbation", span, steps)
    scores: dict[str, Values] = {}
    for reading, curves in removal_curves(model, batch, [maps], fill, shares).items():
        scores |= _areas(curves, curve_area(curves, shares), reading, batch)
    scores["ties"] = 100 * tied_share(maps)
    return scores


def _areas(curves: Tensor, area: Tensor, reading: str, batch: Batch) -> dict[str, Values]:
    reasons = without_labels(reading, batch)
    if reasons:
        area = blanked(area, reasons)
    return {
        f"pos_auc{reading}": Scored(area[0], curves[0], reasons),
        f"neg_auc{reading}": Scored(area[1], curves[1], reasons),
        f"auc_d{reading}": Scored(area[1] - area[0], reasons=reasons),
    }
