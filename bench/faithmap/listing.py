"""`faithmap list`: what can be named in a request, generated from the registers."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from faithmap import registry
from faithmap.config import preset, preset_names, preset_text
from faithmap.errors import RequestError, nearest
from faithmap.plugin import Plugin
from faithmap.records import FAMILIES, Kind
from faithmap.report._format import count

KINDS = ("explainers", "fits", "metrics", "datasets", "models", "presets")
#: Models on which `--json` and the reference tell what an explainer costs: a CNN and a transformer, embedded.
MODELS = ("shapes/resnet", "shapes/vit")


def load_plugins(files: Sequence[Path]) -> None:
    """Load the files named by `--plugin`."""
    for file in files:
        registry.load_file(file)


def entries(kind: str) -> list[dict[str, Any]]:
    """What there is of a kind, each entry with its name.

    Raises:
        RequestError: there is no such kind.
    """
    if kind == "presets":
        return [_preset(name) for name in preset_names()]
    if kind == "models":
        return _models()
    if kind == "fits":
        return [_fit(plugin) for plugin in registry.plugins("explainer") if plugin.fits]
    if kind not in KINDS:
        raise RequestError(f"cannot list '{kind}'; {nearest(kind, KINDS)}")
    single: Kind = kind[:-1]  # type: ignore[assignment]
    return [_plugin(plugin) for plugin in registry.plugins(single)]


def _plugin(plugin: Plugin) -> dict[str, Any]:
    facts = plugin.facts
    entry: dict[str, Any] = {
        "name": plugin.name,
        "summary": plugin.summary,
        "version": facts.version,
        "source": facts.source,
        "params": {k: v for k, v in plugin.parameters.items() if k != "draw"},
        "origin": plugin.origin,
    }
    if facts.kind == "explainer":
        entry |= {
            "role": facts.role,
            "families": sorted(facts.families or FAMILIES),
            "class_specific": facts.class_specific,
            "fit_options": plugin.fit_options,
            "needs": sorted(facts.needs),
            "exact_cost": facts.exact_cost,
            "iterative": facts.iterative,
            "check_params": dict(facts.check_params),
            "documentation": plugin.documentation,
        }
    elif facts.kind == "metric":
        entry |= {"scores": dict(facts.scores), "needs": sorted(facts.needs), "default": facts.default}
    else:
        entry |= {"license": facts.license, "revision": facts.revision, "gives": sorted(facts.gives)}
    return entry


def _fit(plugin: Plugin) -> dict[str, Any]:
    """An explainer that is fitted first, with the options of `faithmap train --set` for parameters."""
    return {
        "name": plugin.name,
        "summary": plugin.summary,
        "params": plugin.fit_options,
        "fit_params": sorted(plugin.facts.fit_params or plugin.parameters),
        "origin": plugin.origin,
    }


def add_costs(found: Sequence[dict[str, Any]]) -> None:
    """Add to the entries of explainers what they declare to cost, for each of `MODELS`.

    `forwards` and `backwards` at default parameters are null where nothing is declared, and where the
    explainer is not defined for the model; `undefined` then says why.
    """
    from faithmap.costs import ask
    from faithmap.models import load_model

    models = {name: load_model(name) for name in MODELS}
    for entry in found:
        said = {name: ask(registry.get("explainer", entry["name"]), model) for name, model in models.items()}
        entry["forwards"] = {name: statement.passes.forwards for name, statement in said.items()}
        entry["backwards"] = {name: statement.passes.backwards for name, statement in said.items()}
        entry["undefined"] = {name: statement.reason for name, statement in said.items() if statement.reason}


def _preset(name: str) -> dict[str, Any]:
    content = preset(name).model_dump(mode="json")
    comment = itertools.takewhile(lambda line: line.startswith("# "), preset_text(name).splitlines())
    said = re.split(r"(?<!et al)\. ", " ".join(line[2:] for line in comment))[0]
    size = ", ".join(count(len(content[key]), key[:-1]) for key in ("models", "datasets", "explainers"))
    return {
        "name": name,
        "summary": f"{said.rstrip('.')} ({size})",
        **{
            key: [entry["name"] for entry in content[key]]
            for key in ("models", "datasets", "explainers", "metrics")
        },
    }


def _models() -> list[dict[str, Any]]:
    from faithmap import tuned, zoo

    embedded = [
        {
            "name": f"shapes/{name}",
            "summary": f"embedded, trained on shapes, input {zoo.card(name)['input_size']} pixels",
        }
        for name in zoo.NAMES
    ]
    families = [
        ("timm/NAME", "any image classifier of timm; weights = PATH or pretrained"),
        ("torchvision/NAME", "any image classifier of torchvision; weights = PATH or pretrained"),
        ("hf/ID", "an image classifier of the Hugging Face hub (needs transformers)"),
        ("dino/NAME", "a DINO vision transformer with its authors' linear classifier (head = PATH)"),
        ("tuned/NAME", "what `faithmap finetune` wrote; the path of such a file will do too"),
        ("FILE.py:FUNCTION", "your own: a function that returns faithmap.Model(...)"),
    ]
    mine = [
        {"name": f"{tuned.SOURCE}/{name if len(files) == 1 else file.stem}", "summary": _told_tuned(file)}
        for name, files in tuned.known().items()
        for file in files
    ]
    return embedded + mine + [{"name": name, "summary": summary} for name, summary in families]


def _told_tuned(file: Path) -> str:
    from faithmap import tuned

    try:
        return f"fine-tuned: {tuned.told_origin(file)}"
    except RequestError as error:
        return str(error)


def brief(value: object) -> str:
    """A parameter's value for people: floats to four digits.

    >>> brief(15 / 224), brief(1e-06), brief(10.0), brief("zero"), brief(None)
    ('0.06696', '1e-06', '10.0', 'zero', 'None')
    """
    if not isinstance(value, float):
        return str(value)
    return min(str(value), f"{value:.4g}", key=len) if value % 1 else str(value)


def show(kind: str, as_json: bool, console: Console, errors: Console) -> int:
    """Print a list; 1 where a plugin file could not be loaded."""
    found = entries(kind)
    if as_json:
        if kind == "explainers":
            add_costs(found)
        # Not through rich, which would wrap long lines.
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        table = Table("name", "what it is", "parameters", box=None, header_style="bold", pad_edge=False)
        for entry in found:
            params = ", ".join(f"{key}={brief(value)}" for key, value in entry.get("params", {}).items())
            named = "" if entry.get("default", True) else " Has to be named."
            table.add_row(entry["name"], f"{entry['summary']}{named}", params)
        console.print(table, markup=False, highlight=False)
    unloaded = {}
    for single in registry.KINDS:
        if kind == f"{single}s":
            unloaded = registry.broken(single)
    for name, reason in unloaded.items():
        errors.print(f"not loaded: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    return 1 if unloaded else 0
