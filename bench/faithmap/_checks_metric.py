"""The checks of metrics, made on images whose right answer is planted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from faithmap._checks import (
    CheckError,
    CheckSkipped,
    Seen,
    check_common_facts,
    fail,
    listed,
    watch,
)
from faithmap._planted import IMAGES, planted_batch, planted_maps, planted_model, turned
from faithmap.batch import Batch, Scored
from faithmap.columns import is_cost
from faithmap.explaining import HANDED
from faithmap.models import Model
from faithmap.plugin import Plugin
from faithmap.records import Direction

#: Largest difference between values that should be equal, as a share of the value (or of 1).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Scores:
    """What a metric returned for one batch, and what it did beside."""

    values: Mapping[str, Scored]
    seen: Seen
    #: What became of the maps that it was given.
    maps_written: bool = False


class MetricTrial:
    """One metric on the planted images; each kind of call is made once."""

    model = ""

    def __init__(self, plugin: Plugin, params: Mapping[str, Any]) -> None:
        self.plugin = plugin
        self.params = params
        self._kept: dict[str, Scores] = {}

    @cached_property
    def network(self) -> Model:
        """The planted model."""
        return planted_model()

    @cached_property
    def batch(self) -> Batch:
        """The planted images."""
        return planted_batch(self.network)

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """The planted maps."""
        return planted_maps(self.batch)

    def score(self, name: str) -> Scores:
        """Score one kind of planted map.

        Raises:
            CheckSkipped: what the metric returns is no scores; `check_scores` says so.
        """
        if not self.sound:
            raise CheckSkipped("not tried: what the metric returns is no scores, see check_scores")
        if name not in self._kept:
            self._kept[name] = self.call(self.batch.select(range(IMAGES)), self.maps[name])
        found = self._kept[name]
        if found.seen.error is not None or not found.values:
            raise fail(
                f"on a map ({name}) the metric raises {found.seen.said}",
                "scores",
                "Any map that is not constant may come.",
            )
        return found

    @cached_property
    def sound(self) -> bool:
        """Whether `check_scores` passes."""
        try:
            check_scores(self)
        except CheckError:
            return False
        return True

    def call(self, batch: Batch, maps: Tensor) -> Scores:
        """One watched call."""
        given = maps.clone()
        inner = self.plugin.make(dict(self.params))
        seen = watch(lambda: inner(self.network, batch, given), self.network, batch)
        values: dict[str, Scored] = {}
        if isinstance(seen.result, Mapping):
            for name, scored in seen.result.items():
                kept = scored if isinstance(scored, Scored) else Scored(scored)
                values[str(name)] = replace(kept, values=torch.as_tensor(kept.values).detach().double().cpu())
        return Scores(values, seen, not torch.equal(given, maps))

    @property
    def compared(self) -> list[str]:
        """The scores that depend on the map and not on the clock."""
        return [name for name in self.plugin.facts.scores if not is_cost(name)]

    def require_map(self) -> None:
        """Skip where the metric judges the explainer rather than a map."""
        if self.plugin.facts.needs & HANDED:
            raise CheckSkipped("calls the explainer itself: a planted map tells nothing of it")


def _apart(one: Tensor, two: Tensor) -> Tensor:
    """Differences as shares of the value, or of 1; where one value alone is NaN, infinite."""
    gap = (one - two).abs() / torch.maximum(one.abs(), torch.ones_like(one))
    missing = one.isnan() != two.isnan()
    return gap.masked_fill(missing, torch.inf).nan_to_num(0.0, torch.inf)


# --- the checks ------------------------------------------------------------------------------------


def check_facts(trial: MetricTrial) -> None:
    """Version, source, docstring, scores with directions; fallbacks and bounds name declared scores."""
    check_common_facts(trial.plugin)
    facts = trial.plugin.facts
    if not facts.scores:
        raise fail("scores is empty", "at least one score", 'Declare scores={"name": "higher"}.')
    for name, direction in facts.scores.items():
        if direction not in get_args(Direction):
            raise fail(
                f"score '{name}' has the direction {direction!r}",
                " or ".join(f'"{word}"' for word in get_args(Direction)),
                "Say which way is better.",
            )
    stand_ins = {name for name in facts.fallback.values() if name}
    named = {"fallback": {*facts.fallback, *stand_ins}, "map_free": facts.map_free,
             "bounds": {*facts.bounds}}  # fmt: skip
    for fact, names in named.items():
        unknown = sorted(set(names) - set(facts.scores))
        if unknown:
            raise fail(
                f"{fact} names '{unknown[0]}'", "scores that are declared", "Add it to scores=, or drop it."
            )


def check_scores(trial: MetricTrial) -> None:
    """The scores returned are declared ones, one value an image; NaN comes with a reason."""
    scored = trial.call(trial.batch.select(range(IMAGES)), trial.maps["oracle"])
    if scored.seen.error is not None:
        raise fail(
            f"the metric raises {scored.seen.said}", "scores of the planted images", "See the error."
        ) from scored.seen.error
    if not isinstance(scored.seen.result, Mapping) or not scored.values:
        raise fail(
            f"the metric returns {'an empty dictionary' if scored.seen.result == {} else _kind(scored)}",
            "a dictionary of scores",
            'Return {"name": values}, values being a tensor (B,) or a faithmap.Scored.',
        )
    undeclared = sorted(set(scored.values) - set(trial.plugin.facts.scores))
    if undeclared:
        raise fail(
            f"the score '{undeclared[0]}' is returned",
            f"declared ones: {', '.join(trial.plugin.facts.scores)}",
            "Add it to scores= with its direction, or do not return it.",
        )
    for name, values in scored.values.items():
        _check_shape(name, values)


def _kind(scored: Scores) -> str:
    return f"a {type(scored.seen.result).__name__}"


def _check_shape(name: str, scored: Scored) -> None:
    if scored.values.shape != (IMAGES,):
        raise fail(
            f"score '{name}' has the shape {tuple(scored.values.shape)} for {IMAGES} images",
            f"({IMAGES},)",
            "Return a value for each image, not their mean.",
        )
    if scored.curves is not None and (scored.curves.ndim != 2 or len(scored.curves) != IMAGES):
        raise fail(
            f"the curves of '{name}' have the shape {tuple(scored.curves.shape)}",
            f"({IMAGES}, points)",
            "Return a curve for each image.",
        )
    if scored.reasons and len(scored.reasons) != IMAGES:
        raise fail(
            f"score '{name}' comes with {len(scored.reasons)} reasons for {IMAGES} images",
            "one each",
            'Leave the reason "" where there is a value.',
        )
    for i, value in enumerate(scored.values.tolist()):
        told = (scored.reasons[i] if scored.reasons else "") or i in scored.empty or i in scored.failed
        counted = scored.only is None or i in scored.only
        if counted and not told and not abs(value) < float("inf"):
            raise fail(
                f"score '{name}' of image {i} is {value}, without a reason",
                "a number, or NaN with a reason",
                "Return faithmap.Scored(values, reasons=[...]); a NaN without a reason counts as a failure.",
            )


def check_direction(trial: MetricTrial) -> None:
    """The planted answer beats random maps, and these beat its inverse, in the declared direction."""
    trial.require_map()
    facts = trial.plugin.facts
    told = []
    judged = [name for name in trial.compared if facts.scores[name] != "none" and name not in facts.map_free]
    if not judged:
        raise CheckSkipped("declares no direction")
    for name in judged:
        found = _oriented(trial, name)
        if found is None:
            continue
        oracle, random, inverse = found
        gap = oracle - inverse
        known = gap.isfinite()
        if not bool(known.any()):
            continue  # undefined for one of the two: it cannot be seen here
        told.append(name)
        wrong = float(gap[known].mean()) <= 1e-9 or _worse(oracle - random) or _worse(random - inverse)
        if wrong:
            sign = -1.0 if facts.scores[name] == "lower" else 1.0
            kinds = {"oracle": oracle, "random": random, "inverse": inverse}
            text = ", ".join(f"{kind} {sign * float(v[known].nanmean()):.3g}" for kind, v in kinds.items())
            raise fail(
                f"score '{name}': {text}, on images whose evidence is the oracle's patch alone",
                f'the order oracle, random, inverse, since "{facts.scores[name]}" is declared to be better',
                'Turn the direction in scores=, or declare "none" where a score tells no truth of a map.',
            )
    if not told:
        raise fail(
            f"none of the scores {', '.join(judged)} has values on the planted images",
            "a value for the oracle and for its inverse",
            "See that maps are ranked and truths are used as they are given.",
        )


def _oriented(trial: MetricTrial, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Values (B,) of the oracle, of random maps and of the inverse; more is better."""
    sign = -1.0 if trial.plugin.facts.scores[name] == "lower" else 1.0
    oracle, inverse = _values(trial, "oracle", name), _values(trial, "inverse", name)
    draws = [_values(trial, kind, name) for kind in trial.maps if kind.startswith("random")]
    known = [values for values in draws if values is not None]
    if oracle is None or inverse is None or not known:
        return None
    return sign * oracle, sign * torch.stack(known).nanmean(0), sign * inverse


def _values(trial: MetricTrial, kind: str, name: str) -> Tensor | None:
    scored = trial.score(kind).values.get(name)
    return None if scored is None else scored.values


def _worse(gain: Tensor) -> bool:
    """Whether a gain (B,) is negative by more than its own noise, two standard errors."""
    gain = gain[gain.isfinite()]
    if len(gain) < 2:
        return False
    error = float(gain.std()) / math.sqrt(len(gain))
    return float(gain.mean()) < -1e-6 - 2 * error


def check_bounds(trial: MetricTrial) -> None:
    """Values lie between the declared bounds, whatever the map."""
    bounds = trial.plugin.facts.bounds
    if not bounds:
        raise CheckSkipped("declares no bounds=")
    for kind in trial.maps:
        for name, (low, high) in bounds.items():
            values = _values(trial, kind, name)
            if values is None:
                continue
            known = values[values.isfinite()]
            beyond = (known < low - 1e-6) | (known > high + 1e-6)
            if bool(beyond.any()):
                raise fail(
                    f"score '{name}' of a map ({kind}) is {float(known[beyond][0]):.6g}",
                    f"{low:g} to {high:g} as declared",
                    "Mend the formula or bounds=; percent is the unit of boards.",
                )


def check_undefined(trial: MetricTrial) -> None:
    """Where an image lacks what the metric needs, the score is NaN with a reason, never a made-up number."""
    needs = trial.plugin.facts.needs - HANDED
    if not needs:
        raise CheckSkipped("needs nothing that an image could lack")
    for need in sorted(needs):
        silent = True
        for kind in ("oracle", "inverse"):
            whole, bare = trial.score(kind), trial.call(_without(trial.batch, need), trial.maps[kind])
            if bare.seen.error is not None:
                raise fail(
                    f"on an image without its {need} the metric raises {bare.seen.said}",
                    "NaN with a reason",
                    "One image without a truth must not cost the others their values.",
                )
            for name, scored in bare.values.items():
                value, before = float(scored.values[0]), float(whole.values[name].values[0])
                if value != value:
                    silent = False
                    if not (scored.reasons and scored.reasons[0]):
                        raise fail(
                            f"score '{name}' of an image without its {need} is NaN, without a reason",
                            "a reason",
                            "Return faithmap.Scored(values, reasons=[...]), else it counts as a failure.",
                        )
                elif value != before:
                    raise fail(
                        f"score '{name}' of an image without its {need} is {value:g}",
                        "NaN with a reason",
                        "Where it is undefined, return NaN: a made-up number would enter the mean.",
                    )
        if silent:
            raise fail(
                f'needs="{need}" is declared, but an image without it is scored as one with it',
                "NaN with a reason",
                "Return NaN where it lacks, or drop the need.",
            )


def _without(batch: Batch, need: str) -> Batch:
    """The batch with an image that lacks a truth, as the core hands it over."""
    assert batch.labels is not None and batch.masks is not None and batch.boxes is not None
    bare = batch.select(range(IMAGES))
    masks, labels = batch.masks.clone(), batch.labels.clone()
    boxes = [box.clone() for box in batch.boxes]
    if need in ("mask", "region"):
        masks[0] = False
    if need in ("box", "region"):
        boxes[0] = torch.zeros(0, 4)
    if need == "label":
        labels[0] = -1
    return replace(bare, masks=masks, labels=labels, boxes=boxes)


def check_ties(trial: MetricTrial) -> None:
    """Tied pixels are not taken in the order in which they lie in memory."""
    trial.require_map()
    _require_steady(trial)
    gaps: dict[str, dict[str, Tensor]] = {}
    for kind in ("random 0", "tied"):
        whole = trial.batch.select(range(IMAGES))
        other, maps = turned(whole, trial.maps[kind])
        found, here = trial.call(other, maps), trial.score(kind)
        gaps[kind] = {
            name: _apart(here.values[name].values, found.values[name].values)
            for name in trial.compared
            if name in here.values and name in found.values
        }
    for name, gap in gaps["tied"].items():
        # What changes for maps without ties as well is no matter of ties.
        if float(gap.max()) > TOLERANCE + float(gaps["random 0"][name].max()):
            raise fail(
                f"score '{name}' of a map with ties changes when image, truths and map are turned around",
                "the same value",
                "Order pixels with faithmap.perturb.removal_ranks(maps, batch.ties()): argmax, topk and "
                "argsort take whichever of tied pixels lies first.",
            )


def check_batch(trial: MetricTrial) -> None:
    """A value does not depend on the other images of the batch."""
    _require_steady(trial)
    together = trial.score("random 0").values
    for i in range(IMAGES):
        found = trial.call(trial.batch.select([i]), trial.maps["random 0"][i : i + 1])
        for name in trial.compared:
            if name not in together:
                continue
            alone = found.values.get(name)
            gap = (
                torch.tensor(torch.inf)
                if alone is None
                else _apart(together[name].values[i], alone.values[0])
            )
            if float(gap) > TOLERANCE:
                single = "not returned" if alone is None else f"{float(alone.values[0]):.6g}"
                raise fail(
                    f"score '{name}' of image {i} is {float(together[name].values[i]):.6g} in a batch of "
                    f"{IMAGES}, {single} alone",
                    "the same value",
                    "Compute image by image: no mean, rank or seed over the batch.",
                )


def check_same_twice(trial: MetricTrial) -> None:
    """The same maps get the same values, to the bit."""
    unsteady = _unsteady(trial)
    if unsteady:
        raise fail(
            f"score '{unsteady[0]}' differs between two calls",
            "the same values",
            "Seed what is drawn by image: faithmap.batch.seed_of(batch.seed, name, image id).",
        )


def _unsteady(trial: MetricTrial) -> list[str]:
    """The scores that differ between two calls on the same maps."""
    if "again" not in trial.maps:
        trial.maps["again"] = trial.maps["random 0"]
    once, again = trial.score("random 0").values, trial.score("again").values
    return [name for name in trial.compared if name in once and not _same(once[name], again.get(name))]


def _same(one: Scored, two: Scored | None) -> bool:
    return two is not None and bool(torch.equal(one.values.nan_to_num(), two.values.nan_to_num()))


def _require_steady(trial: MetricTrial) -> None:
    if _unsteady(trial):
        raise CheckSkipped("not tried: values differ from call to call, see check_same_twice")


def check_inputs(trial: MetricTrial) -> None:
    """Maps, images and truths are not written to."""
    scored = trial.score("signed")
    names = (["maps"] if scored.maps_written else []) + [f"batch.{n}" for n in scored.seen.changes["inputs"]]
    if names:
        raise fail(
            f"written to: {listed(names)}",
            "inputs left alone",
            "The next metric sees the same tensors: clone before changing one in place.",
        )


def check_model(trial: MetricTrial) -> None:
    """The model and the process are as before: weights, gradients, flags, hooks, random states."""
    changes = trial.score("signed").seen.changes
    for kind in ("weights", "gradients", "flags", "hooks", "random state", "settings"):
        if changes[kind]:
            raise fail(
                f"{kind} changed: {listed(changes[kind])}",
                "everything as before",
                "Restore what you switch in a finally block; draw from a generator of your own.",
            )


def check_warnings(trial: MetricTrial) -> None:
    """No warning is given."""
    given = [text for kind in ("oracle", "signed") for text in trial.score(kind).seen.warnings]
    if given:
        raise fail(f"{len(given)} warnings, the first: {given[0]}", "none", "Mend the cause.")


Check = Callable[[MetricTrial], str | None]
CHECKS: Sequence[Check] = (
    check_facts, check_scores, check_direction, check_bounds, check_undefined, check_ties, check_batch,
    check_same_twice, check_inputs, check_model, check_warnings,
)  # fmt: skip
SLOW_CHECKS: Sequence[Check] = ()
