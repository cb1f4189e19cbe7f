"""A run's order of methods beside the published ones, as Markdown and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from faithmap.columns import base_score, column_of, is_time
from faithmap.comparing import (
    LEAST_METHODS,
    Beside,
    Comparison,
    Pair,
    Section,
    Verdict,
    names_of_images,
)
from faithmap.report._format import ARROWS, code, count, known, number, table
from faithmap.report._provenance import plain

if TYPE_CHECKING:
    from rich.table import Table

    from faithmap.evidence import Evidence
    from faithmap.publications import Figures

_SIGNS: dict[Verdict, str] = {
    "agree": "\N{CHECK MARK}",
    "disagree": "\N{BALLOT X}",
    "undecided": "\N{MIDDLE DOT}",
}
_TIED = "="
_MINUS = "\N{MINUS SIGN}"
_TAU = "\N{GREEK SMALL LETTER TAU}-b"
_TIMES = "\N{MULTIPLICATION SIGN}"
_UNKNOWN = "not recorded"
_COUNTS = ("Agree", "Disagree", "Not decided")

_INTRODUCTION = (
    "The order in which this board puts methods, beside the orders that papers print. None of this "
    "repeats an experiment: models, images and protocols differ, and each section begins with how.\n\n"
    "A published value carries no interval, so its order is taken as printed, however small the "
    "difference; two equal values are not decided. A measured pair is decided where the interval of its "
    "paired difference excludes zero, all pairs of one comparison being one family (95%, simultaneous "
    f"max-|t| bootstrap over images). Nothing is corrected for the number of comparisons. {_TAU} is "
    f"Kendall's rank correlation of the two orders, 1 for the same and {_MINUS}1 for the reverse; its 95% "
    "bounds come from resampling the images, the same for all methods, with the published order held "
    f"fixed. Few methods make it coarse: three without ties can only have {_MINUS}1, {_MINUS}1/3, 1/3 or 1."
)
_LEGEND = (
    "Rows are in the published order. *Published* is as printed, *Measured* as on the board with its 95% "
    "interval (times: median and quartiles), *Difference* the measured value less the printed one with the "
    "same interval (no error of either: models and images are others), *Place* the place among these "
    f"methods. The numbered columns hold the pair with the method of that number: {_SIGNS['agree']} both "
    f"orders agree, {_SIGNS['disagree']} they disagree, {_SIGNS['undecided']} not decided here, "
    f"{_TIED} printed as equal. "
    "Under each heading stands how the published column is read, in parentheses how sure that is. *Another "
    "reading*: the run has not measured what the column means, but a kin of it."
)


def render_comparison(sections: Sequence[Section]) -> str:
    """The page as GitHub Markdown, ending in one newline; equal rows give equal bytes."""
    shown = [section for section in sections if section.comparisons]
    parts = ["# Beside the papers' tables", _INTRODUCTION]
    if shown:
        parts += ["## In short", _overview(shown), _LEGEND]
    else:
        parts.append("No published table shares three methods and a score with this run.")
    for place, section in enumerate(shown, 1):
        parts += _section(place, section)
    return "\n\n".join([*parts, *_left_out(sections)]) + "\n"


def figures_title(section: Section) -> str:
    """Where published figures stand: source, table, model, images and setting."""
    figures = section.figures
    return f"{code(f'{figures.source}:{figures.table}')}, {_place(figures)}"


def _place(figures: Figures) -> str:
    """Model, images and setting of published figures."""
    setting = f", {figures.setting}" if figures.setting else ""
    return f"{figures.model.name} on {figures.images.name}{setting}"


def _overview(sections: Iterable[Section]) -> str:
    rows = []
    for place, section in enumerate(sections, 1):
        for comparison in section.comparisons:
            rows.append([
                f"{place}", f"{figures_title(section)}", code(comparison.column.name),
                f"{code(section.cell.model)} on {code(section.cell.dataset)}",
                code(comparison.score) + ("" if not comparison.reading.another else " (another reading)"),
                str(len(comparison.methods)), str(comparison.images), _tau(comparison), *_counts(comparison),
            ])  # fmt: skip
    header = ["", "Published", "Column", "Measured", "Score", "Methods", "Images",
              f"{_TAU} [95%]", *_COUNTS]  # fmt: skip
    return table(header, rows, left=5)


def _counts(comparison: Comparison) -> list[str]:
    return [str(comparison.count(verdict)) for verdict in ("agree", "disagree", "undecided")]


def _signed(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("-", _MINUS) if float(text) else f"{0:.{digits}f}"


def _tau(comparison: Comparison) -> str:
    value, low, high = comparison.tau
    if len(comparison.methods) < LEAST_METHODS:
        return "none, too few methods"
    if not known(value):
        return "none, all tied"
    ends = f" [{_signed(low)}, {_signed(high)}]" if known(low) and known(high) else ""
    return _signed(value) + ends


def _section(place: int, section: Section) -> list[str]:
    source = section.publication
    parts = [
        f"## {place}. {figures_title(section)}, beside {code(section.cell.model)} on "
        f"{code(section.cell.dataset)}",
        f"{source.paper}, *{source.title}*, arXiv:{source.arxiv}; from {source.taken_from}.",
        table(["", "Published", "Here"], differences(section), left=3),
        _comparable(section),
    ]
    remarks = _remarks(section)
    if remarks:
        parts.append("\n".join(f"- {line}" for line in remarks))
    for comparison in section.comparisons:
        parts += _comparison(section, comparison)
    if section.missing:
        left = (f"- {code(name)}: {plain(reason)}." for name, reason in section.missing.items())
        parts += ["Columns of this table that are not compared:", "\n".join(left)]
    return parts


def incomparable(section: Section) -> list[str]:
    """Why the values of a section cannot be compared, however alike the scores; none where they may be."""
    figures, cell = section.figures, section.cell
    reasons = []
    if not figures.model.is_architecture_of(_architecture(cell)):
        reasons.append(f"the model is {cell.model}, there {figures.model.name}")
    if not figures.images.holds(*names_of_images(cell)):
        reasons.append(f"the images are of {cell.dataset}, there of {figures.images.name}")
    return reasons


def _comparable(section: Section) -> str:
    reasons = incomparable(section)
    if reasons:
        because = plain("; ".join(reasons))
        return f"**Not comparable** as values, because {because}. The order is what is compared."
    return (
        "Values may be compared as far as weights, the choice of images and what the paper leaves open are "
        "alike."
    )


def differences(section: Section) -> list[list[str]]:
    """In what the published figures and the run differ: aspect, there, here."""
    source, cell = section.publication, section.cell
    settings = cell.manifest.get("settings", {})
    model = cell.manifest.get("models", {}).get(cell.model, {})
    grid = settings.get("map_grid", _UNKNOWN)
    cells = (
        f" ({f' {_TIMES} '.join(map(str, model['grid']))})" if grid == "model" and model.get("grid") else ""
    )
    grids = {"model": f"every map at the model's own grid{cells}", "native": "each method's own",
             _UNKNOWN: _UNKNOWN}  # fmt: skip
    own = {
        label: facts["params"]["map_grid"]
        for label, facts in cell.manifest.get("explainers", {}).items()
        if "map_grid" in facts.get("params", {})
    }
    reduced = "".join(f"; {code(label)} first at {side} cells a side" for label, side in own.items())
    return [
        ["Model", section.figures.model.name, _model(section, model)],
        ["Images", *_images(section)],
        ["Transform", source.transform, _transform(model)],
        ["Class explained", source.target, str(settings.get("target", _UNKNOWN))],
        ["Resolution of the maps", source.map_grid, grids.get(str(grid), f"{grid} cells a side") + reduced],
    ]


def _architecture(cell: Evidence) -> str:
    """The name that a model's architecture goes by: of a fine-tuned model the name of what was tuned."""
    tuned = cell.manifest.get("models", {}).get(cell.model, {}).get("tuned", {})
    return str(tuned.get("record", {}).get("model", {}).get("name", cell.model))


def _model(section: Section, model: Mapping[str, Any]) -> str:
    facts = [f"{model['parameters'] / 1e6:.1f} M parameters"] if model.get("parameters") else []
    facts += [f"layer {code(model['target_layer'])}"] if model.get("target_layer") else []
    facts += [f"weights {code(model['digest'])}"] if model.get("digest") else []
    if section.figures.model.is_architecture_of(_architecture(section.cell)):
        facts.append("the same architecture, perhaps with other weights")
    return ", ".join([code(section.cell.model), *facts])


def _images(section: Section) -> tuple[str, str]:
    there, cell = section.figures.images, section.cell
    number_there = count(there.images, "image") if there.images else "number not stated"
    part = cell.manifest.get("settings", {}).get("part")
    here = f"{code(cell.dataset)}, {count(cell.n, 'image')}" + (f", part {part}" if part else "")
    same = there.holds(*names_of_images(cell))
    kin = f"taken for {there.name} by its name" if same else "other images altogether"
    return f"{there.name}, {number_there}", f"{here}; {kin}"


def _transform(model: Mapping[str, Any]) -> str:
    if not model.get("input_size"):
        return _UNKNOWN
    size = f"resized to {f' {_TIMES} '.join(map(str, model['input_size']))}"
    crop = model.get("crop_pct")
    cropped = f", the middle {100 * crop:g}% of the shorter side" if crop and crop < 1 else ""
    how = f", {model['interpolation']}" if model.get("interpolation") else ""
    return f"{size}{cropped}{how}"


def _remarks(section: Section) -> list[str]:
    """What is to be said of the table, and of single methods: names, parameters of the request, lines."""
    explainers = section.cell.manifest.get("explainers", {})
    lines = dict.fromkeys(section.publication.notes_on(section.figures.table))
    for beside in (beside for comparison in section.comparisons for beside in comparison.methods):
        said = []
        if beside.method != beside.label:
            said.append(f"here {code(beside.label)}")
        given = requested(section.cell.manifest, beside.label)
        if given:
            said.append("run with " + ", ".join(f"{key} = {value}" for key, value in given.items()))
        method = section.publication.methods[beside.method]
        alike = sum(method.is_line(label, facts) for label, facts in explainers.items())
        if alike > 1:
            said.append("the first of several lines of this explainer")
        if method.note:
            said.append(method.note)
        if said:
            lines[f"{code(beside.method)}: {'; '.join(said)}."] = None
    return list(lines)


def requested(manifest: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The parameters that a request gives an explainer beside its defaults.

    A manifest merged from several runs holds the request of the first; for lines of the others all
    parameters are given.
    """
    for entry in manifest.get("config", {}).get("explainers", ()):
        if entry.get("label", entry["name"]) == label:
            return {key: value for key, value in entry.items() if key not in ("name", "label")}
    params = manifest.get("explainers", {}).get(label, {}).get("params", {})
    return {key: value for key, value in params.items() if value is not None}


def _comparison(section: Section, comparison: Comparison) -> list[str]:
    column = comparison.column
    parts = [
        f"### {place_title(section, comparison)}",
        " ".join(_reading(section, comparison)),
        _table_of(section, comparison),
        _order(comparison),
    ]
    against = [pair for pair in comparison.pairs if pair.verdict == "disagree"]
    if against:
        lines = (f"- {_disagreement(pair, comparison)}" for pair in against)
        parts += ["Pairs in the other order here:", "\n".join(lines)]
    if comparison.absent:
        names = (f"{code(name)} ({plain(reason)})" for name, reason in comparison.absent.items())
        parts.append(f"In the table's {code(column.name)}, but not compared: {', '.join(names)}.")
    return parts


def place_title(section: Section, comparison: Comparison) -> str:
    """A published column with its direction and unit, and the score beside it."""
    column = comparison.column
    unit = section.figures.units.get(column.name, "")
    arrow = ARROWS[column.direction]
    return f"{code(column.name)}{arrow}{f' ({unit})' if unit else ''}, beside {code(comparison.score)}"


def _reading(section: Section, comparison: Comparison) -> list[str]:
    column, reading = comparison.column, comparison.reading
    said = [f"The column is read as {column.metric}, {column.variant} ({column.certainty})."]
    if reading.another:
        said.append(f"**Another reading: {reading.another}.**")
    said.append(f"Scored by {code(reading.metric)}{_params(section, comparison)}.")
    if is_time(base_score(comparison.score)):
        said.append("The order is that of the means over the images timed.")
    return said + section.publication.notes_on(section.figures.table, column.name)


def _params(section: Section, comparison: Comparison) -> str:
    for entry in section.cell.manifest.get("metrics", ()):
        if entry["name"] == comparison.reading.metric and comparison.score in entry.get("scores", ()):
            given = ", ".join(f"{key} = {value}" for key, value in dict(entry.get("params", {})).items())
            return f" ({given})" if given else ""
    return ""


def _table_of(section: Section, comparison: Comparison) -> str:
    marks = {(pair.first, pair.second): _mark(pair) for pair in comparison.pairs}
    names = [beside.method for beside in comparison.methods]
    score = column_of(comparison.score)
    rows = []
    for place, beside in enumerate(comparison.methods):
        value, low, high = beside.measured
        ends = f"<br><sub>[{number(score, low)},&nbsp;{number(score, high)}]</sub>" if known(low) else ""
        pairs = [marks[other, beside.method] for other in names[:place]]
        rows.append([
            str(place + 1), code(beside.method), f"{beside.published:g}", f"{number(score, value)}{ends}",
            _difference(beside), str(beside.published_place), str(beside.measured_place),
            *pairs, *[""] * (len(names) - 1 - place),
        ])  # fmt: skip
    header = ["", "Method", "Published", "Measured", "Difference", "Place there", "Place here",
              *(str(place) for place in range(1, len(names)))]  # fmt: skip
    return table(header, rows, left=2)


def _difference(beside: Beside) -> str:
    """Measured less published, with the interval of what was measured."""
    value, low, high = (end - beside.published for end in beside.measured)
    ends = f"<br><sub>[{_signed(low, 1)},&nbsp;{_signed(high, 1)}]</sub>" if known(low) else ""
    return f"{_signed(value, 1)}{ends}"


def _mark(pair: Pair) -> str:
    return _TIED if pair.tied else _SIGNS[pair.verdict]


def _order(comparison: Comparison) -> str:
    """What became of the order, and how much it rests on."""
    size = f"{count(len(comparison.methods), 'method')}, {count(comparison.images, 'image')}."
    verdicts = f"{_verdicts(comparison)} " if comparison.pairs else ""
    if len(comparison.methods) < LEAST_METHODS:
        return f"{verdicts}No order of so few: {size}"
    return f"{verdicts}{_TAU} {_tau(comparison)}, {size}"


def _verdicts(comparison: Comparison) -> str:
    tied = sum(pair.tied for pair in comparison.pairs)
    close = comparison.count("undecided") - tied
    said = [f"{comparison.count('agree')} agree", f"{comparison.count('disagree')} disagree"]
    said.append(f"{close} not told apart here")
    if tied:
        said.append(f"{tied} printed as equal")
    return f"{count(len(comparison.pairs), 'pair')}: {', '.join(said)}."


def _disagreement(pair: Pair, comparison: Comparison) -> str:
    costs = is_time(base_score(comparison.score))
    here, low, high = (
        number(comparison.score, value) if costs else _signed(value)
        for value in (pair.measured, pair.low, pair.high)
    )
    printed = f"{pair.published:g}".replace("-", _MINUS)
    return (
        f"{code(pair.first)} less {code(pair.second)}: {printed} there, {here} here [{low}, {high}] "
        "(simultaneous 95%)"
    )


def _left_out(sections: Sequence[Section]) -> list[str]:
    """What is not compared and why: with one model and its images, and with any run at all."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    closed: dict[str, dict[str, None]] = {}
    for section in sections:
        figures = section.figures
        if section.closed:
            closed.setdefault(section.closed, {})[code(f"{figures.source}:{figures.table}")] = None
        elif not section.comparisons:
            place = cells.setdefault((section.cell.model, section.cell.dataset), {})
            place.setdefault(_reasons(section.missing), []).append(figures_title(section))
    parts = ["## Not compared"] if cells or closed else []
    for (model, dataset), found in cells.items():
        lines = [f"- {reason}: {'; '.join(titles)}." for reason, titles in found.items()]
        parts += [f"With {code(model)} on {code(dataset)}:", "\n".join(lines)]
    if closed:
        lines = [f"- {reason}: {', '.join(titles)}." for reason, titles in closed.items()]
        parts += ["With any run:", "\n".join(lines)]
    return parts


def _reasons(missing: Mapping[str, str]) -> str:
    """Why the columns of a table are not compared; said once where it is the same for all."""
    columns: dict[str, list[str]] = {}
    for column, reason in missing.items():
        columns.setdefault(reason, []).append(column)
    if len(columns) == 1:
        return plain(next(iter(columns)))
    return "; ".join(f"{', '.join(map(code, names))}: {plain(reason)}" for reason, names in columns.items())


def reasons_by_section(sections: Sequence[Section]) -> list[str]:
    """One sentence for each set of figures that some run could be, but this one is not, compared with."""
    return [
        f"{section.figures.source}:{section.figures.table}, {_place(section.figures)}, "
        f"not with {section.cell.model} on {section.cell.dataset}: "
        + "; ".join(dict.fromkeys(section.missing.values()))
        for section in sections
        if not section.comparisons and not section.closed
    ]


def comparison_table(sections: Sequence[Section]) -> Table:
    """One line for each comparison, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    found = Table(title="Beside the papers' tables", header_style="bold", pad_edge=False)
    for title in ("Published", "Measured", "Methods", f"{_TAU} [95%]", *_COUNTS):
        found.add_column(Text(title), justify="left" if title in ("Published", "Measured") else "right")
    for section in sections:
        for comparison in section.comparisons:
            figures = section.figures
            setting = f", {figures.setting}" if figures.setting else ""
            there = (
                f"{figures.source}:{figures.table}{setting} {comparison.column.name}, {figures.model.name}"
            )
            other = " (another reading)" if comparison.reading.another else ""
            here = f"{section.cell.model} {comparison.score}{other}"
            fields = [there, here, str(len(comparison.methods)), _tau(comparison), *_counts(comparison)]
            found.add_row(*(Text(field) for field in fields))
    return found


def figures_tables(sections: Sequence[Section]) -> list[Table]:
    """Each column with its methods, printed and measured, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    found = []
    for section in sections:
        reasons = incomparable(section)
        caption = f"not comparable: {'; '.join(reasons)}" if reasons else None
        for comparison in section.comparisons:
            figures, score = section.figures, column_of(comparison.score)
            there = f"{figures.source}:{figures.table}, {_place(figures)}"
            drawn = Table(
                title=Text(f"{there}: {comparison.column.name}"), caption=caption and Text(caption),
                header_style="bold", pad_edge=False,
            )  # fmt: skip
            other = " (another reading)" if comparison.reading.another else ""
            drawn.add_column("Method")
            for title in ("Published", f"{comparison.score}{other}, {section.cell.model}", "Difference"):
                drawn.add_column(Text(title), justify="right")
            for beside in comparison.methods:
                value, low, high = beside.measured
                ends = f" [{number(score, low)}, {number(score, high)}]" if known(low) else ""
                fields = (
                    beside.method, f"{beside.published:g}", f"{number(score, value)}{ends}",
                    _signed(value - beside.published, 1),
                )  # fmt: skip
                drawn.add_row(*(Text(field) for field in fields))
            found.append(drawn)
    return found
