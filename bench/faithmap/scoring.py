"""Score maps: bring them to the run's grid, call the metrics, and turn all that comes back into rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from faithmap.batch import Batch, Maps, Scored, Values
from faithmap.columns import variant_title
from faithmap.errors import PluginError, RequestError
from faithmap.explaining import MapSet, describe, guarded
from faithmap.models import Model
from faithmap.plugin import Plugin
from faithmap.records import Direction, Facts, Row, Sample, Spec, Status, canonical_json
from faithmap.registry import get
from faithmap.resize import reduce_to_grid, upsample


@dataclass(frozen=True)
class MetricUse:
    """A metric with its parameters, as one run uses it."""

    plugin: Plugin
    params: dict[str, Any]
    call: Callable[[Model, Batch, Maps], dict[str, Values]]
    #: Names formula, version and parameters; the meaning of a stored value.
    spec: str
    #: Tells a second use of the metric from the first on boards; empty for the default parameters.
    variant: str

    @property
    def facts(self) -> Facts:
        """The facts of the metric."""
        return self.plugin.facts

    @property
    def needs(self) -> frozenset[str]:
        """What an image must come with: of a region the kind that the parameter of this name asks for."""
        kind = self.params.get("region")
        if "region" in self.facts.needs and kind in ("mask", "box"):
            return self.facts.needs - {"region"} | {kind}
        return self.facts.needs

    def title(self, score: str) -> str:
        """The name of a score in the rows: `auc_d`, `auc_d@label`, `auc_d@blur`, `auc_d@label-blur`."""
        return variant_title(score, self.variant)

    @property
    def scores(self) -> dict[str, Direction]:
        """Row names of the scores with their directions."""
        return {self.title(score): direction for score, direction in self.facts.scores.items()}


def use_metric(spec: Spec) -> MetricUse:
    """Check a metric's parameters and name what it computes.

    Raises:
        RequestError: there is no such metric or parameter.
    """
    plugin = get("metric", spec.name)
    params = plugin.check(spec.params)
    defaults = plugin.parameters
    changed = {key: value for key, value in params.items() if value != defaults[key]}
    suffix = (
        f"[{','.join(f'{key}={canonical_json(value)}' for key, value in sorted(changed.items()))}]"
        if changed
        else ""
    )
    variant = ""
    if changed:
        variant = spec.label or "-".join(
            value if isinstance(value, str) else f"{key}={canonical_json(value)}"
            for key, value in changed.items()
        )
    return MetricUse(
        plugin, params, plugin.make(params), f"{plugin.name}/{plugin.facts.version}{suffix}", variant
    )


@dataclass(frozen=True)
class Heading:
    """What all rows of one cell have in common."""

    model: str
    dataset: str
    explainer: str
    params: str
    map_grid: str
    seed: int


@dataclass(frozen=True)
class Verdict:
    """One score of a batch: values, curves, and what became of each image."""

    metric: str
    values: list[float | None]
    status: list[Status]
    reasons: list[str]
    curves: list[tuple[float, ...] | None]
    only: Sequence[int]


def project(maps: Tensor, batch: Batch) -> Tensor:
    """Maps as metrics see them: area mean to the run's grid, then bilinear to (B, H, W)."""
    return upsample(reduce_to_grid(maps, batch.grid), batch.size)


def score_maps(use: MetricUse, model: Model, batch: Batch, found: MapSet) -> list[Verdict]:
    """Score the maps of a batch with one metric; an exception costs only the images that raise it."""
    maps = project(found.maps, batch)
    if use.facts.sample is not None and 0 < len(found.usable) < len(batch):
        return _measured_on(use, model, batch, found)
    if not found.usable and not use.facts.map_free:
        return _blank(use, found)
    try:
        with guarded(model):
            scores = use.call(model, batch, maps)
        return [_verdict(use, score, values, found, len(batch)) for score, values in _checked(use, scores)]
    except RequestError:
        raise
    except Exception as error:
        if len(batch) == 1 or use.facts.sample is not None:
            return _blank(
                use, MapSet(found.maps, ["failed"], [f"metric {use.plugin.name}: {describe(error)}"])
            )
    parts = [
        score_maps(
            use,
            model,
            batch.select([i]),
            MapSet(found.maps[i : i + 1], found.status[i : i + 1], found.reasons[i : i + 1]),
        )
        for i in range(len(batch))
    ]
    return _join(parts)


def _measured_on(use: MetricUse, model: Model, batch: Batch, found: MapSet) -> list[Verdict]:
    """The verdicts of a metric that is measured on some images: on those that have a map."""
    kept = found.usable
    part = MapSet(found.maps[kept], ["ok"] * len(kept), [found.reasons[i] for i in kept])
    verdicts = []
    for one in score_maps(use, model, batch.select(kept), part):
        place = {i: k for k, i in enumerate(kept)}
        whole = range(len(batch))
        verdicts.append(
            Verdict(
                one.metric,
                [one.values[place[i]] if i in place else None for i in whole],
                [one.status[place[i]] if i in place else found.status[i] for i in whole],
                [one.reasons[place[i]] if i in place else found.reasons[i] for i in whole],
                [one.curves[place[i]] if i in place else None for i in whole],
                [kept[k] for k in one.only],
            )
        )
    return verdicts


def _checked(use: MetricUse, scores: Any) -> list[tuple[str, Values]]:
    if not isinstance(scores, Mapping):
        raise PluginError(f"returned a {type(scores).__name__}; expected a dictionary of scores")
    for score in scores:
        if score not in use.facts.scores:
            raise PluginError(f"returned the score '{score}', which its decorator does not declare")
    return list(scores.items())


def _verdict(use: MetricUse, score: str, given: Values, found: MapSet, size: int) -> Verdict:
    scored = given if isinstance(given, Scored) else Scored(given)
    values = torch.as_tensor(scored.values).detach().double().cpu()
    if values.shape != (size,):
        raise PluginError(f"score '{score}' has shape {tuple(values.shape)}; expected ({size},)")
    curves = None if scored.curves is None else scored.curves.detach().double().cpu().tolist()
    verdict = Verdict(use.title(score), [], [], [], [], range(size) if scored.only is None else scored.only)
    for i, value in enumerate(values.tolist()):
        reason, map_free = scored.reasons[i] if scored.reasons else "", score in use.facts.map_free
        status = _status(value, reason, found.status[i], i in scored.empty, map_free)
        if i in scored.failed and status != "skipped" and (map_free or found.status[i] == "ok"):
            status, reason = "failed", scored.failed[i]
        verdict.status.append(status)
        verdict.values.append(value if status == "ok" else None)
        verdict.curves.append(tuple(curves[i]) if curves is not None and status == "ok" else None)
        verdict.reasons.append(_reason(status, reason, found.reasons[i], found.status[i]))
    return verdict


def _status(value: float, reason: str, map_status: Status, empty: bool, map_free: bool) -> Status:
    if math.isnan(value) and reason:
        return "skipped"  # undefined for this image, whatever the map
    if map_status != "ok" and not map_free:
        return map_status
    if empty:
        return "empty"
    return "ok" if math.isfinite(value) else "failed"


def _reason(status: Status, given: str, of_map: str, map_status: Status) -> str:
    if status == "ok":
        return of_map if map_status == "ok" else ""
    fallback = {
        "failed": "the score is NaN or infinite",
        "empty": "the map holds nothing that this score could use",
    }
    of_score = status == "skipped" or map_status == "ok"
    return (given or of_map if of_score else of_map or given) or fallback.get(status, "")


def _blank(use: MetricUse, found: MapSet) -> list[Verdict]:
    """Rows without values, for maps that came to nothing."""
    size = len(found.status)
    only = range(min(size, use.facts.sample or size))
    return [
        Verdict(use.title(score), [None] * size, list(found.status), list(found.reasons), [None] * size, only)
        for score in use.facts.scores
    ]


def _join(parts: list[list[Verdict]]) -> list[Verdict]:
    """Put the verdicts of single images back together, score by score."""
    names = dict.fromkeys(verdict.metric for part in parts for verdict in part)
    joined = []
    for name in names:
        merged = Verdict(name, [], [], [], [], [])
        only: list[int] = []
        for i, part in enumerate(parts):
            single = next((verdict for verdict in part if verdict.metric == name), None)
            only.extend([i] if single is not None and list(single.only) else [])
            merged.values.append(single.values[0] if single else None)
            merged.status.append(single.status[0] if single else "failed")
            merged.reasons.append(single.reasons[0] if single else "")
            merged.curves.append(single.curves[0] if single else None)
        joined.append(replace(merged, only=only))
    return joined


def rows_of(heading: Heading, use: MetricUse, batch: Batch, verdicts: Sequence[Verdict]) -> list[Row]:
    """Rows of one cell, metric and batch."""
    labels = (
        [None if label < 0 else label for label in batch.labels.tolist()]
        if batch.labels is not None
        else None
    )
    predicted, targets = batch.predicted.tolist(), batch.targets.tolist()
    return [
        Row(
            **asdict(heading), spec=use.spec, image_id=batch.ids[i], label=labels[i] if labels else None,
            predicted=predicted[i], target=targets[i], metric=verdict.metric, value=verdict.values[i],
            status=verdict.status[i], reason=verdict.reasons[i], curve=verdict.curves[i],
        )
        for verdict in verdicts
        for i in verdict.only
    ]  # fmt: skip


def skip_rows(heading: Heading, use: MetricUse, samples: Sequence[Sample], reason: str) -> list[Row]:
    """Rows for maps that are not defined: a reason, no value, and no forward pass."""
    return [
        Row(
            **asdict(heading), spec=use.spec, image_id=sample.id, label=sample.label, predicted=None,
            target=None, metric=score, value=None, status="skipped", reason=reason,
        )
        for score in use.scores
        for sample in samples[: use.facts.sample]
    ]  # fmt: skip


def unreadable_row(heading: Heading, sample: Sample, reason: str) -> Row:
    """The row of an image that could not be read: it belongs to no explainer and no metric."""
    return Row(
        **asdict(heading), spec=UNREADABLE, image_id=sample.id, label=sample.label, predicted=None,
        target=None, metric="", value=None, status="failed", reason=reason,
    )  # fmt: skip


#: The spec of rows that record unreadable images.
UNREADABLE = "read"
