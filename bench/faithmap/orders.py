"""How the order of methods moves between the published variants of a test.

Every variant gives each method a mean over the same images. For two variants the question is on which
share of the pairs of methods they disagree about the better one. The means alone answer it with noise
in it, so two bounds stand beside: at least the pairs whose order is significant in both and reversed,
at most all but the pairs whose order is significant in both and the same. Each variant is decided as one
family at 97.5%, so that no order of the two is wrong with a chance of at least 95%: whatever the true
orders are, the share of pairs that they reverse lies between the bounds with that confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as distributions

from faithmap import ranking, stats
from faithmap.columns import variant_title
from faithmap.evidence import Evidence, FloatArray, read_evidence
from faithmap.records import PRIMARY_SCORE, REFERENCE_NULL, VARIANTS
from faithmap.standing import FAILED_LIMIT
from faithmap.store import KEY_COLUMNS, RunStore

#: The axes of a variant, in the order in which variants are listed.
AXES = ("target", "map_grid", "fill", "span", "reading")
SPANS = (0.9, 1.0)
#: Every curve reaches the share 1, of which the shorter span is a part.
STEPS = 10
#: The class explained that other universes share rows with.
DEFAULT_TARGET = "predicted"
#: How a curve is read: name -> suffix of the score.
READINGS = {"agreement": "", "label": "@label", "probability": "@probability"}
#: Each of two variants is decided at this level, so that both are right at 95%.
EACH = 1 - (1 - stats.LEVEL) / 2


@dataclass(frozen=True, order=True)
class Variant:
    """One published way of the perturbation test."""

    target: str
    map_grid: str
    fill: str
    span: float
    reading: str

    @property
    def title(self) -> str:
        """The variant in words."""
        return f"{self.target} class, {self.map_grid} grid, {self.fill}, 0 to {self.span:g}, {self.reading}"


@dataclass(frozen=True)
class Disagreement:
    """Two variants: shares of the pairs of methods in percent, with bounds that hold at 95%."""

    one: Variant
    other: Variant
    #: Pairs whose means stand in another order.
    reversed: float
    low: float
    high: float
    #: Kendall's tau-b of the two orders.
    tau: float


@dataclass(frozen=True)
class Contrast:
    """Two values of one axis, the other axes held: at the run's own values, and over all of theirs."""

    axis: str
    values: tuple[str, str]
    #: With the run's own values on the other axes.
    here: Disagreement
    #: Mean and largest share reversed over all values of the other axes, in percent, and how many.
    mean: float
    largest: float
    settings: int


@dataclass(frozen=True)
class Orders:
    """One (model, dataset): the methods under every variant."""

    model: str
    dataset: str
    methods: tuple[str, ...]
    #: The run's own variant first.
    variants: tuple[Variant, ...]
    #: (V, M, n) scores in percent, higher is better, of the images that all variants score.
    values: FloatArray
    #: Methods that are left out, with the reason.
    left_out: Mapping[str, str]
    #: Images that were asked for.
    asked: int
    #: Whether the run itself has scored the first variant.
    scored: bool = True
    seed: int = 0
    resamples: int = stats.RESAMPLES

    @property
    def images(self) -> int:
        """How many images are compared."""
        return int(self.values.shape[-1])

    @property
    def comparable(self) -> bool:
        """Whether there are two methods and an image that they have in common under all variants."""
        return self.pairs > 0 and bool(self.variants) and self.images > 0

    @cached_property
    def means(self) -> FloatArray:
        """(V, M)."""
        return np.asarray(self.values.mean(axis=-1))

    @cached_property
    def ranks(self) -> npt.NDArray[np.int64]:
        """(V, M); 1 is the best, equal means share the smaller rank."""
        return np.asarray(1 + (self.means[:, None, :] > self.means[:, :, None]).sum(axis=-1))

    @cached_property
    def intervals(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(V, M) lowest and highest rank of each method, at 95% within a variant."""
        found = [
            ranking.rank_intervals(values, resamples=self.resamples, seed=self.seed) for values in self.values
        ]
        return np.array([each.low for each in found]), np.array([each.high for each in found])

    @property
    def pairs(self) -> int:
        """How many pairs of methods there are."""
        return len(self.methods) * (len(self.methods) - 1) // 2

    def _differences(self) -> Iterator[FloatArray]:
        first, second = np.triu_indices(len(self.methods), 1)
        for values in self.values:
            yield values[first] - values[second]

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """(V, P): sign of the first method's mean less the second's."""
        first, second = np.triu_indices(len(self.methods), 1)
        return np.sign(self.means[:, first] - self.means[:, second]).astype(np.int64)

    @cached_property
    def decided(self) -> npt.NDArray[np.int64]:
        """(V, P): the same where it is significant at 97.5% within its variant, else 0."""
        return np.array(
            [
                ranking.decided_signs(apart, EACH, self.resamples, self.seed)
                for apart in self._differences()
            ]
        )  # fmt: skip

    @cached_property
    def reversed_somewhere(self) -> int:
        """Pairs that are significantly reversed between some two variants, all variants one family at 95%."""
        signs = np.array(
            ranking.family_signs(list(self._differences()), stats.LEVEL, self.resamples, self.seed)
        )
        return int(((signs > 0).any(axis=0) & (signs < 0).any(axis=0)).sum())

    def disagreement(self, v: int, w: int) -> Disagreement:
        """Compare two variants by their positions."""
        agreed = self.decided[v] * self.decided[w]
        return Disagreement(
            self.variants[v],
            self.variants[w],
            reversed=100 * float((self.order[v] * self.order[w] < 0).mean()),
            low=100 * float((agreed < 0).mean()),
            high=100 * float((agreed <= 0).mean()),
            tau=float(distributions.kendalltau(self.means[v], self.means[w]).statistic),
        )

    def contrasts(self) -> list[Contrast]:
        """Every two values of every axis."""
        found = []
        place = {variant: v for v, variant in enumerate(self.variants)}
        for axis in AXES:
            present = dict.fromkeys(getattr(variant, axis) for variant in self.variants)
            for one, other in combinations(present, 2):
                # Another target is no variant of its own where a grid is another's (see `multiverse`).
                both = [
                    (v, place[partner])
                    for variant, v in place.items()
                    if getattr(variant, axis) == one and (partner := _with(variant, axis, other)) in place
                ]
                own = _with(self.variants[0], axis, one), _with(self.variants[0], axis, other)
                if not both or any(variant not in place for variant in own):
                    continue
                shares = [self.disagreement(v, w).reversed for v, w in both]
                here = self.disagreement(place[own[0]], place[own[1]])
                values = (_said(one), _said(other))
                found.append(
                    Contrast(axis, values, here, float(np.mean(shares)), float(max(shares)), len(shares))
                )
        return found

    def any_two(self) -> tuple[float, float, float]:
        """Over all pairs of variants, in percent: mean share reversed, the largest, and the mean of the
        shares that are reversed for sure."""
        v, w = np.triu_indices(len(self.variants), 1)
        if not v.size:
            return math.nan, math.nan, math.nan
        reversed_ = (self.order[v] * self.order[w] < 0).mean(axis=1)
        surely = (self.decided[v] * self.decided[w] < 0).mean(axis=1)
        return 100 * float(reversed_.mean()), 100 * float(reversed_.max()), 100 * float(surely.mean())


def _with(variant: Variant, axis: str, value: Any) -> Variant:
    return Variant(**{name: getattr(variant, name) for name in AXES} | {axis: value})


def _said(value: Any) -> str:
    return f"0 to {value:g}" if isinstance(value, float) else str(value)


def read_orders(path: Path, resamples: int = stats.RESAMPLES) -> list[Orders]:
    """The orders of a run's models and datasets, comparable or not; empty where it has no variants.

    Args:
        path: the run's folder.
        resamples: of the images.
    """
    store = RunStore(path / VARIANTS)
    manifest = store.manifest()
    if manifest is None:
        return []
    chosen = {dataset: set(ids) for dataset, ids in manifest["images"].items()}
    found: dict[tuple[str, str], dict[tuple[str, str, float], Evidence]] = {}
    for entry in manifest["universes"]:
        rows = universe_rows(store, entry, manifest["universes"])
        kept = [n in chosen.get(d, ()) for d, n in zip(rows["dataset"], rows["image_id"], strict=True)]
        rows = rows.loc[kept]
        if rows.empty:
            continue
        for span in SPANS:
            for cell in read_evidence(at_span(rows, span), manifest):
                if cell.model in entry["models"] and cell.images:
                    key = (entry["target"], str(entry["map_grid"]), span)
                    found.setdefault((cell.model, cell.dataset), {})[key] = cell
    ordered = sorted(found.items(), key=lambda item: _request_order(manifest, *item[0]))
    return [_orders(cells, len(chosen[dataset]), manifest, resamples) for (_, dataset), cells in ordered]


def _request_order(manifest: Mapping[str, Any], model: str, dataset: str) -> tuple[int, int]:
    request = manifest["request"]
    return request["models"].index(model), request["datasets"].index(dataset)


def _orders(
    cells: Mapping[tuple[str, str, float], Evidence], asked: int, manifest: Mapping[str, Any], resamples: int
) -> Orders:
    """Line up what the universes of one model and dataset give."""
    first = next(iter(cells.values()))
    methods, left_out = _methods(list(cells.values()), manifest)
    images = sorted(set.intersection(*(set(cell.images) for cell in cells.values())))
    fills = [entry["fill"] for entry in manifest["metrics"]]
    variants: list[Variant] = []
    planes: list[FloatArray] = []
    for (target, grid, span), cell in cells.items():
        places = [cell.images.index(image) for image in images]
        for fill in fills:
            for reading, suffix in READINGS.items():
                score = variant_title(f"{PRIMARY_SCORE}{suffix}", fill)
                plane = np.array([cell.score(label, score)[places] for label in methods])
                if plane.size and np.isfinite(plane).any():
                    variants.append(Variant(target, grid, fill, span, reading))
                    planes.append(plane)
    values = np.array(planes).reshape(len(planes), len(methods), len(images))
    values = values[:, :, np.isfinite(values).all(axis=(0, 1))]
    run, own = manifest["config"]["run"], manifest["own"]
    default = (run["target"], str(run["map_grid"]), own["fill"], own["span"], next(iter(READINGS)))
    ordered = sorted(range(len(variants)), key=lambda v: _distance(variants[v], default))
    return Orders(
        first.model, first.dataset, tuple(methods), tuple(variants[v] for v in ordered), values[ordered],
        left_out, asked, own["scored"], int(manifest["settings"]["seed"]), resamples,
    )  # fmt: skip


def _distance(variant: Variant, default: Sequence[Any]) -> bool:
    """Sorts the run's own variant to the front and leaves the others as they are."""
    return tuple(getattr(variant, axis) for axis in AXES) != tuple(default)


def _methods(
    cells: Sequence[Evidence], manifest: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """The methods that every universe has maps of, in the order of the request, and why others are not."""
    kept, left_out = [], {}
    for label in manifest["request"]["explainers"]:
        entry = manifest["explainers"][label]
        if entry["name"] == REFERENCE_NULL or entry["role"] != "method":
            continue
        reasons = [
            f"{reason}: it fails checks of the kit" for cell in cells if (reason := cell.unreliable(label))
        ]
        reasons += [reason for cell in cells if (reason := _unusable(cell, label))]
        if reasons:
            left_out[label] = reasons[0]
        else:
            kept.append(label)
    return kept, left_out


def _unusable(cell: Evidence, label: str) -> str:
    if label in cell.skipped:
        return cell.skipped[label]
    if label not in cell.values:
        return "no rows"
    failed = cell.failed[label] / max(cell.n, 1)
    return f"failed on {100 * failed:.1f}% of the images" if failed > FAILED_LIMIT else ""


def variants_frame(orders: Sequence[Orders]) -> pd.DataFrame:
    """`variants.csv`: a line for each model, dataset, variant and method."""
    lines = []
    for each in filter(lambda found: found.comparable, orders):
        low, high = each.intervals
        for v, variant in enumerate(each.variants):
            for m, method in enumerate(each.methods):
                lines.append(
                    {"model": each.model, "dataset": each.dataset}
                    | {axis: getattr(variant, axis) for axis in AXES}
                    | {
                        "explainer": method, "n": each.images, PRIMARY_SCORE: each.means[v, m],
                        "rank": each.ranks[v, m], "rank_low": low[v, m], "rank_high": high[v, m],
                    }
                )  # fmt: skip
    columns = ["model", "dataset", *AXES, "explainer", "n", PRIMARY_SCORE, "rank", "rank_low", "rank_high"]
    return pd.DataFrame(lines, columns=columns)


def universe_rows(
    store: RunStore, entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """The rows of a universe, those included that it has in common with the predicted class.

    Args:
        store: the folder of the variants.
        entry: the universe in the manifest.
        entries: all of them.
    """
    rows = store.rows(entry["cells"])
    if entry["target"] != "label":
        return rows
    for other in entries:
        if (other["target"], other["map_grid"]) == (DEFAULT_TARGET, entry["map_grid"]):
            shared = store.rows(other["cells"])
            right = (shared["predicted"] == shared["label"]).fillna(False).to_numpy(bool)
            rows = pd.concat([rows, shared[right]], ignore_index=True)
    # A request that had no predicted class before has explained these images for their labels itself.
    return rows.drop_duplicates(KEY_COLUMNS, ignore_index=True)


def at_span(rows: pd.DataFrame, span: float) -> pd.DataFrame:
    """Rows of curves that reach the share 1 with their areas up to a smaller one.

    `auc_d` rows have no curve: theirs is the difference of the two that have.
    """
    points = round(span * STEPS) + 1
    area = rows["curve"].map(
        lambda curve: 100 * float(np.trapezoid(curve[:points], dx=1 / STEPS)) if curve is not None else np.nan
    )
    table = rows.assign(value=area.where(rows["curve"].notna(), rows["value"]))
    kind, _, reading = zip(*(name.partition("@") for name in table["metric"]), strict=True)
    table = table.assign(_kind=kind, _reading=reading)
    key = ["model", "dataset", "explainer", "params", "spec", "image_id", "_reading"]
    wide = table[table["_kind"].isin(["pos_auc", "neg_auc"])].set_index(key)
    pairs = {name: wide.loc[wide["_kind"] == name, "value"] for name in ("pos_auc", "neg_auc")}
    apart = (pairs["neg_auc"] - pairs["pos_auc"]).rename("_apart").reset_index()
    joined = table.merge(apart, on=key, how="left", validate="many_to_one")
    differs = (joined["_kind"] == "auc_d") & joined["value"].notna()
    joined["value"] = joined["value"].where(~differs, joined["_apart"])
    kept: pd.DataFrame = joined.drop(columns=["_kind", "_reading", "_apart"])
    return kept
