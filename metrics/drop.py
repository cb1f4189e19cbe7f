"""Average drop, increase in confidence and their kin: the image times its map (Grad-CAM++, Score-CAM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from faithmap import metric
from faithmap.batch import Scored
from faithmap.cam import READINGS, SPACES
from faithmap.errors import RequestError, nearest
from faithmap.masking import rectified, target_scores, without_empty
from faithmap.perturb import removal_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps, Values
    from faithmap.models import Model
    from faithmap.records import Direction

CHOICES = {
    "space": SPACES,
    "score": READINGS,
    "mute": ("soft", "half"),
}
SCORES: dict[str, Direction] = {
    "average_drop": "lower",
    "increase": "higher",
    "area": "none",
    "average_gain": "higher",
    "scan_inc": "higher",
    "drop_equalised": "lower",
    "increase_equalised": "higher",
}
#: Room to gain below which a gain is not divided any further: fp32 cannot tell 1 - Y from zero there.
LEAST_ROOM = 1e-6


@metric(
    version=1,
    source="Chattopadhay et al. 2018, sec. 4.1 (average drop, increase in confidence); "
    "Zhang et al. 2024 (average gain); SCAN, tables of Drop, Inc and Win",
    scores=SCORES,
    bounds=dict.fromkeys(SCORES, (0, 100)),
)
def drop(
    model: Model,
    batch: Batch,
    maps: Maps,
    *,
    space: str = "pixel",
    score: str = "probability",
    mute: str = "soft",
    margin: float = 1e-3,
) -> dict[str, Values]:
    """What the model still sees of the target when the image is multiplied by its map.

    S is the map after ReLU, then min-max to [0, 1]; Y and O are the softmax probabilities of the
    target on x and on x S. For each image:

    - `average_drop` = 100 (Y - O)^+ / Y, percent, 0 to 100;
    - `increase` = 100 where O > Y + margin, else 0 (SCAN's "Win");
    - `area` = 100 mean(S), percent: how bright the map is;
    - `average_gain` = 100 (O - Y)^+ / (1 - Y), percent, 0 to 100;
    - `scan_inc` = 100 (O - Y), percentage points, on the images that `increase` counts and on no
      others: the reconstruction of SCAN's "Inc" as a mean over winning images;
    - `drop_equalised`, `increase_equalised`: the same with the map replaced by its ranks / (HW - 1),
      in the order in which `perturbation` removes pixels, so that every map is equally bright.

    A map of ones with a single zero keeps the image and scores near-perfect drops: they measure
    brightness as much as place, which is why they stand beside `area` and are never ranked. A map
    without positive values is scored as an empty map, except by its ranks.

    Args:
        model: the model.
        batch: images with targets.
        maps: (B, H, W), raw signs.
        space: "pixel": x S in [0, 1], zero is black; "normalised": x S behind the normalisation,
            zero is the mean colour (torchcam, ScoreCAM++'s code).
        score: "probability", or "logit" as in ScoreCAM++'s code: Y and O are logits of the target
            and ties count as increases; the drop is defined where Y > 0 and may exceed 100, the
            gains are not defined.
        mute: "soft": x S as above; "half": only the better half of the pixels of S is kept, the
            others are zero (Score-CAM mutes half of the pixels; reconstruction).
        margin: by how much O must exceed Y to count as an increase. Of logits, whose scale is the model's,
            equality will do; 0 then counts every tie, as the code of ScoreCAM++ does.
    """
    for name, given in (("space", space), ("score", score), ("mute", mute)):
        if given not in CHOICES[name]:
            raise RequestError(
                f"metric 'drop', parameter '{name}': got {given!r}; {nearest(given, CHOICES[name])}"
            )
    ranks = removal_ranks(maps, batch.ties()).view_as(maps)
    view, empty = rectified(maps)
    equalised = 1 - ranks / max(1, ranks[0].numel() - 1)
    if mute == "half":
        best = ranks < ranks[0].numel() // 2
        view, equalised = view * best, equalised * best
    clean, kept = target_scores(model, batch, torch.stack([view, equalised]), space=space, score=score)
    soft, equal = _Pair(clean, kept[0], margin, score), _Pair(clean, kept[1], margin, score)
    scores = {
        "average_drop": soft.drop(),
        "increase": soft.increase(),
        "area": Scored(100 * view.double().mean((1, 2))),
        "average_gain": soft.gain(),
        "scan_inc": soft.winning_gain(),
    }
    scores = {name: without_empty(scored, empty) for name, scored in scores.items()}
    return {**scores, "drop_equalised": equal.drop(), "increase_equalised": equal.increase()}


@dataclass(frozen=True)
class _Pair:
    """Y and O (B,) of one kind of mask, and the scores that follow from them."""

    clean: Tensor
    kept: Tensor
    margin: float
    score: str

    def drop(self) -> Scored:
        """100 (Y - O)^+ / Y; undefined for a logit that is not positive."""
        lost = (
            100
            * (self.clean - self.kept).clamp_min(0)
            / self.clean.clamp_min(torch.finfo(torch.float32).tiny)
        )
        if self.score == "probability":
            return Scored(lost)
        undefined = self.clean <= 0
        return Scored(
            lost.masked_fill(undefined, torch.nan), reasons=_say(undefined, "the clean logit is not positive")
        )

    def wins(self) -> Tensor:
        """Whether the masked image scores higher (B,); on logits equality will do, as in the code read."""
        bar = self.clean + self.margin
        return self.kept > bar if self.score == "probability" else self.kept >= bar

    def increase(self) -> Scored:
        """100 where the score rises by more than the margin, else 0."""
        return Scored(100 * self.wins().double())

    def gain(self) -> Scored:
        """100 (O - Y)^+ / (1 - Y)."""
        room = (1 - self.clean).clamp_min(LEAST_ROOM)
        return self._probability(100 * ((self.kept - self.clean).clamp_min(0) / room).clamp_max(1))

    def winning_gain(self) -> Scored:
        """100 (O - Y) where the score rises, undefined elsewhere."""
        losing = ~self.wins()
        scored = self._probability((100 * (self.kept - self.clean)).masked_fill(losing, torch.nan))
        return scored if scored.reasons else Scored(scored.values, reasons=_say(losing, "no gain"))

    def _probability(self, values: Tensor) -> Scored:
        if self.score == "probability":
            return Scored(values)
        everywhere = torch.ones_like(values, dtype=torch.bool)
        return Scored(
            values.masked_fill(everywhere, torch.nan), reasons=_say(everywhere, "defined for probabilities")
        )


def _say(where: Tensor, reason: str) -> list[str]:
    return [reason if here else "" for here in where.tolist()]
