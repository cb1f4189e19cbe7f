"""Positive and negative perturbation AUC and their difference (Chefer et al. 2021; SCAN)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored, seed_of
from faithmap.errors import RequestError
from faithmap.perturb import make_fill, masked_logits, removal_ranks_both, step_counts, tie_order, tied_share

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

READINGS = ("", "@label", "@probability")
DIRECTIONS: dict[str, Direction] = {"pos_auc": "lower", "neg_auc": "higher", "auc_d": "higher"}
SCORES: dict[str, Direction] = {
    name + reading: direction for reading in READINGS for name, direction in DIRECTIONS.items()
}
#: Standard deviation of the noisy linear fill, in units of the [0, 1] image (as in ROAD's code).
NOISE = 0.01


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
    shares = _shares(span, steps)
    if "tie order" not in batch.cache:
        batch.cache["tie order"] = tie_order(batch.ties())
    ranks = removal_ranks_both(maps, batch.ties(), batch.cache["tie order"])
    logits = _logits(model, batch, ranks, step_counts(maps[0].numel(), shares), fill)
    scores: dict[str, Values] = {}
    for reading, curves in _curves(logits, batch).items():
        scores |= _areas(curves, shares, reading, batch)
    scores["ties"] = 100 * tied_share(maps)
    return scores


def _shares(span: float, steps: int) -> tuple[float, ...]:
    if not 0 < span <= 1:
        raise RequestError(
            f"metric 'perturbation', parameter 'span': got {span}, expected a share above 0, up to 1"
        )
    if steps < 1:
        raise RequestError(f"metric 'perturbation', parameter 'steps': got {steps}, expected at least 1")
    return tuple(span * step / steps for step in range(steps + 1))


def _logits(model: Model, batch: Batch, ranks: Tensor, counts: list[int], fill: str) -> Tensor:
    """(2, B, steps + 1, classes): the clean logits stand at step 0, computed once for the batch."""
    colours = make_fill(fill, batch.images)
    noise = _noise(batch) if colours is None else None
    masked = masked_logits(model, batch.images, ranks, counts[1:], colours, noise)
    clean = batch.logits.view(1, len(batch), 1, -1).expand(2, -1, -1, -1)
    return torch.cat([clean, masked], 2)


def _noise(batch: Batch) -> Tensor:
    """Gaussian noise (B, 3, H, W), seeded by the run and the image: equal for all maps of an image."""
    if "fill noise" not in batch.cache:
        fields = []
        for name in batch.ids:
            generator = torch.Generator().manual_seed(seed_of(batch.seed, "fill", name))
            fields.append(NOISE * torch.randn(*batch.images.shape[1:], generator=generator))
        batch.cache["fill noise"] = torch.stack(fields).to(batch.images.device)
    return batch.cache["fill noise"]


def _curves(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Curves (2, B, steps + 1) in [0, 1] of the three readings; the label's only where labels are."""
    decided = logits.argmax(3)
    index = batch.targets.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    curves = {
        "": (decided == decided[:, :, :1]).float(),
        "@probability": logits.float().softmax(3).gather(3, index).squeeze(3),
    }
    if batch.labels is not None:
        curves["@label"] = (decided == batch.labels.view(1, -1, 1)).float()
    return curves


def _areas(curves: Tensor, shares: tuple[float, ...], reading: str, batch: Batch) -> dict[str, Values]:
    x = torch.tensor(shares, dtype=torch.float64, device=curves.device)
    area = 100 * torch.trapezoid(curves.double(), x, dim=2)
    reasons: list[str] = []
    if reading == "@label" and batch.labels is not None:
        area = area.masked_fill(batch.labels < 0, torch.nan)
        reasons = ["the image has no label" if label < 0 else "" for label in batch.labels.tolist()]
    return {
        f"pos_auc{reading}": Scored(area[0], curves[0], reasons),
        f"neg_auc{reading}": Scored(area[1], curves[1], reasons),
        f"auc_d{reading}": Scored(area[1] - area[0], reasons=reasons),
    }
