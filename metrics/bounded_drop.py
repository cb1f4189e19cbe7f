"""Drop and increase with bounds, which a small change of the scores moves little (a reconstruction)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import metric
from faithmap.batch import Scored
from faithmap.cam import SPACES
from faithmap.errors import RequestError, nearest
from faithmap.masking import rectified, target_scores, without_empty

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

SCORES: dict[str, Direction] = {
    "bounded_drop": "lower",
    "bounded_increase": "higher",
    "bounded_drop_limit": "none",
    "bounded_increase_limit": "none",
}


@metric(
    version=1,
    source="a reconstruction of what InfoCAM (2026) announces: its abstract names drop and increase with "
    "explicit bounds, less sensitive to fluctuations of the score; its formulas are not public",
    scores=SCORES,
    bounds=dict.fromkeys(SCORES, (0, 100)),
    map_free={"bounded_drop_limit", "bounded_increase_limit"},
)
def bounded_drop(
    model: Model, batch: Batch, maps: Maps, *, floor: float = 0.05, space: str = "pixel"
) -> dict[str, Values]:
    """The change of the target's probability behind the map, between bounds and with a bounded slope.

    S is the map after ReLU, then min-max to [0, 1]; Y and O are the softmax probabilities of the target
    on x and on x S, as in `drop`; t > 0 is the floor. With

        G(Y, O) = (1 + t) (O - Y) / (max(O, Y) + t)

    the scores of an image are, in percent:

    - `bounded_drop` = 100 max(-G, 0), 0 to 100, and `bounded_increase` = 100 max(G, 0), 0 to 100;
    - `bounded_drop_limit` = 100 (1 + t) Y / (Y + t) and `bounded_increase_limit` = 100 (1 - Y): the
      most that any map can score on this image. They tell nothing of the map.

    Bounds. Let M = max(O, Y). Since 0 <= O, Y <= 1, |O - Y| <= M, so |G| <= (1 + t) M / (M + t), which
    rises with M and is 1 at M = 1: both scores lie in [0, 100], and 100 is reached only where one of
    the two is 1 and the other 0.

    Limits. For O < Y the drop is 100 (1 + t) (Y - O) / (Y + t), which falls as O rises: it is largest
    at O = 0, where it is the drop's limit. For O > Y, dG/dO = (1 + t) (Y + t) / (O + t)^2 > 0: G is
    largest at O = 1, where it is 1 - Y.

    Slope. For O > Y, |dG/dY| = (1 + t) / (O + t) and dG/dO <= (1 + t) / (O + t), both at most
    (1 + t) / t; for O < Y likewise with Y in the place of O, and G is continuous at O = Y. Where both
    probabilities move by at most e, each score moves by at most 200 e (1 + t) / t. The average drop has
    a slope of 1 / Y and the average gain one of 1 / (1 - Y), without a bound, and the increase jumps.

    G(O, Y) = -G(Y, O), so an image has a drop or an increase, never both, and the mean drop and the mean
    increase add up to 100 at most. As t falls to 0 the bounded drop becomes the average drop; as t
    grows G becomes O - Y.

    As with the drop, bright maps score well whatever they show: read both beside `area`. Maps without
    positive values are scored as empty maps.

    Args:
        model: the model.
        batch: images with targets.
        maps: (B, H, W), raw signs.
        floor: t, a probability above 0. The default bounds the slope by 21.
        space: "pixel": x S in [0, 1], zero is black; "normalised": x S behind the normalisation, zero
            is the mean colour.

    Raises:
        RequestError: the floor is not positive, or the space is unknown.
    """
    if not 0 < floor < float("inf"):
        raise RequestError(
            f"metric 'bounded-drop', parameter 'floor': got {floor}; expected a positive number, such as 0.05"
        )
    if space not in SPACES:
        raise RequestError(
            f"metric 'bounded-drop', parameter 'space': got {space!r}; {nearest(space, SPACES)}"
        )
    view, empty = rectified(maps)
    clean, kept = target_scores(model, batch, view.unsqueeze(0), space=space)
    change = 100 * bounded_change(clean, kept[0], floor)
    return {
        "bounded_drop": without_empty(Scored((-change).clamp_min(0)), empty),
        "bounded_increase": without_empty(Scored(change.clamp_min(0)), empty),
        "bounded_drop_limit": Scored(-100 * bounded_change(clean, clean.new_zeros(()), floor)),
        "bounded_increase_limit": Scored(100 * bounded_change(clean, clean.new_ones(()), floor)),
    }


def bounded_change(clean: Tensor, kept: Tensor, floor: float) -> Tensor:
    """G in [-1, 1], of probabilities on the image (`clean`) and on the image behind its map (`kept`)."""
    return (1 + floor) * (kept - clean) / (clean.maximum(kept) + floor)
