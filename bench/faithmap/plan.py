"""From a request to cells: what is to be computed, under which content key."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from faithmap.batch import Batch, Maps
from faithmap.config import Config, located, located_files, write_spec
from faithmap.data import LoadedDataset, choose, load_dataset
from faithmap.errors import FaithmapError, RequestError
from faithmap.explaining import bind, lacking, undefined
from faithmap.fitting import Fit, advice, find, wants_fit
from faithmap.models import Model, load_model
from faithmap.perturb import make_fill
from faithmap.plugin import AUTO, FITTED, Plugin
from faithmap.records import REFERENCE_NULL, Cell, Sample, Spec, canonical_json, digest
from faithmap.registry import default_metrics, get
from faithmap.requested_fits import Recipe, made, read_recipes
from faithmap.scoring import Heading, MetricUse, use_metric
from faithmap.training import Training


@dataclass(frozen=True)
class ExplainerUse:
    """An explainer with its parameters, as one run uses it."""

    label: str
    plugin: Plugin
    #: As they were given: a file keeps the path that was typed.
    params: dict[str, Any]
    #: Parameters that name a file, with the place where it was found.
    files: Mapping[str, str] = field(default_factory=dict)
    #: What an explainer that must be fitted has learnt, by the model's name; None where it has not.
    fits: Mapping[str, Fit] = field(default_factory=dict)
    #: Why it has no fit for a model that it must be fitted to, by the model's name.
    unfitted: Mapping[str, str] = field(default_factory=dict)
    #: What the request itself fits before it runs, by the model's name.
    wanted: Mapping[str, Training] = field(default_factory=dict)

    def skip(self, model: Model, gives: frozenset[str]) -> str:
        """Why it does not explain a model here; empty where it does."""
        return (
            self.misplaced(model)
            or undefined(self.plugin, model, gives, self.params)
            or self.unfitted.get(model.name, "")
        )

    def misplaced(self, model: Model) -> str:
        """Why a model has no layer at the depth that is asked for; empty where it has.

        Depths are those of a family of models, which a request may mix; a dotted name that is not there is
        a mistake and refused.
        """
        layer = self.params.get("layer")
        if isinstance(layer, str) and ":" in layer:
            try:
                model.layer(layer)
            except RequestError as error:
                return str(error)
        return ""

    def files_key(self) -> dict[str, str]:
        """SHA-256 of each file: its content is part of what the maps depend on, its place is not."""
        return {
            key: hashlib.sha256(Path(place).read_bytes()).hexdigest()
            for key, place in self.files.items()
            if key != FITTED  # what a fit has learnt counts, not the file
        }


@dataclass(frozen=True)
class Grid:
    """All that a request asks for, checked: nothing has been computed yet."""

    config: Config
    models: tuple[Model, ...]
    datasets: tuple[tuple[LoadedDataset, tuple[Sample, ...]], ...]
    explainers: tuple[ExplainerUse, ...]
    metrics: tuple[MetricUse, ...]


@dataclass(frozen=True)
class Task:
    """A cell, how its maps are made, and what scores them."""

    cell: Cell
    plugin: Plugin
    call: Callable[[Model, Batch], Maps]
    metrics: tuple[MetricUse, ...]
    #: Why the explainer is not defined here; empty where it is.
    skip: str
    #: What the maps depend on beside images and targets: cells that differ in scoring alone share them.
    maps_key: str = ""

    def heading(self, seed: int) -> Heading:
        """What all rows of the cell have in common."""
        cell = self.cell
        return Heading(cell.model, cell.dataset, cell.explainer, cell.params_json, cell.map_grid, seed)


def make_grid(config: Config, models: Sequence[Model] = ()) -> Grid:
    """Check a whole request and load its models and lists of images.

    Args:
        config: the request.
        models: `Model`s given from Python, which take the place of the request's models.

    Raises:
        RequestError: anything in the request is wrong.
    """
    explainers = _explainers(config)
    metrics = _metrics(config)
    datasets = []
    for spec in config.datasets:
        dataset = load_dataset(spec)
        datasets.append((dataset, choose(dataset.samples, config.run.part, config.run.limit)))
    loaded = tuple(models) or tuple(load_named(spec) for spec in config.models)
    names = [model.name for model in loaded]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two models are named '{name}'; give one another name")
    specs = {spec.title: spec for spec in config.models}
    recipes = read_recipes(config, [use.plugin for use in explainers])
    fitted = tuple(_with_fits(use, loaded, specs, recipes.get(use.plugin.name)) for use in explainers)
    return Grid(config, loaded, tuple(datasets), fitted, metrics)


def _with_fits(
    use: ExplainerUse, models: Sequence[Model], specs: Mapping[str, Spec], recipe: Recipe | None
) -> ExplainerUse:
    """An explainer with its fit for each model that it is defined for, where it must be fitted.

    Where the request has a recipe and names no fit, only a fit by that recipe will do; where the images of
    the recipe are not here, any fit does.
    """
    if not wants_fit(use.plugin, use.params):
        return use
    fits: dict[str, Fit] = {}
    unfitted: dict[str, str] = {}
    wanted: dict[str, Training] = {}
    for model in models:
        if use.misplaced(model) or undefined(use.plugin, model, use.plugin.facts.needs, use.params):
            continue
        try:
            if recipe is not None and not recipe.missing and use.params.get(FITTED, AUTO) == AUTO:
                asked = recipe.training(use.plugin, use.params, model)
                found = made(asked)
                if found is None:
                    wanted[model.name] = asked
                    unfitted[model.name] = "not fitted for this model yet; the run itself does it first"
                    continue
            else:
                found = find(use.plugin, {**use.params, **use.files}, model)
            if found is not None:
                # A fit that does not serve the model is found out before anything is computed.
                use.plugin.make(use.params).load(model, found.tensors())  # type: ignore[attr-defined]
        except RequestError:
            raise
        except FaithmapError as error:
            unfitted[model.name] = str(error)
            continue
        if found is None:
            unfitted[model.name] = advice(use.plugin, use.params, model, _named(specs.get(model.name)))
            if recipe is not None:
                unfitted[model.name] += f". The request's own images for it are not here: {recipe.missing}"
        else:
            fits[model.name] = found
    params = dict(use.params)
    if FITTED in use.files and fits:  # the path of a machine has no place in rows
        params[FITTED] = next(iter(fits.values())).key
    return replace(use, params=params, fits=fits, unfitted=unfitted, wanted=wanted)


def _named(spec: Spec | None) -> str:
    """How `faithmap train` names a model of the request; empty where its name is enough."""
    if spec is None or not (spec.params or spec.label):
        return ""
    if spec.base is not None:
        return f"{shlex.quote(spec.title)} --request FILE.toml"
    return shlex.quote(write_spec(spec.name, spec.params))


def load_named(spec: Spec) -> Model:
    """The model of a request, under the name that it was given there."""
    name, params = located(spec)
    model = load_model(name, **params)
    # A file's absolute path has no place on a board: the name as it was typed has.
    model.name = spec.title
    return model


def _explainers(config: Config) -> tuple[ExplainerUse, ...]:
    specs = list(config.explainers)
    if not any(spec.name == REFERENCE_NULL for spec in specs):
        specs.append(Spec(REFERENCE_NULL))  # calibrates every score and stands in for failed maps
    uses = []
    for spec in specs:
        plugin = get("explainer", spec.name)
        params = plugin.check(spec.params)
        if plugin.facts.role == "null":
            params.pop("draw", None)
        uses.append(ExplainerUse(spec.title, plugin, params, located_files(spec)))
    return tuple(uses)


def _metrics(config: Config) -> tuple[MetricUse, ...]:
    specs = config.metrics or tuple(Spec(plugin.name) for plugin in default_metrics())
    uses = tuple(use_metric(spec) for spec in specs)
    for use in uses:
        if isinstance(fill := use.params.get("fill"), str):
            make_fill(fill, torch.zeros(1, 3, 8, 8))  # raises where there is no such fill
    names = [use.spec for use in uses]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"the metric '{name}' is listed twice with the same parameters; drop one")
    return uses


def map_grid(config: Config, model: Model) -> tuple[int, int] | None:
    """The grid (h, w) that maps are reduced to; None for native resolution."""
    setting = config.run.map_grid
    if setting == "native":
        return None
    return model.grid if setting == "model" else (int(setting), int(setting))


def plan_tasks(grid: Grid, model: Model, dataset: LoadedDataset) -> list[Task]:
    """The cells of one model and dataset: each explainer, each null's draws, each method's moved maps."""
    tasks = []
    served = tuple(use for use in grid.metrics if not lacking(use.needs, dataset.gives))
    for use in grid.explainers:
        skip = use.skip(model, dataset.gives)
        if not skip and isinstance(layer := use.params.get("layer"), str):
            model.layer(layer)  # raises where there is none, before anything is computed
        if use.plugin.facts.role == "null":
            for draw in range(grid.config.run.null_draws):
                tasks.append(_task(grid, model, dataset, use, served, skip, {"draw": draw}))
            continue
        tasks.append(_task(grid, model, dataset, use, served, skip, {}))
        # Moved maps calibrate the default reading alone: other fills would treble their cost.
        calibrating = tuple(metric for metric in served if metric.facts.calibrate and not metric.variant)
        if use.plugin.facts.role != "method" or skip or not calibrating:
            continue
        for null in grid.config.run.own_nulls:
            for draw in range(grid.config.run.null_draws):
                moved = {"null": null, "draw": draw}
                tasks.append(_task(grid, model, dataset, use, calibrating, skip, moved))
    return tasks


def _task(
    grid: Grid,
    model: Model,
    dataset: LoadedDataset,
    use: ExplainerUse,
    metrics: tuple[MetricUse, ...],
    skip: str,
    extra: dict[str, Any],
) -> Task:
    run = grid.config.run
    null = extra.get("null")
    params = {**use.params, **extra}
    # A draw of a null is a parameter of its plugin; a moved map is made by the core.
    call_params = use.params if null else params
    shape = map_grid(grid.config, model)
    files = use.files_key()
    content: list[Any] = [files] if files else []
    fit = use.fits.get(model.name)
    content += [{"fit": fit.digest}] if fit is not None else []
    keyed = {name: value for name, value in params.items() if not (use.plugin.fits and name == FITTED)}
    key = digest(
        model.digest(), dataset.key, run.target, use.plugin.name, use.plugin.facts.version, keyed,
        use.plugin.file_sha256(), run.seed, run.precision, run.map_grid, shape, *content, length=20,
    )  # fmt: skip
    # Our own methods know nothing of the run's grid; what others may read of a batch is not known.
    drawn_on = [] if use.plugin.built_in and use.plugin.facts.role == "method" else [shape]
    maps_key = digest(
        model.digest(), dataset.key, use.plugin.name, use.plugin.facts.version, keyed,
        use.plugin.file_sha256(), run.seed, run.precision, *drawn_on, *content, length=20,
    )  # fmt: skip
    cell = Cell(
        model=model.name,
        dataset=dataset.label,
        explainer=use.plugin.name,
        params=params,
        map_grid=str(run.map_grid),
        key=key,
        label=use.label,
        role=use.plugin.facts.role,
        null=null,
        draw=extra.get("draw"),
    )
    return Task(cell, use.plugin, bind(use.plugin, call_params, use.files, fit), metrics, skip, maps_key)


def identity(grid: Grid) -> dict[str, Any]:
    """What all rows of one run folder share; another value of any of these is refused there."""
    run = grid.config.run
    return {
        "seed": run.seed,
        "precision": run.precision,
        "map_grid": run.map_grid,
        "target": run.target,
        "weights": {model.name: model.digest() for model in grid.models},
    }


def default_folder(grid: Grid) -> str:
    """`runs/<preset>-<short hash>`: the same request always finds its folder again."""
    return f"runs/{grid.config.name}-{digest(canonical_json(identity(grid)), length=8)}"
