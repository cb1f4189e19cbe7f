"""The papers' figures, as data: what they print, and which of our names and scores each one answers to.

The files lie in `published/`. One CSV for each source holds its figures as printed, `mapping.csv` says
what each column means; the others are the reading aids of this package: which paper a source is
(`sources.csv`), which of our scores answers a column, the best reading first (`readings.csv`), which
explainer a printed name is, and which parameters make it that (`methods.csv`), with which the lines of an
ablation are one (`settings.csv`), what models and images are (`models.csv`, `datasets.csv`), and what else a
reader should know of a table or a column (`notes.csv`). Nothing here loads torch.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal, cast

from faithmap.columns import variant_title
from faithmap.errors import FaithmapError, RequestError, nearest

Way = Literal["higher", "lower"]

_HEADERS = {
    "sources": ("source", "file", "paper", "title", "arxiv", "taken_from", "target", "map_grid", "transform"),
    "mapping": ("source", "column", "metric", "variant", "direction", "certainty"),
    "readings": ("source", "column", "setting", "score", "metric", "params", "reading"),
    "methods": ("source", "method", "explainer", "params", "note"),
    "settings": ("source", "table", "setting", "explainer", "params", "note"),
    "models": ("model", "name", "family", "same_as"),
    "datasets": ("dataset", "name", "images", "registry"),
    "notes": ("source", "table", "column", "note"),
}
_FIGURES = ("source", "table", "dataset", "model", "explainer", "setting", "metric", "value", "unit")


@dataclass(frozen=True, slots=True)
class Reading:
    """A score of ours that answers a published column, and how it differs from what was printed."""

    #: The score as the metric's plain request names it, such as `auc_d@label`.
    score: str
    metric: str
    #: Parameters that the metric must have been run with.
    params: Mapping[str, Any]
    #: What differs from the published reading; empty for that reading itself.
    another: str

    def title(self, manifest: Mapping[str, Any]) -> str | None:
        """The score's name in a run's rows; None where the run did not ask for it."""
        for entry in manifest.get("metrics", ()):
            if entry["name"] == self.metric and self.params.items() <= dict(entry.get("params", {})).items():
                return variant_title(self.score, entry.get("variant", ""))
        return None


@dataclass(frozen=True, slots=True)
class Column:
    """What a column of a source means."""

    name: str
    metric: str
    variant: str
    direction: Way
    #: How sure the reading is: "certain", "likely", "reconstruction", ...
    certainty: str
    #: The best reading first; empty where nothing of ours answers the column.
    readings: tuple[Reading, ...]
    #: Why nothing does; empty where something does.
    unmapped: str


@dataclass(frozen=True, slots=True)
class Method:
    """A printed name, and the explainer that it stands for; "" where none does."""

    name: str
    explainer: str
    note: str
    #: The parameters that a line of a run must have to be this one. None: any will do.
    params: Mapping[str, Any] | None = None

    def is_line(self, label: str, facts: Mapping[str, Any]) -> bool:
        """Whether a line of a run is what was printed: the explainer, with the parameters that matter.

        Args:
            label: of the line.
            facts: its entry in the run's manifest.
        """
        if facts.get("name", label) != self.explainer:
            return False
        given = facts.get("params", {})
        return self.params is None or all(given.get(key) == value for key, value in self.params.items())


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model that figures were published for."""

    key: str
    name: str
    #: "cnn", "vit", or "" where it is not known.
    family: str
    #: Names of models here that have the same architecture.
    same_as: tuple[str, ...]

    def is_architecture_of(self, name: str) -> bool:
        """Whether a model of that name has this architecture; the weights may still be others."""
        return any(name == known or name.startswith(f"{known}.") for known in self.same_as)


@dataclass(frozen=True, slots=True)
class PublishedImages:
    """Images that figures were published for."""

    key: str
    name: str
    #: How many; None where that is not stated.
    images: int | None
    #: The registry's name of the data set that they come from.
    registry: str

    def holds(self, *names: str) -> bool:
        """Whether images known by these names (a label, a registry name) go by the same name."""
        return any(name == self.registry or name.startswith(f"{self.registry}-") for name in names)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one table for one model, one set of images and one setting."""

    source: str
    table: str
    model: PublishedModel
    images: PublishedImages
    setting: str
    #: Column -> printed name of the method -> value, in the order of the source.
    columns: Mapping[str, Mapping[str, float]]
    #: Column -> unit of its values.
    units: Mapping[str, str]


@dataclass(frozen=True)
class Publication:
    """A source with all that is known of it."""

    name: str
    paper: str
    title: str
    arxiv: str
    taken_from: str
    #: What the source says of the class explained, the maps' resolution and the images' transform.
    target: str
    map_grid: str
    transform: str
    #: What a column means, by its name and the setting in which it does; "" for all others.
    meanings: Mapping[tuple[str, str], Column]
    methods: Mapping[str, Method]
    figures: tuple[Figures, ...]
    #: (Table or "", column or "", sentence).
    notes: tuple[tuple[str, str, str], ...] = field(repr=False)

    def column(self, name: str, setting: str = "") -> Column:
        """What a column means in a setting."""
        return self.meanings.get((name, setting), self.meanings[name, ""])

    @property
    def columns(self) -> dict[str, Column]:
        """What the columns mean but for settings in which other scores answer them."""
        return {name: column for (name, setting), column in self.meanings.items() if not setting}

    @property
    def tables(self) -> list[str]:
        """The names of the tables, in the order of the source."""
        return list(dict.fromkeys(figures.table for figures in self.figures))

    def of_table(self, table: str) -> tuple[Figures, ...]:
        """The figures of one table.

        Raises:
            RequestError: the source has no such table.
        """
        found = tuple(figures for figures in self.figures if figures.table == table)
        if not found:
            raise RequestError(f"'{self.name}' has no table '{table}'; {nearest(table, self.tables)}")
        return found

    def notes_on(self, table: str, column: str = "") -> list[str]:
        """What should be known of a table as a whole, or of one of its columns."""
        return [
            note for on, of, note in self.notes
            if on in ("", table) and of == column
        ]  # fmt: skip


def publication(name: str) -> Publication:
    """One source by its name.

    Raises:
        RequestError: there is no such source.
    """
    known = publications()
    if name not in known:
        raise RequestError(f"no figures of '{name}' are kept here; {nearest(name, known)}")
    return known[name]


@cache
def publications() -> Mapping[str, Publication]:
    """Every source whose figures are kept here, by name."""
    return read_publications(resources.files("faithmap") / "published")


def read_publications(folder: Traversable) -> dict[str, Publication]:
    """Read a folder of published figures.

    Raises:
        FaithmapError: a file is missing or contradicts another one; file and line are named.
    """
    tables = {name: list(_lines(folder / f"{name}.csv", header)) for name, header in _HEADERS.items()}
    models = {line["model"]: _model(line) for _, line in tables["models"]}
    images = {line["dataset"]: _images(where, line) for where, line in tables["datasets"]}
    sources = {line["source"]: line for _, line in tables["sources"]}
    owned = ("mapping", "readings", "methods", "settings", "notes")
    for name in owned:
        for where, line in tables[name]:
            _known(where, "source", line["source"], sources)
    found = {}
    for source, line in sources.items():
        own = {
            name: [(where, entry) for where, entry in tables[name] if entry["source"] == source]
            for name in owned
        }
        meanings = _columns(own["mapping"], own["readings"])
        columns = {name for name, _ in meanings}
        methods = {entry["method"]: _method(where, entry) for where, entry in own["methods"]}
        settings = {
            (entry["table"], entry["setting"]): _variant(where, entry, methods)
            for where, entry in own["settings"]
        }
        found[source] = Publication(
            name=source,
            **{key: line[key] for key in _HEADERS["sources"][2:]},
            meanings=meanings,
            methods=methods | {variant.name: variant for variant in settings.values()},
            figures=_figures(folder / line["file"], source, columns, methods, settings, models, images),
            notes=tuple((entry["table"], entry["column"], entry["note"]) for _, entry in own["notes"]),
        )
    return found


def _lines(file: Traversable, header: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a CSV with the columns that it must have, each with its place."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FaithmapError(f"{file.name} of the published figures cannot be read ({error})") from error
    reader = csv.DictReader(text.splitlines(), strict=True)
    if tuple(reader.fieldnames or ()) != header:
        raise FaithmapError(
            f"{file.name} has the columns {', '.join(reader.fieldnames or ())}; expected {', '.join(header)}"
        )
    for line in reader:
        where = f"{file.name}, line {reader.line_num}"
        if None in line or None in line.values():
            raise FaithmapError(f"{where}: expected {len(header)} fields, as the header has")
        yield where, dict(line)


def _known(where: str, what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise FaithmapError(f"{where}: {what} '{name}' is described nowhere; {nearest(name, names)}")


def _number(where: str, what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FaithmapError(f"{where}: {what} is {text!r}; expected a number") from None


def _method(where: str, line: Mapping[str, str]) -> Method:
    if not line["explainer"] and not line["note"]:
        raise FaithmapError(f"{where}: '{line['method']}' needs an explainer, or a note that says why none")
    params = _params(where, line["params"]) if line["params"] else None
    return Method(line["method"], line["explainer"], line["note"], params)


def _variant(where: str, line: Mapping[str, str], methods: Mapping[str, Method]) -> Method:
    """A setting of an ablation, as a method of its own."""
    _known(where, "method", line["explainer"], methods)
    method = methods[line["explainer"]]
    name = f"{line['explainer']} ({line['setting']})"
    params = {**(method.params or {}), **_params(where, line["params"])}
    return Method(name, method.explainer, line["note"], params)


def _model(line: Mapping[str, str]) -> PublishedModel:
    same_as = tuple(name for name in line["same_as"].split(";") if name)
    return PublishedModel(line["model"], line["name"], line["family"], same_as)


def _images(where: str, line: Mapping[str, str]) -> PublishedImages:
    count = int(_number(where, "images", line["images"])) if line["images"] else None
    return PublishedImages(line["dataset"], line["name"], count, line["registry"])


def _columns(
    mapping: Iterable[tuple[str, Mapping[str, str]]], readings: Iterable[tuple[str, Mapping[str, str]]]
) -> dict[tuple[str, str], Column]:
    """The columns of one source with their readings, by name and setting ("" for what holds elsewhere)."""
    meant = {line["column"]: (where, line) for where, line in mapping}
    answers: dict[tuple[str, str], list[Reading]] = {(column, ""): [] for column in meant}
    unmapped: dict[tuple[str, str], str] = {}
    for where, line in readings:
        _known(where, "column", line["column"], meant)
        place = (line["column"], line["setting"])
        here = answers.setdefault(place, [])
        if line["score"]:
            params = _params(where, line["params"])
            here.append(Reading(line["score"], line["metric"], params, line["reading"]))
        elif line["reading"]:
            unmapped[place] = line["reading"]
        else:
            raise FaithmapError(f"{where}: '{line['column']}' needs a score, or a reading that says why none")
    columns = {}
    for place, found in answers.items():
        name = place[0]
        where, line = meant[name]
        if line["direction"] not in ("higher", "lower"):
            raise FaithmapError(f"{where}: direction is '{line['direction']}'; expected higher or lower")
        if bool(found) == (place in unmapped):
            raise FaithmapError(
                f"{where}: readings.csv must either name scores for '{name}' or say why there is none"
            )
        columns[place] = Column(
            name, line["metric"], line["variant"], cast("Way", line["direction"]), line["certainty"],
            tuple(found), unmapped.get(place, ""),
        )  # fmt: skip
    return columns


def _params(where: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FaithmapError(f"{where}: params is {text!r}; expected a JSON object")
    return found


def _figures(
    file: Traversable,
    source: str,
    columns: Collection[str],
    methods: Mapping[str, Method],
    settings: Mapping[tuple[str, str], Method],
    models: Mapping[str, PublishedModel],
    images: Mapping[str, PublishedImages],
) -> tuple[Figures, ...]:
    """The figures of one source, grouped as they may be compared.

    The settings of an ablation stand beside each other, as methods do elsewhere.
    """
    groups: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
    units: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for where, line in _lines(file, _FIGURES):
        _known(where, "source", line["source"], [source])
        known = (("metric", columns), ("explainer", methods), ("model", models), ("dataset", images))
        for key, names in known:
            _known(where, key, line[key], cast("Iterable[str]", names))
        variant = settings.get((line["table"], line["setting"]))
        name, setting = (line["explainer"], line["setting"]) if variant is None else (variant.name, "")
        place = (line["table"], line["model"], line["dataset"], setting)
        column = groups.setdefault(place, {}).setdefault(line["metric"], {})
        if name in column:
            raise FaithmapError(f"{where}: '{name}' has a value in this place already")
        value, unit = _number(where, "value", line["value"]), line["unit"]
        if unit == "fraction":  # our shares are percent
            value, unit = round(100 * value, 6), "percent, printed as a fraction"
        column[name] = value
        units.setdefault(place, {})[line["metric"]] = unit
    return tuple(
        Figures(source, table, models[model], images[dataset], setting, columns_here, units[place])
        for place, columns_here in groups.items()
        for table, model, dataset, setting in [place]
    )
