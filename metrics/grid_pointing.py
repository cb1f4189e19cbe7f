"""The grid pointing game: in a mosaic of four images, does a map find the one of its class?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.again import explain_again, failures, with_images
from faithmap.batch import Scored, seed_of
from faithmap.errors import RequestError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.pool import Pool

SIZES = ("auto", "double", "half")
#: Rows and columns of a mosaic: its place 0 is the upper left, its place 3 the lower right.
SIDE = 2
PLACES = SIDE * SIDE


@metric(
    version=1,
    source="Böhle et al. 2021 (arXiv:2104.00032) and 2022 (arXiv:2205.10268), localisation metric; "
    "Rao et al. 2022 (arXiv:2205.10435), GridPG, of which the 2 x 2 grid",
    scores={"grid_pg": "higher"},
    bounds={"grid_pg": (0, 100)},
    needs={"explainer", "label", "pool"},
    default=False,
)
def grid_pointing(
    model: Model, batch: Batch, maps: Maps, *, confidence: float = 0.5, pool: int = 256, size: str = "auto"
) -> dict[str, Values]:
    """Share of a map's positive relevance that falls on the one image of four that shows its class.

    The image and three others, each of another class and each classified rightly and with at least the
    given confidence, make a mosaic of two by two. The explainer is called on the mosaic for the image's
    class, and

        grid_pg = 100 sum of S over the image's quarter / sum of S,

    S being the map after ReLU as all metrics see it; percent, 0 to 100. A map that knows nothing scores
    25. Scored are images that the model gets right and is sure of, for runs that explain the label.

    Unlike a box, the quarter is no matter of opinion: nothing of the class is outside of it. But the
    mosaic is no image that the network was trained for, and a method that explains a class by what speaks
    against the others is not wrong.

    Each image has a mosaic of its own, in which it takes one of the four places. Partners and places
    follow from hashes of the ids, from the first images in the run's order of the image's own part of
    the dataset, and from what the model is sure of. So a value depends neither on the batch nor on the
    run's limit, and all explainers of a model see the same mosaics; another model sees others.

    A network that takes images of any size sees the four at full size, side by side: the mosaic is 2H x
    2W, and so is the run's grid twice as fine, as coarse as ever on each image. One that is built for a
    single size, as most vision transformers are, sees each image at half its height and width, on the
    run's grid as it is; with an odd number of cells the middle ones then belong to two images. The two
    are not the same task and are not compared.

    Deviations: the papers make a few hundred mosaics of images that occur once, and score all four
    classes of each; Böhle et al. take the surest images first, from 50% on, in grids of three by three,
    and smooth maps over 15 pixels; Rao et al. ask for 99%, which networks trained with label smoothing
    hardly ever reach. There a map without positive relevance scores 0; here it is scored as an empty map.

    Args:
        model: the model.
        batch: labelled images with targets, the explainer that made the maps, and the dataset's others.
        maps: not looked at: they are of the images alone.
        confidence: least softmax probability of the label, in [0, 1].
        pool: how many images of the dataset there are to choose partners from.
        size: "double" or "half", as above; "auto" is double where the network takes it.

    Returns:
        The score (B,); NaN with a reason for images that are not scored.

    Raises:
        RequestError: a parameter is wrong, the network does not take images of that size, or there is
            no run whose dataset could give other images.
    """
    _check(confidence, pool, size)
    if batch.pool is None or batch.labels is None:
        raise RequestError(
            "metric 'grid-pointing' sets an image among others of its dataset, of which there are none here; "
            "use faithmap.run on a labelled dataset"
        )
    double = _doubles(batch.pool, batch.size, size)
    reasons, chosen = _unfit(batch, confidence), {}
    for i in [i for i, reason in enumerate(reasons) if not reason]:
        shown = _others(batch.pool, batch.ids[i], int(batch.labels[i]), confidence, pool)
        if len(shown) == PLACES - 1:
            chosen[i] = shown
        else:
            reasons[i] = "fewer than three other classes have an image that the model is right and sure of"
    values = torch.full((len(batch),), torch.nan, dtype=torch.float64)
    empty: list[int] = []
    failed: dict[int, str] = {}
    # As many pixels at a time as the batch itself has.
    positions, at_once = list(chosen), max(1, len(batch) // PLACES) if double else len(batch)
    for start in range(0, len(positions), at_once):
        part = positions[start : start + at_once]
        mosaics = _mosaics(batch.select(part), [chosen[i] for i in part], double)
        found = explain_again(model, mosaics.batch, "grid-pointing")
        shares = share_within(found.maps, mosaics.quarter).cpu()
        values[part] = 100 * shares
        empty += [i for i, share in zip(part, shares.tolist(), strict=True) if share != share]
        failed |= {part[k]: reason for k, reason in failures(found, "the map of the mosaic").items()}
    return {"grid_pg": Scored(values, reasons=reasons, empty=empty, failed=failed)}


def _check(confidence: float, pool: int, size: str) -> None:
    if not 0 <= confidence <= 1:
        raise RequestError(
            f"metric 'grid-pointing', parameter 'confidence': got {confidence}, expected a probability"
        )
    if pool < PLACES:
        raise RequestError(
            f"metric 'grid-pointing', parameter 'pool': got {pool}, expected at least {PLACES}"
        )
    if size not in SIZES:
        raise RequestError(f"metric 'grid-pointing', parameter 'size': got {size!r}; {nearest(size, SIZES)}")


def _doubles(pool: Pool, size: tuple[int, int], wanted: str) -> bool:
    """Whether mosaics show their images at full size."""
    if wanted == "half":
        return False
    twice = (SIDE * size[0], SIDE * size[1])
    takes = pool.takes(twice)
    if wanted == "double" and not takes:
        raise RequestError(
            f"metric 'grid-pointing', parameter 'size': got 'double', but the model takes no images of "
            f'{twice[0]} x {twice[1]} pixels; use size = "half"'
        )
    return takes


def _unfit(batch: Batch, confidence: float) -> list[str]:
    """Why an image is in no mosaic, empty where it is: the same images whatever the map."""
    assert batch.labels is not None
    chances = batch.logits.float().softmax(1)
    reasons = []
    known = zip(batch.labels.tolist(), batch.predicted.tolist(), batch.targets.tolist(), strict=True)
    for i, (label, predicted, target) in enumerate(known):
        sure = float(chances[i, label]) if label >= 0 else 0.0
        if label < 0:
            reasons.append("the image has no label")
        elif predicted != label:
            reasons.append("the model is wrong")
        elif target != label:
            reasons.append("the run explains another class than the label")
        elif sure < confidence:
            reasons.append(f"the model gives the label {sure:.2f}, less than {confidence:g}")
        else:
            reasons.append("")
    return reasons


def _others(pool: Pool, name: str, label: int, confidence: float, most: int) -> list[Tensor]:
    """The partners of an image, (3, H, W) each."""
    images = [pool.image(sample) for sample in pool.partners(name, label, PLACES - 1, confidence, most)]
    return [image for image in images if image is not None]


@dataclass(frozen=True)
class _Mosaics:
    """Mosaics as a batch, with truths that belong to the image that each is of."""

    batch: Batch
    #: Bool (B, H, W): the image's quarter.
    quarter: Tensor


def _mosaics(own: Batch, others: list[list[Tensor]], double: bool) -> _Mosaics:
    """Set each image of a batch among its three partners."""
    height, width = (SIDE * side if double else side for side in own.size)
    tiles = rectangles(height, width)
    canvas = own.images.new_zeros(len(own), 3, height, width)
    quarter = torch.zeros(len(own), height, width, dtype=torch.bool, device=own.images.device)
    masks = None if own.masks is None else torch.zeros_like(quarter)
    boxes = None if own.boxes is None else list[torch.Tensor]()
    for i, partners in enumerate(others):
        place = place_of(own.ids[i])
        shown = [image.to(canvas) for image in partners]
        shown.insert(place, own.images[i])
        for tile, image in zip(tiles, shown, strict=True):
            canvas[(i, slice(None), *tile)] = fitted(image, canvas[(i, slice(None), *tile)].shape)
        here = tiles[place]
        quarter[(i, *here)] = True
        if masks is not None and own.masks is not None:
            masks[(i, *here)] = fitted(own.masks[i].float()[None], masks[(i, *here)].shape)[0] >= 0.5
        if boxes is not None and own.boxes is not None:
            scale = torch.tensor([_length(here[1]) / own.size[1], _length(here[0]) / own.size[0]] * 2)
            boxes.append(own.boxes[i] * scale + torch.tensor([here[1].start, here[0].start] * 2))
    grid = own.grid if own.grid is None or not double else (SIDE * own.grid[0], SIDE * own.grid[1])
    return _Mosaics(with_images(own, canvas, masks=masks, void=None, boxes=boxes, grid=grid), quarter)


def rectangles(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the four places; where a side is odd, the last ones are a pixel longer."""
    rows = slice(0, height // SIDE), slice(height // SIDE, height)
    columns = slice(0, width // SIDE), slice(width // SIDE, width)
    return [(row, column) for row in rows for column in columns]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def place_of(name: str) -> int:
    """The place that an image takes in its mosaic."""
    return seed_of(0, "place", name) % PLACES


def fitted(image: Tensor, shape: torch.Size) -> Tensor:
    """An image (C, H, W) at the size of a place, by an antialiased bilinear resize."""
    if image.shape[-2:] == shape[-2:]:
        return image
    small = torch.nn.functional.interpolate(
        image[None], size=tuple(shape[-2:]), mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].clamp(0, 1)


def share_within(maps: Tensor, regions: Tensor) -> Tensor:
    """Share (B,) of the positive relevance of maps (B, H, W) in regions; NaN where there is none."""
    positive = maps.clamp_min(0).flatten(1).double()
    # Only the ratio counts; sums of very small or very large maps stay in range this way.
    peak = positive.amax(1, keepdim=True)
    positive = positive / peak.masked_fill(peak == 0, 1)
    return (positive * regions.flatten(1)).sum(1) / positive.sum(1)
