"""A run's order of methods beside the orders that papers print, from the rows alone.

For each table of `faithmap.publications` and each model and set of images of the run: the methods that
both have, how far the two orders agree, and which pairs of methods agree, disagree or are not decided.
A measured pair is decided where its interval excludes zero, all pairs of the comparison one family;
published values carry no interval and are taken as they are printed. Tables that are asked for by name are
shown even where they have no order: values of one or two methods, of nulls, of a model that is not stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from faithmap import ranking, stats
from faithmap.errors import RequestError
from faithmap.evidence import Evidence, FloatArray, snap
from faithmap.publications import Column, Figures, Publication, Reading, publication, publications
from faithmap.standing import FAILED_LIMIT, estimates, run_seed

Verdict = Literal["agree", "disagree", "undecided"]

#: Fewer methods have no order worth the name, and are compared in tables that are asked for alone.
LEAST_METHODS = 3
#: A method whose score exists on fewer images is left out: its spread could not be known.
LEAST_IMAGES = 8
#: Why a method of a table is not compared of which the run has no line.
NOT_HERE = "not in this run"
#: Means (in the score's unit) that differ by no more are tied: rounding of the model's arithmetic.
ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class Beside:
    """A method that is both in a table and in the run."""

    #: As printed, and its line in the run.
    method: str
    label: str
    published: float
    #: As the board has it: value and bounds.
    measured: tuple[float, float, float]
    #: Places among the compared methods, 1 the best; equal values share one.
    published_place: int
    measured_place: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two methods, the better one by the source first; two that it ties in the order of the source."""

    first: str
    second: str
    #: First less second, in the units of the source and of the run.
    published: float
    measured: float
    #: Simultaneous bounds of the measured difference; NaN where too few images tell the two apart.
    low: float
    high: float
    verdict: Verdict
    #: Whether the source prints one value for both.
    tied: bool


@dataclass(frozen=True)
class Comparison:
    """One published column beside one score of a run."""

    column: Column
    reading: Reading
    #: The score's name in the rows.
    score: str
    #: The best by the source first.
    methods: tuple[Beside, ...]
    pairs: tuple[Pair, ...]
    #: Kendall's tau-b with its bounds; NaN for fewer than three methods.
    tau: tuple[float, float, float]
    #: Images that any of the methods has the score on.
    images: int
    #: Printed names that are not compared -> why not.
    absent: Mapping[str, str]

    def count(self, verdict: Verdict) -> int:
        """How many pairs have a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)


@dataclass(frozen=True)
class Section:
    """One set of published figures beside one model and one set of images of the run."""

    cell: Evidence
    publication: Publication
    figures: Figures
    comparisons: tuple[Comparison, ...]
    #: Columns that are not compared -> why not; the key "" stands for all of them.
    missing: Mapping[str, str]
    #: Why no run could be compared with these figures; empty where some could.
    closed: str = ""


def chosen_figures(wanted: Sequence[str] = ()) -> list[tuple[Publication, Figures]]:
    """The figures of the sources (`SOURCE`) and tables (`SOURCE:TABLE`) named; of all where none is.

    Raises:
        RequestError: a name is unknown, or nothing under it can be set beside a board.
    """
    if not wanted:
        return [(source, figures) for source in publications().values() for figures in source.figures]
    found: dict[int, tuple[Publication, Figures]] = {}
    for text in wanted:
        name, colon, table = text.partition(":")
        source = publication(name)
        figures = source.of_table(table) if colon else source.figures
        reasons = dict.fromkeys(never(source, entry, named=True) for entry in figures)
        if "" not in reasons:
            raise RequestError(f"'{text}' cannot be set beside a board: {'; '.join(reasons)}")
        found |= {id(entry): (source, entry) for entry in figures}
    return list(found.values())


def never(source: Publication, figures: Figures, *, named: bool = False) -> str:
    """Why figures can be compared with no run at all; empty where they can.

    Args:
        source: where they were printed.
        figures: a table's.
        named: whether the table is asked for by its name.
    """
    if not figures.model.family and not named:
        return "the model is not stated"
    reasons = [
        _closed(source.column(name, figures.setting), values, named)
        for name, values in figures.columns.items()
    ]
    return "" if "" in reasons else "; ".join(dict.fromkeys(reasons))


def _closed(column: Column, values: Mapping[str, float], named: bool) -> str:
    """Why a column can be compared with no run at all; empty where it can."""
    if len(values) < LEAST_METHODS and not named:
        return "fewer than three methods in the table"
    return f"{column.name}: {column.unmapped}" if column.unmapped else ""


def compare(
    cells: Sequence[Evidence],
    wanted: Sequence[tuple[Publication, Figures]],
    *,
    named: bool = False,
    resamples: int = stats.RESAMPLES,
) -> list[Section]:
    """Every model and set of images of a run beside every set of figures, in the order of both.

    Runs that are read together may pair models with images that none of them has; these are left out.

    Args:
        cells: what was measured.
        wanted: the figures, as `chosen_figures` gives them.
        named: whether they were asked for by name; what has no order is then shown too.
        resamples: bootstrap replicates.
    """
    return [
        _section(cell, source, figures, _other_images(cell, figures, wanted), named, resamples)
        for cell in cells if cell.images
        for source, figures in wanted
    ]  # fmt: skip


def _other_images(cell: Evidence, figures: Figures, wanted: Sequence[tuple[Publication, Figures]]) -> str:
    """The images of the same table that are nearer to the run's; empty where these are near enough."""
    if figures.images.holds(*names_of_images(cell)):
        return ""
    rivals = [
        other.images.name for _, other in wanted
        if (other.source, other.table, other.model) == (figures.source, figures.table, figures.model)
        and other.images.holds(*names_of_images(cell))
    ]  # fmt: skip
    return rivals[0] if rivals else ""


def names_of_images(cell: Evidence) -> tuple[str, str]:
    """What the run calls its images: the label, and the data set's name in the registry."""
    facts = cell.manifest.get("datasets", {}).get(cell.dataset, {})
    return cell.dataset, str(facts.get("name", cell.dataset))


def _section(
    cell: Evidence, source: Publication, figures: Figures, nearer: str, named: bool, resamples: int
) -> Section:
    family = cell.manifest.get("models", {}).get(cell.model, {}).get("family", "")
    closed = whole = never(source, figures, named=named)
    if not whole and figures.model.family not in ("", family):
        whole = f"the model there is a {_kind(figures.model.family)}, here a {_kind(family)}"
    if not whole and nearer:
        whole = f"other images; the table also has figures for {nearer}"
    if whole:
        return Section(cell, source, figures, (), {"": whole}, closed)
    comparisons, missing = [], {}
    for name in figures.columns:
        found = _comparison(cell, source, figures, source.column(name, figures.setting), named, resamples)
        if isinstance(found, str):
            missing[name] = found
        else:
            comparisons.append(found)
    return Section(cell, source, figures, tuple(comparisons), missing)


def _kind(family: str) -> str:
    return {"cnn": "CNN", "vit": "vision transformer"}.get(family, "model of unknown family")


def _comparison(
    cell: Evidence, source: Publication, figures: Figures, column: Column, named: bool, resamples: int
) -> Comparison | str:
    """One column beside the run, or the reason why not."""
    published = figures.columns[column.name]
    closed = _closed(column, published, named)
    if closed:
        return closed.removeprefix(f"{column.name}: ")
    answer = _answer(cell, column)
    if answer is None:
        return f"not measured ({', '.join(dict.fromkeys(reading.score for reading in column.readings))})"
    reading, score = answer
    labels, absent = _lines(cell, source, published, score, named)
    if len(labels) < (1 if named else LEAST_METHODS):
        few = "no method" if named else "fewer than three methods"
        return "; ".join([f"{few} in both ({', '.join(labels) or 'none'})", *_unusable(source, absent)])
    return _set_beside(cell, column, reading, score, published, labels, absent, resamples)


def _unusable(source: Publication, absent: Mapping[str, str]) -> list[str]:
    """Why methods that the run has too are not compared: a reason with all that it holds for."""
    names: dict[str, list[str]] = {}
    for method, reason in absent.items():
        if source.methods[method].explainer and reason != NOT_HERE:
            names.setdefault(reason, []).append(method)
    return [f"{', '.join(methods)}: {reason}" for reason, methods in names.items()]


def _set_beside(
    cell: Evidence,
    column: Column,
    reading: Reading,
    score: str,
    published: Mapping[str, float],
    labels: Mapping[str, str],
    absent: Mapping[str, str],
    resamples: int,
) -> Comparison:
    """The comparison of methods that are in both; `labels` are their lines in the run."""
    sign, seed = (1.0 if column.direction == "higher" else -1.0), run_seed(cell)
    ordered = sorted(labels, key=lambda method: -sign * published[method])
    printed = np.array([published[method] for method in ordered])
    values = complete([cell.score(labels[method], score) for method in ordered])
    tau = (math.nan, math.nan, math.nan)
    if len(ordered) >= LEAST_METHODS:
        tau = ranking.order_agreement(
            sign * printed, sign * values, tolerance=ROUNDING, resamples=resamples, seed=seed
        )
    apart = ranking.paired_differences(values, resamples=resamples, seed=seed)
    pairs = tuple(
        _pair(ordered[i], ordered[j], float(printed[i] - printed[j]), *numbers)
        for i, j, *numbers in zip(*(part.tolist() for part in apart), strict=True)
    )
    shown = estimates(cell, [labels[method] for method in ordered], [score], resamples, seed)
    there, here = sign * printed, sign * values.mean(axis=-1)
    methods = tuple(
        Beside(
            method, labels[method], published[method], shown[labels[method], score],
            1 + int((there > there[place]).sum()), 1 + int((here > here[place] + ROUNDING).sum()),
        )
        for place, method in enumerate(ordered)
    )  # fmt: skip
    return Comparison(column, reading, score, methods, pairs, tau, values.shape[-1], absent)


def _pair(
    first: str, second: str, printed: float, value: float, low: float, high: float, decided: int
) -> Pair:
    verdict: Verdict = "undecided"
    if printed and decided and abs(value) > ROUNDING:
        verdict = "agree" if np.sign(printed) == decided else "disagree"
    return Pair(first, second, printed, value, low, high, verdict, not printed)


def _answer(cell: Evidence, column: Column) -> tuple[Reading, str] | None:
    """The best reading of a column that the run has, and its score's name in the rows."""
    for reading in column.readings:
        score = reading.title(cell.manifest)
        if score is not None and score in cell.scores:
            return reading, score
    return None


def _lines(
    cell: Evidence, source: Publication, published: Mapping[str, float], score: str, named: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Printed names -> lines of the run that have the score; and printed names -> why there is none."""
    labels: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in published:
        method = source.methods[name]
        if not method.explainer:
            absent[name] = method.note
            continue
        known = [label for label in cell.explainers if method.is_line(label, _facts(cell, label))]
        reasons = [_why_not(cell, label, score, any_role=named) for label in known]
        usable = [label for label, reason in zip(known, reasons, strict=True) if not reason]
        if usable:
            labels[name] = usable[0]
        else:
            absent[name] = reasons[0] if reasons else NOT_HERE
    return labels, absent


def _facts(cell: Evidence, label: str) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = cell.manifest.get("explainers", {}).get(label, {})
    return facts


def _why_not(cell: Evidence, label: str, score: str, *, any_role: bool) -> str:
    """Why a line of the run is not compared by a score; empty where it is."""
    if label in cell.skipped:
        return cell.skipped[label]
    if cell.role(label) != "method" and not any_role:
        return f"{cell.role(label)}, not a ranked method"
    if label not in cell.values:
        return "no rows"
    if reason := cell.unreliable(label):
        return f"{reason}: it fails checks of the kit"
    if cell.failed[label] > FAILED_LIMIT * cell.n:
        return f"{100 * cell.failed[label] / max(cell.n, 1):.1f}% of its maps failed"
    held, most = _images_of(cell, label), max(_images_of(cell, other) for other in cell.values)
    if held < (1 - FAILED_LIMIT) * most:
        return f"has rows of {held} images, others of {most}"
    count = int(np.isfinite(cell.score(label, score)).sum())
    if count < LEAST_IMAGES:
        return f"has the score on {count} images; {LEAST_IMAGES} are needed"
    return ""


def _images_of(cell: Evidence, label: str) -> int:
    """Images on which a line has any score at all: fewer than others where a run is not finished."""
    return int(np.isfinite(cell.values[label]).any(axis=0).sum())


def complete(scores: Sequence[FloatArray]) -> FloatArray:
    """Scores (M, n) on the images that any method has, each row with the mean of its own images.

    Where all methods have the same images, these are the scores themselves. A score that a method has
    on some images only (a gain, where there is one) is a ratio of two sums, and each image's share in
    it is taken to first order: mean + known (score - mean) n / count. The rows then have the means of
    the board, and paired differences the spread that resampling the images gives them.
    """
    values = np.atleast_2d(np.asarray(scores, np.float64))
    values = values[:, np.isfinite(values).any(axis=0)]
    known = np.isfinite(values)
    if known.all():
        return values
    count = known.sum(axis=-1, keepdims=True)
    mean = np.where(known, values, 0.0).sum(axis=-1, keepdims=True) / count
    spread = np.where(known, values - mean, 0.0) * values.shape[-1] / count
    return snap(mean + spread)
