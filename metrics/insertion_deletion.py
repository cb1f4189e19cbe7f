"""Insertion and deletion: the probability while the image is built up, or taken down, in a map's order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored
from faithmap.errors import RequestError, nearest
from faithmap.perturb import (
    FILLS,
    chunk_size,
    logits_in_chunks,
    make_fill,
    masked_logits,
    removal_ranks,
    step_counts,
)

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model

#: RISE's blur: sides of the kernel and standard deviation, in pixels.
KERNEL, SIGMA = 11, 5.0
SUBSTRATES = ("normalised-zero", "rise-blur", *FILLS)


@metric(
    version=1,
    source="Petsiuk et al. 2018 (RISE), sec. 4, with the steps and substrates of its code; "
    "Wang et al. 2020 (Score-CAM), sec. 4.2",
    scores={"insertion": "higher", "deletion": "lower"},
    bounds={"insertion": (0, 100), "deletion": (0, 100)},
    default=False,
)
def insertion_deletion(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    steps: int = 28,
    deletion: str = "normalised-zero",
    insertion: str = "rise-blur",
) -> dict[str, Values]:
    """Mean probability of the target while pixels are put into a substrate, or replaced by one, best first.

    At step i of n the k = int(H W i / n) pixels that rank highest have changed: for `deletion` from the
    image to its substrate, for `insertion` from a substrate to the image. p_0, ..., p_n are the softmax
    probabilities of the target, in fp32, and

        score = 100 (p_0 + ... + p_n - p_0 / 2 - p_n / 2) / n,

    percent, 0 to 100: the trapezoid over all shares from none to all. The two are not each other
    reversed: they start from different substrates, so that one says nothing of the other, and even with
    one substrate insertion from the top is deletion from the bottom. The target is the class that the
    run explains, by default the prediction, as in RISE.

    RISE's code changes 8 x 224 pixels of 224 x 224 a step, which is 28 steps at any size; Score-CAM 1%,
    which is 100. Score-CAM sets pixels to "zero or one" and does not say what it inserts into.

    Args:
        model: the model.
        batch: images with targets.
        maps: (B, H, W) ranked as they are, any sign; ties as for `perturbation`.
        steps: n, the steps from nothing to everything.
        deletion: what takes the pixels' place. "normalised-zero" is zero behind the model's
            normalisation, its mean colour, as in RISE's code; "rise-blur" that code's blur (a kernel of
            11 pixels made from a sigma of 5, the border padded with the mean colour, whatever the size
            of the image); "black", "mean" (the image's own mean colour) and "blur" (a sigma of a tenth
            of the shorter side) are the fills of `perturbation`.
        insertion: what the pixels are put into; likewise.

    Returns:
        Both scores (B,), each with its curve (B, n + 1) of probabilities in [0, 1].

    Raises:
        RequestError: there is no such substrate, or there are no steps.
    """
    for name, given in (("deletion", deletion), ("insertion", insertion)):
        if given not in SUBSTRATES:
            raise RequestError(
                f"metric 'insertion-deletion', parameter '{name}': got {given!r}; "
                f"{nearest(given, SUBSTRATES)}"
            )
    if steps < 1:
        raise RequestError(
            f"metric 'insertion-deletion', parameter 'steps': got {steps}, expected at least 1"
        )
    ranks = removal_ranks(maps, batch.ties())
    counts = step_counts(maps[0].numel(), [step / steps for step in range(1, steps)])

    def between(start: Tensor, end: Tensor) -> Tensor:
        """Logits (B, n - 1, classes) on the way from some images to others."""
        if not counts:
            return batch.logits.new_zeros(len(batch), 0, batch.logits.shape[1])
        return masked_logits(model, start, ranks.unsqueeze(0), counts, end)[0]

    taken, put = (_substrate(name, model, batch.images) for name in (deletion, insertion))
    clean = batch.logits.unsqueeze(1)
    ends = [_logits(model, batch, name).unsqueeze(1) for name in (deletion, insertion)]
    return {
        "insertion": _score(torch.cat([ends[1], between(put, batch.images), clean], 1), batch),
        "deletion": _score(torch.cat([clean, between(batch.images, taken), ends[0]], 1), batch),
    }


def _score(logits: Tensor, batch: Batch) -> Scored:
    """The area under the target's probability, from logits (B, n + 1, classes), and its curve."""
    index = batch.targets.view(-1, 1, 1).expand(*logits.shape[:2], 1)
    curve = logits.float().softmax(2).gather(2, index).squeeze(2)
    return Scored(100 * torch.trapezoid(curve.double(), dx=1 / (curve.shape[1] - 1), dim=1), curve)


def _logits(model: Model, batch: Batch, name: str) -> Tensor:
    """Logits (B, classes) of the substrate alone: the same for all maps of an image."""
    key = f"logits of {name}"
    if key not in batch.cache:
        images = _substrate(name, model, batch.images)
        batch.cache[key] = logits_in_chunks(
            model, len(images), lambda part: images[part], chunk_size(model, batch.size)
        )
    return batch.cache[key]


def _substrate(name: str, model: Model, images: Tensor) -> Tensor:
    """What stands where no pixel of the image does, (B, 3, H, W) in [0, 1]."""
    if name == "normalised-zero":
        return model.mean.expand_as(images)
    if name == "rise-blur":
        return rise_blur(images, model.mean)
    fill = make_fill(name, images)
    assert fill is not None  # only the noisy linear fill, which is none of these, has no colours
    return fill.expand_as(images)


def rise_blur(images: Tensor, ground: Tensor) -> Tensor:
    """The blur of RISE's code: a smoothed impulse as kernel, zeros of the normalised image around it.

    The kernel is a Gaussian of sigma 5 folded back at its own border, since it is made by smoothing an
    array of 11 by 11; it is flatter than one that is cut off.

    Args:
        images: (B, 3, H, W).
        ground: (1, 3, 1, 1), the colour that the normalisation takes to zero.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((KERNEL, KERNEL))
    impulse[KERNEL // 2, KERNEL // 2] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, SIGMA)).to(images)
    weights = kernel.expand(images.shape[1], 1, KERNEL, KERNEL)
    # Scaling each channel by a number of its own changes nothing: only the shift must be undone.
    smooth = torch.nn.functional.conv2d(images - ground, weights, padding=KERNEL // 2, groups=images.shape[1])
    return (smooth + ground).clamp(0, 1)
