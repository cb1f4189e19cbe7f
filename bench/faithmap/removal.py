"""What the model says while pixels are removed: logits along the way, and three ways to read them.

Shared by all metrics that remove pixels in a map's order and ask whether the decision stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from faithmap.batch import Batch, seed_of
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.perturb import make_fill, masked_logits, removal_ranks_both, step_counts, tie_order
from faithmap.records import Direction

#: How logits are read: the decision is that on the clean image; it is the label; the target's probability.
READINGS = ("", "@label", "@probability")
#: Standard deviation of the noisy linear fill, in units of the [0, 1] image (as in ROAD's code).
NOISE = 0.01


def by_reading(directions: Mapping[str, Direction]) -> dict[str, Direction]:
    """The scores of a metric in every reading, with their directions."""
    return {name + reading: direction for reading in READINGS for name, direction in directions.items()}


def steps_to(metric: str, span: float, steps: int) -> tuple[float, ...]:
    """The shares 0, span / steps, ..., span of pixels removed.

    Raises:
        RequestError: they make no way; the metric is named.
    """
    if not 0 < span <= 1:
        raise RequestError(
            f"metric '{metric}', parameter 'span': got {span}, expected a share above 0, up to 1"
        )
    if steps < 1:
        raise RequestError(f"metric '{metric}', parameter 'steps': got {steps}, expected at least 1")
    return tuple(span * step / steps for step in range(steps + 1))


def shared_tie_order(batch: Batch) -> Tensor:
    """`tie_order` of the batch's tie fields, sorted once for all maps."""
    if "tie order" not in batch.cache:
        batch.cache["tie order"] = tie_order(batch.ties())
    return batch.cache["tie order"]


def removal_logits(
    model: Model, batch: Batch, ranks: Tensor, counts: Sequence[int], fill: str, noise: float = NOISE
) -> Tensor:
    """Logits (R, B, len(counts) + 1, classes) while pixels go; those of the clean images stand first.

    The clean logits are computed once for the batch.

    Args:
        model: the model.
        batch: the images.
        ranks: (R, B, H * W) orders of removal; R orders an image.
        counts: pixels removed at each step.
        fill: one of `perturb.FILL_NAMES`.
        noise: standard deviation of the noisy linear fill.
    """
    colours = make_fill(fill, batch.images)
    field = noise * noise_field(batch) if colours is None else None
    masked = masked_logits(model, batch.images, ranks, counts, colours, field)
    clean = batch.logits.view(1, len(batch), 1, -1).expand(len(ranks), -1, -1, -1)
    return torch.cat([clean, masked], 2)


def removal_curves(
    model: Model, batch: Batch, maps: Sequence[Tensor], fill: str, shares: Sequence[float]
) -> dict[str, Tensor]:
    """Curves of each reading (2 len(maps), B, steps): every map's most important pixels first, then last.

    Args:
        model: the model.
        batch: the images.
        maps: sets of maps (B, H, W) of these images, ranked as they are.
        fill: one of `perturb.FILL_NAMES`.
        shares: of pixels removed, from 0 on; see `steps_to`.
    """
    orders = [removal_ranks_both(each, batch.ties(), shared_tie_order(batch)) for each in maps]
    counts = step_counts(maps[0][0].numel(), shares)[1:]
    return read_curves(removal_logits(model, batch, torch.cat(orders), counts, fill), batch)


def noise_field(batch: Batch) -> Tensor:
    """Standard normal noise (B, 3, H, W), seeded by the run and the image: equal for all maps of an image."""
    if "fill noise" not in batch.cache:
        fields = []
        for name in batch.ids:
            generator = torch.Generator().manual_seed(seed_of(batch.seed, "fill", name))
            fields.append(torch.randn(*batch.images.shape[1:], generator=generator))
        batch.cache["fill noise"] = torch.stack(fields).to(batch.images.device)
    return batch.cache["fill noise"]


def read_curves(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Curves (R, B, steps) in [0, 1] of the readings, from `removal_logits`; the label's only with labels."""
    decided = logits.argmax(3)
    index = batch.targets.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    curves = {
        "": (decided == decided[:, :, :1]).float(),
        "@probability": logits.float().softmax(3).gather(3, index).squeeze(3),
    }
    if batch.labels is not None:
        curves["@label"] = (decided == batch.labels.view(1, -1, 1)).float()
    return curves


def without_labels(reading: str, batch: Batch) -> list[str]:
    """Why a reading says nothing of an image, by image; empty strings where it does."""
    if reading != "@label" or batch.labels is None:
        return []
    return ["the image has no label" if label < 0 else "" for label in batch.labels.tolist()]


def not_predicted(batch: Batch) -> list[str]:
    """Why the agreement curve does not tell of the target, by image; empty strings where it does."""
    return [
        "" if same else "the map explains another class than the predicted one, whose curve this is"
        for same in (batch.targets == batch.predicted).tolist()
    ]


def curve_area(curves: Tensor, shares: Sequence[float]) -> Tensor:
    """100 times the trapezoid of curves (..., steps) over shares of pixels, not divided by the span."""
    x = torch.tensor(list(shares), dtype=torch.float64, device=curves.device)
    return 100 * torch.trapezoid(curves.double(), x, dim=-1)
