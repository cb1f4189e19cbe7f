"""The page of all explainers, made from the register: `python -m faithmap.reference docs/explainers.md`.

Everything on it is read from decorators and docstrings, but for the counted passes: each explainer is run
at its default parameters on one embedded image. That takes minutes, most of them for the methods of
thousands of passes; where only some have changed, `--count` names those that are run again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from faithmap import registry
from faithmap.errors import RequestError
from faithmap.fitting import wants_fit
from faithmap.listing import MODELS, brief
from faithmap.plugin import FITTED
from faithmap.records import Spec

if TYPE_CHECKING:
    from faithmap.batch import Batch
    from faithmap.costs import Passes
    from faithmap.models import Model
    from faithmap.plugin import Plugin

#: Embedded models whose reasons are quoted where a method looks at the model and is not defined for it.
ASKED = (*MODELS, "shapes/convnext")
FAMILIES = {"cnn": "CNN", "vit": "ViT"}
ABSENT = "–"

#: Explainer -> model -> passes counted on one image.
Counts = Mapping[str, Mapping[str, "Passes"]]


@dataclass(frozen=True)
class Documentation:
    """A docstring in parts."""

    #: The prose, the summary first; lines are joined, but those of lists.
    paragraphs: tuple[str, ...]
    #: What is said of each argument.
    arguments: Mapping[str, str]


def read_docstring(text: str) -> Documentation:
    """Take a docstring apart: its prose, and the entries of "Args:".

    >>> found = read_docstring("Sum.\\n\\nOf all\\nthings.\\n\\nArgs:\\n    a, b: two\\n        numbers.")
    >>> found.paragraphs, found.arguments
    (('Sum.', 'Of all things.'), {'a': 'two numbers.', 'b': 'two numbers.'})
    """
    prose, *rest = re.split(r"^(Args|Raises|Returns|Yields):$", text, flags=re.M)
    section = dict(zip(rest[::2], rest[1::2], strict=True)).get("Args", "")
    arguments: dict[str, str] = {}
    for names, meaning in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, flags=re.M):
        arguments |= {name.strip(): " ".join(meaning.split()) for name in names.split(",")}
    paragraphs = [
        "\n".join(" ".join(item.split()) for item in re.split(r"\n(?=- )", part))
        for part in prose.split("\n\n")
        if part.strip()
    ]
    return Documentation(tuple(paragraphs), arguments)


def escaped(text: str) -> str:
    r"""Plain text as Markdown that shows it unchanged; what stands in backticks is left alone.

    >>> print(escaped("A_ times *x* [0, 1] with `a_b`"))
    A\_ times \*x\* [0, 1] with `a_b`
    """
    # Underscores within a word, and brackets without a link behind them, mean nothing in Markdown.
    special = r"[\\*<$~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])"
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(special, r"\\\g<0>", part) for i, part in enumerate(parts))


def linked(source: str) -> str:
    """A source with links behind its arXiv and DOI numbers."""
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", escaped(source))
    return re.sub(r"doi:(10\.[^\s,;)]+)", r"[\g<0>](https://doi.org/\1)", text)


def page(plugins: Sequence[Plugin], models: Mapping[str, Model], counts: Counts) -> str:
    """The page in Markdown.

    Args:
        plugins: the explainers, by name.
        models: those of `ASKED`, by name.
        counts: passes of each explainer on each of `MODELS`, where they were counted.
    """
    methods = [plugin for plugin in plugins if plugin.facts.role == "method"]
    others = [plugin for plugin in plugins if plugin.facts.role != "method"]
    anchors = _anchors([plugin.name for plugin in (*methods, *others)])
    template = (resources.files("faithmap") / "templates" / "explainers.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        methods=_table(methods, anchors, models, counts),
        others=_table(others, anchors, models, counts),
        method_sections="\n\n".join(_section(plugin, models) for plugin in methods),
        other_sections="\n\n".join(_section(plugin, models) for plugin in others),
    )


def _anchors(names: Iterable[str]) -> dict[str, str]:
    """The anchors that GitHub and Sphinx give to headings: without signs, numbered where two are alike."""
    anchors: dict[str, str] = {}
    used: dict[str, int] = {}
    for name in names:
        plain = re.sub(r"[^\w-]", "", name.lower())
        taken = used.setdefault(plain, 0)
        anchors[name] = f"{plain}-{taken}" if taken else plain
        used[plain] += 1
    return anchors


def _table(
    plugins: Sequence[Plugin], anchors: Mapping[str, str], models: Mapping[str, Model], counts: Counts
) -> str:
    from faithmap.costs import ask

    columns = [f"{name.partition('/')[2]}, {how}" for name in MODELS for how in ("declared", "counted")]
    lines = [["explainer", "source", "by class", "models", *columns], ["---"] * 4 + ["--:"] * len(columns)]
    for plugin in plugins:
        facts = plugin.facts
        by_class = "yes" if facts.class_specific else "no"
        cells = [f"[{plugin.name}](#{anchors[plugin.name]})", linked(facts.source), by_class, _models(plugin)]
        for name in MODELS:
            said = ask(plugin, models[name])
            bound = "" if facts.exact_cost or said.reason else "≤ "
            cells += [bound + _passes(said.passes), _passes(counts.get(plugin.name, {}).get(name))]
        lines.append(cells)
    return _rows(lines)


def _rows(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _models(plugin: Plugin) -> str:
    names = [FAMILIES.get(name, name) for name in sorted(plugin.facts.families)]
    return (", ".join(names) or "all") + ("" if plugin.facts.defined_for is None else " †")


def _passes(passes: Passes | None) -> str:
    if passes is None or passes.forwards is None or passes.backwards is None:
        return ABSENT
    return f"{passes.forwards:g} + {passes.backwards:g}"


def _section(plugin: Plugin, models: Mapping[str, Model]) -> str:
    """One explainer: what it is, its parameters, and what else there is to know."""
    from faithmap.costs import ask

    facts, known = plugin.facts, read_docstring(plugin.documentation)
    parts = [f"### {plugin.name}", *map(escaped, known.paragraphs)]
    arguments = {FITTED: "which fit to take, by the beginning of its key or by its file.", **known.arguments}
    parameters = [
        [f"`{name}`", f"`{brief(default)}`", escaped(arguments.get(name, ""))]
        for name, default in plugin.parameters.items()
        if name != "draw"  # the number of a null's draw, which runs count up themselves
    ]
    if parameters:
        parts.append(_rows([["parameter", "default", ""], ["---"] * 3, *parameters]))
    notes = [f"Source: {linked(facts.source)}."]
    for name, model in models.items():
        if facts.defined_for is not None and (not facts.families or model.family in facts.families):
            reason = ask(plugin, model).reason
            notes += [f"Not on `{name}`: {escaped(reason)}."] if reason else []
    if wants_fit(plugin, plugin.check({})):
        notes.append("Must be fitted before it explains; its passes are not counted here.")
    if facts.iterative:
        notes.append("Found step by step, so that rounding grows: the kit compares its maps by their ranks.")
    if facts.check_params:
        small = ", ".join(f"`{key}={brief(value)}`" for key, value in facts.check_params.items())
        notes.append(f"The kit runs it with {small}.")
    if not plugin.built_in:
        notes.append(f"From `{Path(plugin.origin).name}`.")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def counts_on(text: str) -> dict[str, dict[str, Passes]]:
    """The counts that stand on a page."""
    from faithmap.costs import Passes

    found: dict[str, dict[str, Passes]] = {}
    for name, rest in re.findall(r"^\| \[(\S+)\]\(#\S+\) \|(.*)\|$", text, flags=re.M):
        cells = rest.split("|")[-2 * len(MODELS) :]
        numbers = [re.fullmatch(r" (\S+) \+ (\S+) ", cell) for cell in cells[1::2]]
        found[name] = {
            model: Passes(float(match[1]), float(match[2]))
            for model, match in zip(MODELS, numbers, strict=True)
            if match
        }
    return found


def count(plugins: Sequence[Plugin], models: Mapping[str, Model]) -> dict[str, dict[str, Passes]]:
    """Run each explainer, where it is defined and needs no fit, on the image, and count its passes."""
    from faithmap.costs import ask, counted

    found: dict[str, dict[str, Passes]] = {plugin.name: {} for plugin in plugins}
    for name in MODELS:
        batch = example(models[name])
        for plugin in plugins:
            if not ask(plugin, models[name]).reason and not wants_fit(plugin, plugin.check({})):
                found[plugin.name][name] = counted(plugin, models[name], batch)
                sys.stderr.write(f"{name}: {plugin.name} {_passes(found[plugin.name][name])}\n")
    return found


def example(model: Model) -> Batch:
    """The image that passes are counted on: the first that a run on `shapes` explains."""
    from faithmap.data import Shard, choose, load_dataset, make_batch, read_shard

    samples = choose(load_dataset(Spec("shapes")).samples, "eval", 1)
    read, _ = read_shard(Shard(samples, True), model)
    return make_batch(read, model, "predicted", model.grid, 0)


def load_models() -> dict[str, Model]:
    """The models of `ASKED`, by name."""
    from faithmap.models import load_model

    return {name: load_model(name) for name in ASKED}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m faithmap.reference", description=__doc__)
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument(
        "--plugin", type=Path, action="append", default=[], help="a file with explainers of yours"
    )
    parser.add_argument(
        "--count", metavar="NAMES", help="run these, a comma list, and keep the page's other counts"
    )
    options = parser.parse_args(arguments)
    yours = [plugin for file in options.plugin for plugin in registry.load_file(file)]
    plugins = [p for p in registry.plugins("explainer") if p.built_in or p in yours]
    models, kept, again = load_models(), {}, plugins
    if options.count is not None:
        named = [registry.get("explainer", name.strip()) for name in options.count.split(",") if name.strip()]
        again = [plugin for plugin in plugins if plugin in named]
        kept = counts_on(options.page.read_text(encoding="utf-8"))
    text = page(plugins, models, {**kept, **count(again, models)})
    options.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RequestError as error:
        sys.exit(f"faithmap: {error}")
