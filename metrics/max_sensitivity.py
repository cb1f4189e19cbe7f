"""How far a map moves when the image moves by next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.again import explain_again, failures, with_images
from faithmap.batch import Scored, seed_of
from faithmap.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model


@metric(
    version=1,
    source="Yeh et al. 2019 (arXiv:1901.09392), max-sensitivity by Monte Carlo; radius, samples and the "
    "division by the map's norm as in captum's sensitivity_max",
    scores={"max_sensitivity": "lower"},
    bounds={"max_sensitivity": (0, float("inf"))},
    needs={"explainer"},
    fallback={"max_sensitivity": ""},
    default=False,
    check_params={"samples": 3},
)
def max_sensitivity(
    model: Model, batch: Batch, maps: Maps, *, radius: float = 0.02, samples: int = 10
) -> dict[str, Values]:
    """The largest relative change of a map when the image is shifted a little, at random.

    E is the map as all metrics see it, on the run's grid. For each of the samples every channel of every
    pixel moves by a number of its own, uniform in [-r, r]: a point of the ball of radius r in the
    largest difference. The explainer is called on it, for the same class, and

        max_sensitivity = max over samples of ||E(x + d) - E(x)||_2 / ||E(x)||_2,

    a ratio without a unit, 0 for a map that does not move. It is a lower bound of the largest change in
    the ball. The curve in the rows holds the ratio of each sample.

    The shifts are seeded by the run and the image, so all explainers meet the same ones. Explainers that
    draw random numbers draw those of their first map again: what moves is the map, not the dice.

    It judges how steady a method is, not whether it is right. A map that ignores the image, as the nulls
    are, does not move at all and scores best; so no null stands in for maps that are empty or failed,
    and they are left out of the mean. Each sample costs one more explanation.

    The paper's r is a free choice; captum's default is in units of the tensor that the network takes,
    often normalised, where this one is in those of the [0, 1] image. Shifted images are clipped to
    [0, 1], which captum's are not: colours that do not exist are no neighbours of an image.

    Args:
        model: the model.
        batch: images with targets, and the explainer that made the maps.
        maps: (B, H, W), raw signs.
        radius: r, in units of the [0, 1] image.
        samples: how many shifts.

    Raises:
        RequestError: the radius is not positive, there are no samples, or only maps were given.
    """
    if not 0 < radius <= 1:
        raise RequestError(
            f"metric 'max-sensitivity', parameter 'radius': got {radius}, expected a number above 0, up to 1"
        )
    if samples < 1:
        raise RequestError(
            f"metric 'max-sensitivity', parameter 'samples': got {samples}, expected at least 1"
        )
    seeds = [seed_of(batch.seed, "max-sensitivity", name) for name in batch.ids]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size, gone = norm(maps), dict[int, str]()
    ratios = []
    for _ in range(samples):
        found = explain_again(
            model, with_images(batch, _shifted(batch.images, radius, generators)), "max-sensitivity"
        )
        gone = {**failures(found, "the map of a shifted image"), **gone}
        ratios.append(norm(found.maps - maps) / size.masked_fill(size == 0, 1))
    curves = torch.stack(ratios, 1)
    values = curves.amax(1)
    lost = [i in gone for i in range(len(batch))]
    values = values.masked_fill(torch.tensor(lost, device=values.device) | (size == 0), torch.nan)
    return {
        "max_sensitivity": Scored(values, curves, empty=(size == 0).nonzero().flatten().tolist(), failed=gone)
    }


def norm(maps: Tensor) -> Tensor:
    """Euclidean norms (B,) of maps (B, H, W), in double precision."""
    lengths: Tensor = torch.linalg.vector_norm(maps.flatten(1).double(), dim=1)
    return lengths


def _shifted(images: Tensor, radius: float, generators: list[torch.Generator]) -> Tensor:
    """The images with every value moved by up to the radius; each image draws from its own generator."""
    draws = [torch.rand(images.shape[1:], generator=generator) for generator in generators]
    shifts = radius * (2 * torch.stack(draws).to(images) - 1)
    return (images + shifts).clamp(0, 1)
