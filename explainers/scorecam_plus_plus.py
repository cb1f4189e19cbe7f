"""ScoreCAM++ (Mitra et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

#: What turns an upsampled channel into its mask.
ACTIVATIONS = (
    "tanh", "sigmoid-relu", "sigmoid-relu-half", "mish", "swish", "relu", "identity", "min-max",
)  # fmt: skip
#: What falls somewhere while its argument rises: two values may have the same image, and others between.
FALLING = ("mish", "swish")
SUMMED = ("gated", "raw")
BASELINES = ("none", "zero")


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: the features, one image a channel, and the blank image if it is subtracted."""
    from faithmap.cam import channel_count

    return 1 + channel_count(model, params.get("layer")) + (params.get("baseline") == "zero")


@explainer(
    name="scorecam++", version=1,
    source="Mitra et al. 2024 (arXiv:2404.19341), H_k and L; the weights as in the authors' code",
    forwards=_forwards, backwards=0, exact_cost=False,
)  # fmt: skip
def scorecam_plus_plus(
    model: Model,
    batch: Batch,
    *,
    layer: str | None = None,
    activation: str = "tanh",
    summed: str = "gated",
    baseline: str = "none",
    clamp: bool = False,
    threshold: float = 0.0,
    score: str = "probability",
    space: str = "normalised",
    stretch: bool = False,
) -> Maps:
    """Score-CAM with channels gated by tanh, both where they mask the image and where they are summed.

    H_k = tanh(up(A^k)): upsampled first (bilinear), then gated, not stretched. alpha_k is the target's
    softmax probability on the image times H_k, and L = ReLU(sum_k alpha_k H_k) at the size of the
    image, (B, H, W), not negative. No softmax over the channels.

    Published: tanh, the sum of the gated maps. The released code has several gates: its notebook takes
    tanh, the script that tests the method sigmoid(ReLU(A / 2)), which shuts nothing. The paper calls
    alpha_k a change in confidence; the code subtracts nothing, multiplies the normalised image, so that
    masks fade to the model's mean colour, and ends with a stretch of the map to [0, 1]. The defaults are
    the paper's gate and else those of the code but for this stretch: it takes off the floor that saturated
    gates leave under the map, which only scores that add a map up see, and other class activation maps,
    whose codes stretch as well, are scored without it. `baseline="zero"` is the change against a blank
    image, which can make weights negative.

    Where tanh saturates, above 2, beside the object as well, the map is bright all over, which scores
    of masked images reward: read them beside the area. Where features are signed (transformers) so is
    tanh, and masks below zero invert the image's contrast. The paper, made for CNNs, does not treat
    them; `clamp` is a reconstruction. On the embedded ConvNeXt, whose features are signed, it is the
    difference between a map far below the null and a good one (results/README.md, baseline-open-points).

    Deviations from the code: it runs a backward pass whose gradient it does not use, and one of its
    files applies the ReLU to every term. A channel whose mask is the same everywhere only dims the
    image. Equal ones share one forward pass, those of zero one in the whole batch.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
        activation: "tanh"; "sigmoid-relu-half", sigmoid(ReLU(A / 2)), of the authors' script; of their
            ablation "sigmoid-relu", that is sigmoid(ReLU(A)), "mish" and "swish"; further "relu", "identity",
            and "min-max", which is Score-CAM's own, zero for constant channels.
        summed: "gated" sums the masks; "raw" the upsampled features, the paper's "normalisation only".
        baseline: "none", or "zero" to subtract the score of the image that a mask of zeros leaves.
        clamp: set negative mask values to zero.
        threshold: set mask values below this to zero; 0 leaves all as they are. The code has 0.5 to
            0.8 in lines that are switched off.
        score: "probability" (softmax over the classes), or "logit".
        space: "normalised" masks towards the model's mean colour, "pixel" towards black.
        stretch: shift and scale the map to [0, 1], zero where it is constant, instead of leaving it as
            the ReLU does.

    Raises:
        RequestError: a choice is unknown, or the threshold is negative or not finite.
    """
    _check(activation, summed, baseline, threshold)
    features = batch.activations(layer).float()
    gate = _gate(activation, clamp, threshold)
    constant = _constant(features, gate, activation, rising=clamp or threshold > 0)
    maps = _weighted(model, batch, features, gate, constant, summed, baseline, score, space).clamp_min(0)
    return _stretched(maps) if stretch else maps


def _weighted(
    model: Model,
    batch: Batch,
    features: Tensor,
    gate: Callable[[Tensor], Tensor],
    constant: Tensor,
    summed: str,
    baseline: str,
    score: str,
    space: str,
) -> Tensor:
    """sum_k alpha_k H_k, or sum_k alpha_k up(A^k), (B, H, W). Every mask is made once."""
    import torch

    from faithmap.cam import blank_scores, masked_scores
    from faithmap.resize import upsample

    level = batch.images.new_zeros(len(batch), dtype=features.dtype)
    if baseline == "zero":
        level = blank_scores(model, batch.targets, batch.size, score=score, space=space)
    maps = features.new_zeros(len(batch), *batch.size)

    def add(images: Tensor, masks: Tensor, scores: Tensor) -> None:
        # One wait for the device.
        positions, counts = torch.stack(images.unique_consecutive(return_counts=True)).tolist()
        for i, some, found in zip(positions, masks.split(counts), scores.split(counts), strict=True):
            # A plane a row: a product of matrices, image by image, so that none leaks into another.
            maps[i] += ((found - level[i]) @ some.flatten(1)).view(batch.size)

    weights = masked_scores(
        model, batch.images, batch.targets, features, gate, constant,
        score=score, space=space, reorder=True, each=add if summed == "gated" else None,
    ) - level.view(-1, 1)  # fmt: skip
    if summed == "raw":
        return upsample((weights[:, :, None, None] * features).sum(1), batch.size)
    return maps + (weights * constant.nan_to_num(0.0)).sum(1).view(-1, 1, 1)


def _check(activation: str, summed: str, baseline: str, threshold: float) -> None:
    """Refuse what the core does not look at itself."""
    from faithmap.errors import RequestError, nearest

    choices = {"activation": (activation, ACTIVATIONS), "summed": (summed, SUMMED),
               "baseline": (baseline, BASELINES)}  # fmt: skip
    for what, (given, known) in choices.items():
        if given not in known:
            raise RequestError(f"scorecam++: unknown {what} '{given}'; {nearest(given, known)}")
    if not 0 <= threshold < math.inf:
        raise RequestError(
            f"scorecam++: threshold is {threshold}; expected 0 (off) or a positive mask value. "
            "To set negative values to zero, use clamp"
        )


def _gate(activation: str, clamp: bool, threshold: float) -> Callable[[Tensor], Tensor]:
    """The function that makes masks (n, H, W) of upsampled channels (n, H, W)."""
    import torch
    from torch.nn import functional as F

    from faithmap.cam import min_max

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "sigmoid-relu": lambda maps: torch.sigmoid(maps.relu()),
        "sigmoid-relu-half": lambda maps: torch.sigmoid(maps.relu() / 2),
        "mish": F.mish,
        "swish": F.silu,
        "relu": torch.relu,
        "identity": torch.nn.Identity(),
        "min-max": min_max,
    }

    def gate(maps: Tensor) -> Tensor:
        masks = functions[activation](maps)
        masks = masks.clamp_min(0) if clamp else masks
        return torch.where(masks < threshold, 0.0, masks) if threshold > 0 else masks

    return gate


def _constant(features: Tensor, gate: Callable[[Tensor], Tensor], activation: str, *, rising: bool) -> Tensor:
    """(B, C): the value of each mask that is the same everywhere, NaN for the others.

    Told from the features, before upsampling rounds. A function that never falls takes what lies
    between the least and the largest feature to what lies between their images; mish and swish do
    so only once their negative values are gone (`rising`).
    """
    import torch

    low, high = features.amin((2, 3)), features.amax((2, 3))
    if activation == "min-max":
        return torch.where(low == high, 0.0, torch.nan)
    same = low == high
    if rising or activation not in FALLING:
        same |= gate(low) == gate(high)
    return torch.where(same, gate(high), torch.nan)


def _stretched(maps: Tensor) -> Tensor:
    """Maps to [0, 1]; zero for one that is constant but for the rounding of its sum."""
    import torch

    from faithmap.cam import min_max

    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 4 * torch.finfo(maps.dtype).eps * high
    return torch.where(flat, 0.0, min_max(maps))
