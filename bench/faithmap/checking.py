"""`faithmap check`: the conformance kit on a plugin, on the plugins of a file, or on all there are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faithmap import registry
from faithmap._checks import DEFAULT_MODELS, ModelSource
from faithmap.config import parse_spec, split_list, unique
from faithmap.conformance import Case, Result, Status, cases, check_names, failures
from faithmap.errors import RequestError, nearest
from faithmap.listing import load_plugins
from faithmap.models import load_model
from faithmap.plugin import Plugin
from faithmap.records import Kind

ALL = "all"
STYLES: dict[Status, str] = {
    "passed": "green", "failed": "bold red", "skipped": "dim", "expected failure": "yellow",
    "unexpectedly passed": "bold red",
}  # fmt: skip
#: Words for a table's fields.
SHORT = {"unexpectedly passed": "passed, unexpectedly"}


def check(
    what: str,
    models: str | None,
    plugins: Sequence[Path],
    quick: bool,
    only: str | None,
    console: Console,
    errors: Console,
) -> int:
    """Make the checks and print them; 1 where one fails or a plugin file does not load.

    Args:
        what: a registry name (parameters in brackets), the path of a Python file, or "all".
        models: comma list of the models to try explainers on.
        plugins: files to load first.
        quick: leave out the slow checks.
        only: comma list of the checks to make; plugins of kinds that have none of them are left out.
        console: where tables go.
        errors: where progress goes.
    """
    load_plugins(plugins)
    wanted = named_checks(only)
    found = [entry for entry in chosen(what) if wanted is None or wanted[entry[0].facts.kind]]
    if not found:
        raise RequestError(
            f"the checks {only} are not for '{what}'; see `faithmap check {what}` for those that are"
        )
    loaded = load_models(models) if any(plugin.facts.kind == "explainer" for plugin, _ in found) else {}
    started = time.perf_counter()
    results: list[Result] = []
    for plugin, params in found:
        kind: Kind = plugin.facts.kind
        names = None if wanted is None else wanted[kind]
        made = cases(kind, plugin, loaded, params=params, only=names, slow=not quick)
        mine = _run(made, errors)
        results += mine
        if len(found) == 1:
            console.print(table(plugin, mine))
        else:
            console.print(summary(plugin, mine), highlight=False)
    broken = registry_faults() if what == ALL else []
    explain(results, console, notes=len(found) == 1)
    for line in broken:
        console.print(f"[bold red]not loaded[/]: {_plain(line)}", highlight=False, soft_wrap=True)
    bad = failures(results)
    console.print(
        f"{len(found)} plugin{'s' if len(found) != 1 else ''}, {count(results)}, "
        f"{time.perf_counter() - started:.1f} s",
        highlight=False,
    )
    return 1 if bad or broken else 0


def named_checks(only: str | None) -> dict[Kind, list[str]] | None:
    """The checks asked for, by the kind of plugin that they are for; None where all are.

    Raises:
        RequestError: no kind has a check of that name, or none is named.
    """
    if only is None:
        return None
    asked = split_list(only)
    known = {kind: check_names(kind) for kind in registry.KINDS}
    everything = sorted({name for names in known.values() for name in names})
    if not asked:
        raise RequestError(f"--only is empty; give a comma list of checks: {', '.join(everything)}")
    for name in asked:
        if name not in everything:
            raise RequestError(f"there is no check '{name}'; {nearest(name, everything)}")
    return {kind: [name for name in asked if name in names] for kind, names in known.items()}


def chosen(what: str) -> list[tuple[Plugin, dict[str, object]]]:
    """The plugins that are meant, with the parameters that the name came with.

    Raises:
        RequestError: no plugin of any kind has the name, or the file holds none.
    """
    if what == ALL:
        return [(plugin, {}) for kind in registry.KINDS for plugin in registry.plugins(kind)]
    if what.endswith(".py"):
        return [(plugin, {}) for plugin in registry.load_file(what)]
    spec = parse_spec(what)
    everything = [plugin for kind in registry.KINDS for plugin in registry.plugins(kind)]
    found = [plugin for plugin in everything if plugin.name == spec.name]
    if not found:
        for kind in registry.KINDS:
            if spec.name in registry.broken(kind):
                registry.get(kind, spec.name)  # raises, with the reason
        raise RequestError(
            f"no plugin is named '{spec.name}'; {nearest(spec.name, (p.name for p in everything))} "
            "(or give the path of a .py file, or all)"
        )
    return [(plugin, dict(spec.params)) for plugin in found]


def load_models(names: str | None) -> dict[str, ModelSource]:
    """The models to try explainers on, loaded once for all of them.

    Raises:
        RequestError: a name is unknown.
    """
    asked = DEFAULT_MODELS if names is None else split_list(names)
    specs = unique(tuple(parse_spec(name) for name in asked), "models")
    if not specs:
        raise RequestError("--models is empty; give a comma list of names")
    return {spec.title: load_model(spec.name, **spec.params) for spec in specs}


def _run(made: Sequence[Case], errors: Console) -> list[Result]:
    results = []
    with errors.status("") as status:
        for case in made:
            status.update(f"{case.plugin.name}, {case.name} {case.model}")
            results.append(case.result())
    return results


def table(plugin: Plugin, results: Sequence[Result]) -> Table:
    """Checks by models."""
    models = list(dict.fromkeys(result.model for result in results if result.model))
    columns = models or ["result"]
    title = f"{plugin.facts.kind} {_plain(plugin.name)}"
    shown = Table("check", *columns, title=title, title_justify="left", box=None, pad_edge=False)
    for name in dict.fromkeys(result.check for result in results):
        fields = {result.model: result for result in results if result.check == name}
        whole = fields.get("")
        cells = [fields.get(model, whole if not models or model == models[0] else None) for model in columns]
        shown.add_row(name, *(_field(cell) for cell in cells))
    return shown


def _field(result: Result | None) -> str:
    if result is None:
        return ""
    return f"[{STYLES[result.status]}]{SHORT.get(result.status, result.status)}[/]"


def summary(plugin: Plugin, results: Sequence[Result]) -> str:
    """A plugin in one line."""
    bad = bool(failures(results))
    mark = "[bold red]failed[/]" if bad else "[green]passed[/]"
    seconds = sum(result.seconds for result in results)
    return f"{plugin.facts.kind:<10}{_plain(plugin.name):<24}{mark}  {count(results)} ({seconds:.1f} s)"


def count(results: Sequence[Result]) -> str:
    """How many of each status."""
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status])


def explain(results: Sequence[Result], console: Console, *, notes: bool) -> None:
    """Say what failed and what to do; with `notes` also why checks were skipped."""
    told: dict[tuple[Status, str], list[str]] = {}
    for result in results:
        if result.message and (notes or result.status not in ("passed", "skipped")):
            where = result.check + (f" on {result.model}" if result.model else "")
            if not notes:
                where = f"{result.kind} {result.plugin}, {where}"
            told.setdefault((result.status, result.message), []).append(where)
    order = list(STYLES)
    for (status, message), places in sorted(told.items(), key=lambda item: -order.index(item[0][0])):
        label = "note" if status == "passed" else status
        console.print(
            f"[{STYLES[status]}]{label}[/] {_plain('; '.join(places))}: {_plain(message)}",
            highlight=False,
            soft_wrap=True,
        )


def registry_faults() -> list[str]:
    """Plugin files and entry points that do not load."""
    return [
        f"{kind} {name}: {reason}"
        for kind in registry.KINDS
        for name, reason in registry.broken(kind).items()
    ]


def _plain(text: str) -> str:
    """Text without rich's markup: brackets of names are no styles."""
    from rich.markup import escape

    return escape(text)
