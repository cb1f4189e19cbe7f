"""ROAD: what stands of the decision once pixels are removed and filled in from their neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import metric
from faithmap.batch import Scored
from faithmap.errors import RequestError
from faithmap.perturb import removal_ranks_both, step_counts
from faithmap.regions import blanked
from faithmap.removal import (
    NOISE,
    by_reading,
    read_curves,
    removal_logits,
    shared_tie_order,
    without_labels,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

DIRECTIONS: dict[str, Direction] = {"road": "higher", "road_morf": "lower", "road_lerf": "higher"}
SCORES = by_reading(DIRECTIONS)


@metric(
    version=1,
    source="Rong et al. 2022 (arXiv:2202.00449), ROAD with noisy linear imputation, in both orders",
    scores=SCORES,
    bounds={name: (-100 if name.partition("@")[0] == "road" else 0, 100) for name in SCORES},
    default=False,
)
def road(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    percentiles: tuple[int, ...] = (20, 40, 60, 80),
    noise: float = NOISE,
) -> dict[str, Values]:
    """What the model still says once the most, or the least, relevant pixels are gone without a trace.

    At each percentile q the k = int(H W q / 100) pixels that rank highest (`road_morf`, most relevant
    first) or lowest (`road_lerf`) are removed from the clean image and filled in by noisy linear
    imputation: each is asked to equal the mean of its neighbours, direct ones weighing 1/6 and diagonal
    ones 1/12, and gets a little Gaussian noise, so that no outline of what was removed is left for the
    model to see. One pass of logits is read in three ways, as for `perturbation`, each between 0 and 1
    and then averaged over the percentiles, in percent:

    - plain: the model decides as on the clean image;
    - `@label`: it decides for the label, the accuracy of the paper;
    - `@probability`: the softmax probability of the target, in fp32, which pytorch-grad-cam takes.

    `road` = `road_lerf` - `road_morf`, -100 to 100, zero in the mean for a map that knows nothing.

    Conventions differ. The paper prints accuracies at each share, in both orders, and ranks methods by
    their curves; Quantus has the most relevant order alone, at 1, 3, ..., 99%; pytorch-grad-cam names
    percentiles that stay rather than go, takes off the clean score, which cancels in the difference, and
    halves that: its combined ROAD is `road@probability` / 200 where the percentiles are symmetric, as
    they are by default. Its system of equations is solved exactly, on the CPU, and not clipped; here
    the solution is approximate (see `faithmap.perturb.noisy_linear`) and clipped to [0, 1].

    Args:
        model: the model.
        batch: images with targets; labels for the reading of labels (-1 where unknown).
        maps: (B, H, W) ranked as they are, any sign; ties as for `perturbation`.
        percentiles: percent of the pixels removed, each above 0 and up to 100.
        noise: standard deviation of the noise, in units of the [0, 1] image. It is seeded by the run and
            the image, so that all maps of an image get the same.

    Returns:
        Every score in percent (B,), the two orders with their curves (B, percentiles) in [0, 1]. The
        readings of labels are left out where the batch has none.

    Raises:
        RequestError: there are no percentiles, or one is no percentage; or the noise is negative.
    """
    _check(percentiles, noise)
    counts = step_counts(maps[0].numel(), [percentile / 100 for percentile in percentiles])
    ranks = removal_ranks_both(maps, batch.ties(), shared_tie_order(batch))
    logits = removal_logits(model, batch, ranks, counts, "noisy-linear", noise)
    scores: dict[str, Values] = {}
    for reading, curves in read_curves(logits, batch).items():
        removed = curves[:, :, 1:]  # the clean image is no part of the mean
        mean, reasons = 100 * removed.double().mean(2), without_labels(reading, batch)
        if reasons:
            mean = blanked(mean, reasons)
        scores[f"road{reading}"] = Scored(mean[1] - mean[0], reasons=reasons)
        scores[f"road_morf{reading}"] = Scored(mean[0], removed[0], reasons)
        scores[f"road_lerf{reading}"] = Scored(mean[1], removed[1], reasons)
    return scores


def _check(percentiles: Sequence[float], noise: float) -> None:
    fit = [
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 100
        for value in percentiles
    ]
    if not fit or not all(fit):
        raise RequestError(
            f"metric 'road', parameter 'percentiles': got {list(percentiles)}, expected percentages above 0, "
            "up to 100, such as [20, 40, 60, 80]"
        )
    if not 0 <= noise < float("inf"):
        raise RequestError(f"metric 'road', parameter 'noise': got {noise}, expected a number of at least 0")
