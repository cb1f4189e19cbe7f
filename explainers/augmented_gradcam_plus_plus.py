"""Augmented Grad-CAM++ (Gao et al. 2023), as ScoreCAM++ compares with it, mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


def _passes(model: Model, params: Mapping[str, Any]) -> float:
    """The image and its copies."""
    return 1.0 + float(params.get("copies", 50))


@explainer(
    name="augmented-gradcam++", version=1,
    source="Gao et al. 2023 (doi:10.3390/electronics12234846), sec. 3; parameters of ScoreCAM++'s baseline",
    forwards=_passes, backwards=_passes, check_params={"copies": 3},
)  # fmt: skip
def augmented_gradcam_plus_plus(
    model: Model,
    batch: Batch,
    *,
    layer: str | None = None,
    copies: int = 50,
    degrees: float = 45.0,
    translate: float = 0.2,
) -> Maps:
    """Grad-CAM++ of the image and of turned and shifted copies, laid back over each other, averaged.

    A copy is turned by U(-degrees, degrees) about the centre, then shifted by U(-translate, translate)
    of its width and height, in whole pixels; pixels take the colour of the nearest one, and the model's
    mean colour where there is none. Each copy's Grad-CAM++
    for the image's target is stretched to [0, 1], turned and shifted back on the features' grid and
    added up; every cell is divided by the weight with which copies covered it. The image itself is the
    first, whole, of 1 + `copies` maps. A constant map is left out of sum and weight. Shape (B, h, w)
    of the features' grid; range [0, 1].

    The paper fixes neither the number of copies nor their range; these are the ones of the baseline in
    ScoreCAM++'s code. That code explains class i with its i-th copy and never lays maps back, so that
    its sum is smeared by the very motion that was to be averaged out; the reading here follows the
    paper's aim. How it moves pixels is kept. The paper's last step, bilinear upsampling, is what is
    done with every map.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
        copies: number of turned and shifted copies; 0 leaves Grad-CAM++, stretched.
        degrees: largest angle, in [0, 180].
        translate: largest shift as a share of the side, in [0, 1).
    """
    import torch

    from faithmap.cam import min_max
    from faithmap.errors import RequestError
    from faithmap.perturb import chunk_size

    if copies < 0 or not 0 <= degrees <= 180 or not 0 <= translate < 1:
        raise RequestError(
            f"augmented-gradcam++: got copies {copies}, degrees {degrees} and translate {translate}, "
            "expected copies of 0 or more, degrees in [0, 180] and translate in [0, 1)"
        )
    count, chunk = len(batch), chunk_size(model)
    drawn = [_moves(batch.generator(i), copies, degrees, translate, batch.size) for i in range(count)]
    moves = torch.cat(drawn)
    owners = torch.arange(count).repeat_interleave(copies)
    whole = min_max(_gradcam_plus_plus(model, batch, layer)).unsqueeze(1)
    sums, weights = [whole], [_alive(whole)]
    if copies:
        laid = []
        for move, owner in zip(moves.to(whole.device).split(chunk), owners.split(chunk), strict=True):
            cams = min_max(_gradcam_plus_plus(model, _copies(model, batch, owner, move), layer)).unsqueeze(1)
            laid.append(_warp(torch.cat([cams, _alive(cams)], 1), _affine(move, batch.size, inverse=False)))
        both = torch.cat(laid).unflatten(0, (count, copies))
        sums, weights = [whole, both[:, :, 0]], [_alive(whole), both[:, :, 1]]
    weight = torch.cat(weights, 1).sum(1)
    return torch.where(weight > 0, torch.cat(sums, 1).sum(1) / weight.clamp_min(1e-6), 0.0)


def _gradcam_plus_plus(model: Model, batch: Batch, layer: str | None) -> Tensor:
    from faithmap import registry

    maps: Tensor = registry.get("explainer", "gradcam++").target(model, batch, layer=layer)
    return maps.float()


def _alive(maps: Tensor) -> Tensor:
    """Maps of ones, and of zeros in the place of maps (B, 1, h, w) that are constant."""
    spread = maps.amax((2, 3), keepdim=True) - maps.amin((2, 3), keepdim=True)
    return (spread > 0).to(maps.dtype).expand_as(maps)


def _moves(generator: Any, copies: int, degrees: float, translate: float, size: tuple[int, int]) -> Tensor:
    """(copies, 3): angle in radians, shift right and shift down, whole pixels as shares of the sides."""
    import torch

    reach = torch.tensor([degrees * torch.pi / 180, translate, translate])
    moves = (2 * torch.rand(copies, 3, generator=generator) - 1) * reach
    sides = torch.tensor([size[1], size[0]])
    return torch.cat([moves[:, :1], (moves[:, 1:] * sides).round() / sides], 1)


def _copies(model: Model, batch: Batch, owner: Tensor, move: Tensor) -> Batch:
    """A batch of turned and shifted images, each with the target of the image that it is a copy of."""
    from dataclasses import replace

    from faithmap.context import Context

    places = owner.to(batch.images.device)
    # Sampling beyond the border gives zero: the mean colour, as the network sees it.
    theta = _affine(move, batch.size, inverse=True)
    images = _warp(batch.images[places] - model.mean, theta, mode="nearest") + model.mean
    return replace(
        batch, images=images, targets=batch.targets[places], ids=tuple(batch.ids[i] for i in owner.tolist()),
        context=Context(model, images), labels=None, masks=None, void=None, boxes=None, cache={},
    )  # fmt: skip


def _affine(move: Tensor, size: tuple[int, int], *, inverse: bool) -> Tensor:
    """(n, 2, 3): from a place to where the move takes it, or back, with the sides running from -1 to 1.

    The turn is one of pixels, so that it is none of the coordinates where height and width differ.
    """
    import torch

    height, width = size
    cos, sin = move[:, 0].cos(), move[:, 0].sin()
    if inverse:
        sin = -sin
    turn = torch.stack(
        [torch.stack([cos, -sin * height / width], 1), torch.stack([sin * width / height, cos], 1)], 1
    )
    shift = 2 * move[:, 1:, None]
    return torch.cat([turn, -turn @ shift if inverse else shift], 2)


def _warp(planes: Tensor, theta: Tensor, mode: str = "bilinear") -> Tensor:
    """Planes (n, C, h, w) read where an affine map takes each place; zero outside."""
    from torch.nn import functional as F

    grid = F.affine_grid(theta.to(planes.dtype), list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, mode=mode, padding_mode="zeros", align_corners=False)
