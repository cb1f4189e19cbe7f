"""From rows to arrays: what was measured for one model and one dataset, image by image.

Here a row's status becomes a number: maps that are empty or failed are scored as the reference
null's mean on the same image (protocols: "Status of a map"), the draws of a null are averaged per
image, and a method's own moved maps are told from its maps. Everything after this is statistics.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from faithmap._curves import Curves, mean_curves
from faithmap.columns import base_score, is_cost, is_time, ordered_scores
from faithmap.errors import FaithmapError, RequestError
from faithmap.records import PRIMARY_SCORE, REFERENCE_NULL, canonical_json
from faithmap.sources import asked_for

FloatArray = npt.NDArray[np.float64]
CodeArray = npt.NDArray[np.int8]

COLUMNS = (
    "model", "dataset", "explainer", "params", "map_grid", "seed", "spec", "image_id", "label",
    "predicted", "target", "metric", "value", "status", "reason",
)  # fmt: skip

ABSENT, OK, EMPTY, FAILED, SKIPPED = range(5)
_CODES = {"ok": OK, "empty": EMPTY, "failed": FAILED, "skipped": SKIPPED}
#: Scores known to be 0 or 100 an image, even where every image of a cell gives the same.
_HITS = {"increase", "increase_equalised", "pointing"}
#: Key of the reference null where the request does not show it as a line of its own.
_HIDDEN_NULL = "\0" + REFERENCE_NULL


@dataclass(frozen=True)
class Maps:
    """The scores of one line's maps; a draw of a null is a plane of its own."""

    #: (K, S, N): draws, scores, images; NaN where there is no value.
    values: FloatArray
    #: (K, S, N): ABSENT, OK, EMPTY, FAILED or SKIPPED.
    status: CodeArray
    #: The most frequent reason among skipped rows, else "".
    skip_reason: str = ""


@dataclass(frozen=True)
class Evidence:
    """One (model, dataset): the arrays that its board is computed from."""

    model: str
    dataset: str
    #: Images asked for less those that could not be read.
    n: int
    #: Scores of the rows in registry order, and image ids in sorted order.
    scores: tuple[str, ...]
    images: tuple[str, ...]
    #: Explainer label -> (S, N) values, substituted and averaged over draws.
    values: Mapping[str, FloatArray]
    #: (Label, "swapped" or "rolled") -> (S, N), the mean of the draws of the moved maps.
    moved: Mapping[tuple[str, str], FloatArray]
    #: (S, N): the mean of the reference null's draws; NaN where it was not run.
    null: FloatArray
    #: Explainer label -> number of images on which any score failed, or was of an empty map.
    failed: Mapping[str, int]
    empty: Mapping[str, int]
    #: Explainer label -> number of images on which the score that ranks failed.
    unranked: Mapping[str, int]
    #: Explainer label -> why it was not run on this model, where that is so.
    skipped: Mapping[str, str]
    #: Explainer label -> what it noted of maps that were scored all the same, and of how many images.
    notes: Mapping[str, Mapping[str, int]]
    #: Score -> whether its values are 0 and 100 (or 0 and 1) throughout; the value of a hit.
    hit_value: Mapping[str, float]
    #: (N,) class indices, NaN where unknown.
    labels: FloatArray
    predicted: FloatArray
    #: (Label, time) -> every timing (T,) in milliseconds, where the rows keep them.
    timings: Mapping[tuple[str, str], FloatArray] = field(repr=False, default_factory=dict)
    #: Mean perturbation curves, for the figures.
    curves: Curves = field(repr=False, default_factory=Curves)
    manifest: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def score(self, label: str, score: str) -> FloatArray:
        """Values (N,) of one score; all NaN where it was not measured."""
        if label not in self.values or score not in self.scores:
            return np.full(len(self.images), np.nan)
        return np.asarray(self.values[label][self.scores.index(score)])

    def null_score(self, score: str) -> FloatArray:
        """The reference null's mean (N,) of one score; all NaN where it was not measured."""
        if score not in self.scores:
            return np.full(len(self.images), np.nan)
        return np.asarray(self.null[self.scores.index(score)])

    def role(self, label: str) -> str:
        """ "method", "control" or "null"."""
        return str(self.manifest.get("explainers", {}).get(label, {}).get("role", "method"))

    def method(self, label: str) -> str:
        """The registry name of a line's explainer, which lines with other parameters share."""
        return _method(label, self.manifest)

    def unreliable(self, label: str) -> str:
        """Which plugin of a line fails checks of the kit, so that it is not ranked; empty where none does."""
        for kind, name, what in (
            ("explainers", label, "unreliable"), ("datasets", self.dataset, "unreliable dataset")
        ):  # fmt: skip
            if not self.manifest.get(kind, {}).get(name, {}).get("reliable", True):
                return what
        return ""

    @property
    def explainers(self) -> list[str]:
        """The labels that were asked for here, in the order of the request."""
        return asked_for(self.manifest, self.model, self.dataset)


def _method(label: str, manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("explainers", {}).get(label, {}).get("name", label))


def snap(values: FloatArray) -> FloatArray:
    """Round to multiples of 2^-20 (a millionth), so that sums of values are exact.

    Means, intervals and ranks then do not depend on the order of summation, the number of
    threads or the linear algebra library: a board is the same to the byte on every machine.
    """
    return np.round(values * 2.0**20) / 2.0**20


def read_evidence(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> list[Evidence]:
    """Arrange the rows of the request's cells, models first, then datasets.

    Raises RequestError where columns are missing and FaithmapError where two rows claim the same
    value, as after mixing two runs.
    """
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise RequestError(f"the rows lack the columns {', '.join(missing)}; give a run's own rows")
    table = _current(rows, manifest)
    groups: dict[Hashable, pd.DataFrame] = dict(
        iter(table.groupby(["model", "dataset"], sort=False, observed=True))
    )
    cells = []
    for model in manifest["request"]["models"]:
        for dataset in manifest["request"]["datasets"]:
            if not asked_for(manifest, model, dataset):  # of several runs, none has both
                continue
            found = groups.get((model, dataset))
            cells.append(_cell(model, dataset, table.iloc[:0] if found is None else found, manifest))
    return cells


def _current(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that belong to lines of the request, with `line`, `null` and `draw` added."""
    known = _lines(rows, manifest)
    pairs = pd.MultiIndex.from_arrays([rows["explainer"], rows["params"]])
    codes, unique = pairs.factorize()
    found = [known.get((str(name), str(params))) for name, params in unique]
    kept = np.array([entry is not None for entry in found], bool)[codes]
    specs = {entry["spec"] for entry in manifest.get("metrics", ()) if entry.get("spec")}
    current = rows["spec"].isin(list(specs)).to_numpy()
    if (current & kept).any():  # rows of an older version of a metric stay in a run folder
        kept &= current | (rows["metric"] == "").to_numpy()
    table: pd.DataFrame = rows[kept].copy()
    for position, name in enumerate(("line", "null", "draw")):
        lookup = np.array([entry[position] if entry else None for entry in found], object)
        table[name] = lookup[codes[kept]]
    table["value"] = pd.to_numeric(table["value"], errors="coerce").astype(np.float64)
    return table


def _lines(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> dict[tuple[str, str], tuple[str, str, int]]:
    """(Explainer, params) of the rows -> (label of its line, kind of moved map or "", draw)."""
    wanted: dict[tuple[str, str], str] = {}
    for label in manifest["request"]["explainers"]:
        entry = manifest.get("explainers", {}).get(label, {})
        params = {k: v for k, v in dict(entry.get("params", {})).items() if k != "draw"}
        for name in (label, _method(label, manifest)):
            wanted[name, canonical_json(params)] = label
    lines = {}
    for name, text in rows[["explainer", "params"]].drop_duplicates().itertuples(index=False):
        params = json.loads(text) if isinstance(text, str) and text else {}
        draw, null = params.pop("draw", 0), params.pop("null", "")
        unseen = _HIDDEN_NULL if name == REFERENCE_NULL else None
        label = wanted.get((str(name), canonical_json(params)), unseen)
        if label is not None:
            lines[str(name), str(text)] = (label, str(null), int(draw))
    return lines


def _cell(model: str, dataset: str, table: pd.DataFrame, manifest: Mapping[str, Any]) -> Evidence:
    scored = table[table["metric"] != ""]
    scores = tuple(ordered_scores(scored["metric"].unique(), manifest))
    images = tuple(sorted(str(image) for image in scored["image_id"].unique()))
    planes = _planes(table, scored, scores, images)
    reference = _reference_line(planes, manifest)
    null = np.full((len(scores), len(images)), np.nan)
    if reference is not None:
        null = _averaged(planes[reference, ""].values)
    labels = manifest["request"]["explainers"]
    own = {label: planes[label, ""] for label in labels if (label, "") in planes}
    stand_ins = _stand_ins(scores, manifest)
    filled = {label: _averaged(_substituted(maps, scores, null, stand_ins)) for label, maps in own.items()}
    moved = {
        key: _averaged(_substituted(maps, scores, null, stand_ins))
        for key, maps in planes.items()
        if key[1] and key[0] in own
    }
    judged = np.array([not is_cost(score) for score in scores], bool)
    ranking = np.array([score == PRIMARY_SCORE for score in scores], bool)
    facts = manifest.get("datasets", {}).get(dataset, {})
    asked = facts.get("images")
    return Evidence(
        model=model,
        dataset=dataset,
        n=len(images) if asked is None else int(asked) - int(facts.get("unreadable") or 0),
        scores=scores,
        images=images,
        values=filled,
        moved=moved,
        null=null,
        failed={label: _images_with(maps, FAILED, judged) for label, maps in own.items()},
        empty={label: _images_with(maps, EMPTY, judged) for label, maps in own.items()},
        unranked={label: _images_with(maps, FAILED, ranking) for label, maps in own.items()},
        skipped={label: maps.skip_reason or "not defined here" for label, maps in own.items()
                 if maps.status.size == 0 or np.isin(maps.status, (SKIPPED, ABSENT)).all()},
        notes=_notes(scored),
        hit_value=_hit_values(scores, own),
        labels=_per_image(scored, "label", images),
        predicted=_per_image(scored, "predicted", images),
        timings=_timings(scored),
        curves=mean_curves(scored, images, list(own), reference),
        manifest=manifest,
    )  # fmt: skip


def _timings(scored: pd.DataFrame) -> dict[tuple[str, str], FloatArray]:
    """All repetitions of each line's times; a row holds its median and, as its curve, all of them."""
    if "curve" not in scored.columns:
        return {}
    times = [score for score in scored["metric"].unique() if is_time(score)]
    timed = scored[scored["metric"].isin(times) & (scored["status"] == "ok") & (scored["null"] == "")]
    has = np.array([hasattr(curve, "__len__") and len(curve) > 0 for curve in timed["curve"]], bool)
    kept = timed[has]
    return {
        (str(line), str(score)): snap(np.concatenate([np.asarray(c, np.float64) for c in group["curve"]]))
        for (line, score), group in kept.groupby(["line", "metric"], sort=True)
    }


def _planes(
    table: pd.DataFrame, scored: pd.DataFrame, scores: Sequence[str], images: Sequence[str]
) -> dict[tuple[str, str], Maps]:
    """Maps by (line, kind of moved map); a line with rows but without scores gets empty arrays."""
    score_at = pd.Index(list(scores)).get_indexer(pd.Index(scored["metric"]))
    image_at = pd.Index(list(images)).get_indexer(pd.Index(scored["image_id"].astype(str)))
    status = scored["status"].map(_CODES).fillna(ABSENT).to_numpy(np.int8)
    values = scored["value"].to_numpy(np.float64)
    draws = scored["draw"].to_numpy(np.int64)
    groups = scored.groupby(["line", "null"], sort=True).indices
    reasons = _skip_reasons(table)
    planes = {}
    for line, null in table[["line", "null"]].drop_duplicates().itertuples(index=False):
        at = groups.get((line, null), np.empty(0, np.intp))
        known, plane = np.unique(draws[at], return_inverse=True)
        shape = (len(known), len(scores), len(images))
        value, code = np.full(shape, np.nan), np.full(shape, ABSENT, np.int8)
        where = (plane, score_at[at], image_at[at])
        code[where] = status[at]
        value[where] = np.where((status[at] == OK) & np.isfinite(values[at]), values[at], np.nan)
        # Any other value that is not a number is a failure, whatever its row claims.
        code[(code == OK) & np.isnan(value)] = FAILED
        if np.unique(np.ravel_multi_index(where, shape)).size != len(at):
            first = scored.iloc[at[:1]]
            raise FaithmapError(
                f"two rows give the same score of the same image for '{first['explainer'].iloc[0]}' on "
                f"{first['model'].iloc[0]} and {first['dataset'].iloc[0]}; "
                "give the rows of one run, one seed and one map grid"
            )
        planes[str(line), str(null)] = Maps(snap(value), code, reasons.get((line, null), ""))
    return planes


def _skip_reasons(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    skipped = table[table["status"] == "skipped"]
    counted = skipped.groupby(["line", "null", "reason"], sort=True).size()
    reasons: dict[tuple[str, str], tuple[int, str]] = {}
    for key, count in counted.items():
        line, null, reason = cast(tuple[str, str, str], key)
        if count > reasons.get((line, null), (0, ""))[0]:
            reasons[line, null] = (int(count), str(reason))
    return {key: reason for key, (_, reason) in reasons.items()}


def _notes(scored: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Reasons on rows that are ok: each line's notes, and the images that carry them."""
    noted = scored[(scored["status"] == "ok") & (scored["reason"].fillna("") != "") & (scored["null"] == "")]
    counted = noted.groupby(["line", "reason"], sort=True)["image_id"].nunique()
    notes: dict[str, dict[str, int]] = {}
    for key, count in counted.items():
        line, reason = cast(tuple[str, str], key)
        notes.setdefault(line, {})[reason] = int(count)
    return notes


def _reference_line(planes: Mapping[tuple[str, str], Maps], manifest: Mapping[str, Any]) -> str | None:
    """The line that holds the reference null: one of the board, or one that is run unseen."""
    shown = [
        label for label in manifest["request"]["explainers"] if _method(label, manifest) == REFERENCE_NULL
    ]
    for label in [*shown, _HIDDEN_NULL]:
        if (label, "") in planes and planes[label, ""].values.size:
            return str(label)
    return None


def _stand_ins(scores: Sequence[str], manifest: Mapping[str, Any]) -> dict[int, int | None]:
    """Positions of scores that have a score of their own to stand in, and of that score; None for none."""
    named: dict[str, str] = {}
    for entry in manifest.get("metrics", ()):
        named.update(entry.get("fallback", {}))
    places = {score: place for place, score in enumerate(scores)}
    pairs = {score: named.get(score, named.get(base_score(score))) for score in scores}
    return {
        places[score]: places[other] if other else None
        for score, other in pairs.items()
        if other == "" or other in places
    }


def _substituted(
    maps: Maps, scores: Sequence[str], null: FloatArray, stand_ins: Mapping[int, int | None]
) -> FloatArray:
    """Values (K, S, N) with the scores of empty and failed maps filled in where that is possible."""
    values = maps.values.copy()
    for place, score in enumerate(scores):
        void = np.isin(maps.status[:, place], (EMPTY, FAILED))
        if is_cost(score) or not void.any():
            continue
        if place not in stand_ins:
            stand_in = np.broadcast_to(null[place], void.shape)
        elif (other := stand_ins[place]) is not None:
            stand_in = maps.values[:, other]
        else:
            continue
        values[:, place][void] = stand_in[void]
    return values


def _averaged(values: FloatArray) -> FloatArray:
    """Mean over draws (K, ...) of those that have a value; NaN where none has."""
    counted = np.isfinite(values).sum(axis=0)
    total = np.where(np.isfinite(values), values, 0.0).sum(axis=0)
    return snap(np.where(counted > 0, total / np.maximum(counted, 1), np.nan))


def _images_with(maps: Maps, code: int, judged: npt.NDArray[np.bool_]) -> int:
    return int((maps.status[:, judged] == code).any(axis=(0, 1)).sum())


def _hit_values(scores: Sequence[str], own: Mapping[str, Maps]) -> dict[str, float]:
    """The scores whose values are 0 and one other value, 100 or 1, in every map of the cell."""
    found = {}
    for place, score in enumerate(scores):
        if is_cost(score) or not own:
            continue
        seen = np.unique(np.concatenate([maps.values[:, place].ravel() for maps in own.values()]))
        seen = seen[np.isfinite(seen)]
        for hit in (100.0, 1.0):
            both = seen.size == 2 or (seen.size == 1 and base_score(score) in _HITS)
            if both and np.isin(seen, (0.0, hit)).all():
                found[score] = hit
                break
    return found


def _per_image(scored: pd.DataFrame, column: str, images: Sequence[str]) -> FloatArray:
    known = scored.dropna(subset=[column]).drop_duplicates("image_id").set_index("image_id")[column]
    return pd.to_numeric(known).reindex(list(images)).to_numpy(np.float64)
