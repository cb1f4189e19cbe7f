"""Does a map explain its own class? It against the same method's map of the runner-up class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.again import explain_again, failures, for_classes
from faithmap.batch import Scored
from faithmap.regions import blanked
from faithmap.removal import curve_area, not_predicted, removal_curves, steps_to

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

SCORES: dict[str, Direction] = {"class_gap": "higher", "class_gap@probability": "higher"}


@metric(
    version=2,
    source="faithmap, docs/protocols.md: class gap; AUC-D as in SCAN, after Chefer et al. 2021",
    scores=SCORES,
    bounds=dict.fromkeys(SCORES, (-180, 180)),
    needs={"explainer"},
    default=False,
)
def class_gap(
    model: Model, batch: Batch, maps: Maps, *, fill: str = "black", span: float = 0.9, steps: int = 9
) -> dict[str, Values]:
    """AUC-D of the target's map less that of the runner-up class's map, both scored on the target.

    The runner-up is the class other than the target with the highest logit on the clean image. The
    explainer is called once more, for that class on the same image, and pixels are removed in the order
    of either map. The curves are those of `perturbation`, both of the target: agreement, which is the
    target's where that is the prediction and undefined elsewhere, and the probability of the target. With
    AUC-D = negative less positive area,

        class_gap = AUC-D(map of the target) - AUC-D(map of the runner-up),

    percent, -180 to 180: how much better the target's own map tells what the target rests on than a
    map of the same method that should tell what another class rests on.

    Zero has a meaning here. A map that does not depend on the class, declared so or not, scores 0 by
    construction, and no pass is spent on it; so do the nulls, whose zero therefore also stands in for
    maps that are empty or failed. It is a value and not a gap in the table: that a method cannot tell two
    classes apart is what the score is for. A high AUC-D with a gap near 0 is a map of what stands out,
    not of a class. Where two classes rest on the same pixels a small gap is right, so the score is
    read in comparison, never against its bounds.

    A constant map of the runner-up says "no evidence" and is ranked by the ties alone, like a null.
    Where it fails, the score fails.

    Args:
        model: the model.
        batch: images with targets, and the explainer that made the maps.
        maps: (B, H, W) ranked as they are, any sign.
        fill: "black", "mean", "blur" or "noisy-linear".
        span: the last share removed; as for `perturbation`.
        steps: how many equal steps lead there.

    Returns:
        Both readings in percent (B,); NaN with a reason for a model of a single class, and `class_gap` where
        another class than the predicted one is explained.

    Raises:
        RequestError: a parameter is wrong, or only maps were given.
    """
    shares = steps_to("class-gap", span, steps)
    if batch.logits.shape[1] < 2:
        reasons = ["the model has no second class"] * len(batch)
        return {name: Scored(torch.full((len(batch),), torch.nan), reasons=reasons) for name in SCORES}
    found = explain_again(model, for_classes(batch, runner_up(batch)), "class-gap")
    same = (found.maps == maps).flatten(1).all(1)
    gaps = {name: torch.zeros(len(batch), dtype=torch.float64, device=maps.device) for name in SCORES}
    if not bool(same.all()):
        curves = removal_curves(model, batch, [maps, found.maps], fill, shares)
        for reading in ("", "@probability"):
            most, least, other_most, other_least = curve_area(curves[reading], shares)
            gap = (least - most) - (other_least - other_most)
            gaps[f"class_gap{reading}"] = gap.masked_fill(same, 0)
    gone = failures(found, "the map of the runner-up class")
    reasons = not_predicted(batch)
    return {
        "class_gap": Scored(blanked(gaps["class_gap"], reasons), reasons=reasons, failed=gone),
        "class_gap@probability": Scored(gaps["class_gap@probability"], failed=gone),
    }


def runner_up(batch: Batch) -> Tensor:
    """The class (B,) other than the target with the highest logit."""
    others = batch.logits.scatter(1, batch.targets.unsqueeze(1), -torch.inf)
    return others.argmax(1)
