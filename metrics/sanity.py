"""Does a map depend on what the model has learnt, and on the class that it explains?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.again import explain_again, failures, for_classes, with_model
from faithmap.batch import Scored, seed_of
from faithmap.randomising import cascade
from faithmap.regions import blanked
from faithmap.removal import curve_area, not_predicted, removal_curves, steps_to

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.explaining import MapSet
    from faithmap.models import Model
    from faithmap.records import Direction

SCORES: dict[str, Direction] = {
    "sanity_rank": "none", "sanity_ssim": "none", "sanity_auc_d": "none",  # near zero is right
    "sanity_class_gap": "higher", "sanity_least_gap": "higher", "sanity_self": "none",
}  # fmt: skip
SHARES = ("sanity_auc_d", "sanity_class_gap", "sanity_least_gap", "sanity_self")


@metric(
    version=2,
    source="Adebayo et al. 2018 (arXiv:1810.03292); SCAN (arXiv:2603.06523), table 4",
    scores=SCORES,
    bounds={"sanity_rank": (-1, 1), "sanity_ssim": (-1, 1), **dict.fromkeys(SHARES, (-180, 180))},
    needs={"explainer"},
    fallback=dict.fromkeys(SCORES, ""),
    default=False,
    check_params={"stages": 1, "steps": 2},
)
def sanity(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    stages: int = 4,
    how: str = "shuffled",
    fill: str = "black",
    span: float = 0.9,
    steps: int = 9,
) -> dict[str, Values]:
    """How a map fares when the weights are taken away, and when another class is explained.

    Weights: copies of the model lose the weights of the last 1/stages of their layers, of the last
    2/stages, and so on to all (`faithmap.randomising.cascade`), and each is explained for the same class
    with the same seeds. A fit, such as a decoder's, is kept as it is.

    - `sanity_rank`, -1 to 1: Spearman's correlation of the map without any weights with the map itself, over
      pixels, signs kept. `sanity_ssim`, -1 to 1: their structural similarity, each stretched to [0, 1]. A
      constant map resembles nothing: 0. The curves hold every stage. Near 0 is right; a high value means
      that the map shows the image, not the model.
    - `sanity_auc_d`, percent: AUC-D of the map without weights, scored on the model itself. Near 0 is right;
      a value near the method's own AUC-D means that the score rewards something which needs no model.

    Class: the same image is explained for a class drawn at random, not the target, and for the least
    likely one, and these maps are scored on the target as its own is.

    - `sanity_class_gap`, `sanity_least_gap`, percent: AUC-D of the target's map less that of the other
      class's. The larger, the more the map is of its class; 0 for methods that know no class. By agreement
      with the prediction, so without a value where another class is explained.

    `sanity_self`, percent, is the test as SCAN's table 4 reports it: AUC-D, by label, of the map without
    weights on the model without weights. A network that has learnt nothing is right by chance whatever is
    removed, so it is about 0 for any map at all, the nulls included. It tells nothing, and is here so that
    the table can be repeated.

    Nulls, which look at no model, do not change: they have similarity 1 and gaps of 0. No null stands in for
    maps that are empty or failed.

    Args:
        model: the model.
        batch: images with targets, and the explainer that made the maps.
        maps: (B, H, W), raw signs.
        stages: steps of the cascade, 1 or more.
        how: "shuffled" or "reinitialised".
        fill: what removed pixels become, as for `perturbation`.
        span: the last share removed.
        steps: how many equal steps lead there.

    Returns:
        The scores (B,); `sanity_self` is NaN for images without a label, gaps for a model of one class.

    Raises:
        RequestError: a parameter is wrong, or only maps were given.
    """
    shares = steps_to("sanity", span, steps)
    ranks, likeness = [], []
    for changed in cascade(model, stages, how, batch.seed):
        blank = with_model(batch, changed)
        bare = explain_again(changed, blank, "sanity")
        ranks.append(torch.tensor([_spearman(*pair) for pair in zip(maps, bare.maps, strict=True)]))
        likeness.append(torch.tensor([_similarity(*pair) for pair in zip(maps, bare.maps, strict=True)]))
    gone = failures(bare, "the map of the model without weights")
    own, without = _auc_d(model, batch, [maps, bare.maps], fill, shares)
    scores: dict[str, Values] = {
        "sanity_rank": Scored(ranks[-1], curves=torch.stack(ranks, 1), failed=gone),
        "sanity_ssim": Scored(likeness[-1], curves=torch.stack(likeness, 1), failed=gone),
        "sanity_auc_d": Scored(without, failed=gone),
        "sanity_self": _self(changed, blank, bare, fill, shares, gone),
    }
    for name, classes in (("sanity_class_gap", _another(batch)), ("sanity_least_gap", _least(batch))):
        scores[name] = _gap(model, batch, own, classes, fill, shares)
    return scores


def _gap(
    model: Model, batch: Batch, own: Tensor, classes: Tensor, fill: str, shares: tuple[float, ...]
) -> Values:
    """AUC-D of the targets' maps less that of other classes' maps, both scored on the targets."""
    if batch.logits.shape[1] < 2:
        reasons = ["the model has no second class"] * len(batch)
        return Scored(torch.full((len(batch),), torch.nan), reasons=reasons)
    other = explain_again(model, for_classes(batch, classes), "sanity")
    (theirs,) = _auc_d(model, batch, [other.maps], fill, shares)
    reasons = not_predicted(batch)
    gap = blanked(own - theirs, reasons)
    return Scored(gap, reasons=reasons, failed=failures(other, "the map of the other class"))


def _self(
    changed: Model, blank: Batch, bare: MapSet, fill: str, shares: tuple[float, ...], gone: dict[int, str]
) -> Values:
    """AUC-D by label of the maps of a model without weights, on that model."""
    if blank.labels is None:
        reasons = ["the image has no label"] * len(blank)
        return Scored(torch.full((len(blank),), torch.nan), reasons=reasons)
    (found,) = _auc_d(changed, blank, [bare.maps], fill, shares, "@label")
    unknown = blank.labels < 0
    reasons = ["the image has no label" if missing else "" for missing in unknown.tolist()]
    return Scored(found.masked_fill(unknown, torch.nan), reasons=reasons, failed=gone)


def _auc_d(
    model: Model, batch: Batch, maps: list[Tensor], fill: str, shares: tuple[float, ...], reading: str = ""
) -> list[Tensor]:
    """AUC-D (B,) of several maps of the images, as `perturbation` has it."""
    areas = curve_area(removal_curves(model, batch, maps, fill, shares)[reading], shares)
    return [areas[2 * i + 1] - areas[2 * i] for i in range(len(maps))]


def _another(batch: Batch) -> Tensor:
    """A class (B,) that is not the target, drawn by the run's seed and the image."""
    classes = batch.logits.shape[1]
    drawn = [
        torch.randint(1, max(2, classes), (), generator=torch.Generator().manual_seed(seed))
        for seed in (seed_of(batch.seed, "another class", name) for name in batch.ids)
    ]
    return (batch.targets + torch.stack(drawn).to(batch.targets)) % classes


def _least(batch: Batch) -> Tensor:
    """The least likely class (B,) other than the target."""
    return batch.logits.scatter(1, batch.targets.unsqueeze(1), torch.inf).argmin(1)


def _spearman(one: Tensor, two: Tensor) -> float:
    from faithmap.stats import rank_correlation

    found = rank_correlation(one.cpu(), two.cpu())
    return 0.0 if math.isnan(found) else found


def _similarity(one: Tensor, two: Tensor) -> float:
    """Structural similarity of two maps (H, W), each stretched to [0, 1]."""
    from skimage.metrics import structural_similarity

    spans = [float(each.max() - each.min()) for each in (one, two)]
    if not all(spans):
        return 0.0
    first, second = (
        ((each - each.min()) / span).double().cpu().numpy()
        for each, span in zip((one, two), spans, strict=True)
    )
    return float(structural_similarity(first, second, data_range=1.0))  # type: ignore[no-untyped-call]
