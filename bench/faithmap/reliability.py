"""Is a plugin from outside fit to be ranked? The quick checks of the kit, made as a run starts.

Plugins that come with the package are held to the kit by its tests. One from a file, another
package or a notebook is checked before the first image; where a check fails, it runs all the same,
but its line is marked unreliable and is not ranked. The verdict stands in the manifest. A run that
goes on keeps it, as long as the plugin's file and the libraries are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import faithmap
from faithmap.engine import Observer
from faithmap.explaining import EVERYTHING, undefined
from faithmap.models import Model, load_model
from faithmap.plan import Grid
from faithmap.plugin import Plugin
from faithmap.records import digest

#: Raised when a change of the checks should have plugins checked anew.
KIT = 3


def judge(grid: Grid, held: Mapping[str, Any] | None, observer: Observer) -> dict[str, dict[str, Any]]:
    """The verdicts on the plugins of a request that are not built in, by their key.

    Args:
        grid: the request.
        held: the manifest of an earlier run in the folder, whose verdicts stand.
        observer: is told of each plugin that is checked.

    Returns:
        Key of the plugin -> `{"name", "kind", "failed"}`, `failed` being a list of
        `{"check", "model", "message"}`.
    """
    known = dict((held or {}).get("verdicts", {}))
    verdicts = {}
    for plugin, params in _outside(grid):
        models = _own_models(plugin, grid.models)
        key = key_of(plugin, params, tuple(models))
        if key not in known:
            started = time.perf_counter()
            known[key] = _check(plugin, params, models)
            observer.checked(plugin.name, len(known[key]["failed"]), time.perf_counter() - started)
        verdicts[key] = known[key]
    return verdicts


def _outside(grid: Grid) -> Iterator[tuple[Plugin, dict[str, Any]]]:
    for use in grid.explainers:
        yield from _unless_built_in(use.plugin, {})
    for metric in grid.metrics:
        yield from _unless_built_in(metric.plugin, {})
    for dataset, _ in grid.datasets:
        # A dataset is where the request says; other plugins are checked at their small settings.
        yield from _unless_built_in(dataset.plugin, dataset.params)


def _unless_built_in(plugin: Plugin, params: dict[str, Any]) -> Iterator[tuple[Plugin, dict[str, Any]]]:
    if not plugin.built_in:
        yield plugin, params


def _own_models(plugin: Plugin, models: Sequence[Model]) -> dict[str, Model]:
    """The run's models that an explainer is defined for, where it is for none of the kit's own."""
    facts = plugin.facts
    if facts.kind != "explainer" or not (facts.families or facts.defined_for):
        return {}
    from faithmap._checks import DEFAULT_MODELS

    if any(not undefined(plugin, load_model(name), EVERYTHING) for name in DEFAULT_MODELS):
        return {}
    return {model.name: model for model in models if not undefined(plugin, model, EVERYTHING)}


def key_of(plugin: Plugin, params: Mapping[str, Any], models: Sequence[str] = ()) -> str:
    """What a verdict holds for: the code of the plugin, and what it was checked with."""
    facts = plugin.facts
    return digest(
        KIT, faithmap.__version__, version("torch"), facts.kind, facts.name, facts.version,
        plugin.file_sha256(), facts.check_params, params, *models,
    )  # fmt: skip


def _check(plugin: Plugin, params: Mapping[str, Any], models: Mapping[str, Model]) -> dict[str, Any]:
    from faithmap.conformance import cases, failures

    made = cases(plugin.facts.kind, plugin, dict(models) or None, params=params, slow=False)
    failed = failures(case.result() for case in made)
    return {
        "name": plugin.name,
        "kind": plugin.facts.kind,
        "failed": [{"check": r.check, "model": r.model, "message": r.message} for r in failed],
    }


def record(manifest: dict[str, Any], verdicts: Mapping[str, dict[str, Any]]) -> None:
    """Put verdicts into a manifest, and mark the explainers, metrics and datasets that failed."""
    manifest["verdicts"] = dict(verdicts)
    bad = {(verdict["kind"], verdict["name"]) for verdict in verdicts.values() if verdict["failed"]}
    for entry in manifest["explainers"].values():
        entry["reliable"] = ("explainer", entry["name"]) not in bad
    for entry in manifest["metrics"]:
        entry["reliable"] = ("metric", entry["name"]) not in bad
    for entry in manifest["datasets"].values():
        entry["reliable"] = ("dataset", entry["name"]) not in bad
