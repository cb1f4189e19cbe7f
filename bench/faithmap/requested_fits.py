"""`[[fits]]`: how a request fits the explainers that must be fitted, so that one command does all.

    [[fits]]
    name = "scan"                              # an explainer of the request
    dataset = "shapes[split=train,n=2048]"     # or a table: { name = "imagefolder", root = "photos" }
    epochs = 10                                # options of its fit, as of `faithmap train --set`

`part`, `limit`, `seed` and `precision` are those of `faithmap train`; the seed is by default the run's. Each
variant of the explainer that the request names is fitted to each model. It is the fit that `faithmap train`
would make, and is taken from there if it has; else it is kept apart, so that it takes the place of no other:
lines of other requests find it where there is nothing else for them. A fit that fails costs its own line of
the board, which then has the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faithmap import fitting
from faithmap.config import Config, RunSettings, parse_spec, run_settings
from faithmap.data import LoadedDataset, choose, load_dataset
from faithmap.errors import FaithmapError, RequestError, nearest
from faithmap.fitting import Fit
from faithmap.models import Model
from faithmap.plugin import Plugin
from faithmap.records import OF_THE_LINE, Sample, Spec
from faithmap.registry import get, plugins
from faithmap.training import Training, Watcher, fit_options, train

#: Settings of a fit that are no options of the explainer's own.
SETTINGS = ("part", "limit", "seed", "precision")


@dataclass(frozen=True)
class Recipe:
    """How one explainer is fitted, to whatever model."""

    dataset: LoadedDataset | None
    samples: tuple[Sample, ...]
    options: Mapping[str, Any]
    part: str
    limit: int | None
    seed: int
    precision: str
    #: Why there is nothing to learn from here; empty where there is.
    missing: str = ""

    def training(self, plugin: Plugin, params: Mapping[str, Any], model: Model) -> Training:
        """The fit of an explainer with these parameters to a model.

        Raises:
            RequestError: there are no images to learn from.
        """
        if self.dataset is None:
            raise RequestError(self.missing)
        return Training(
            plugin, params, model, self.dataset, self.samples, self.options, self.part, self.limit,
            self.seed, self.precision,
        )  # fmt: skip


def read_recipes(config: Config, plugins: Sequence[Plugin]) -> dict[str, Recipe]:
    """The recipes of a request, by the explainer's name.

    Raises:
        RequestError: an entry names no explainer of the request, one that is not fitted, no dataset, or
            an unknown option.
    """
    known = {plugin.name: plugin for plugin in plugins}
    # Explainers chosen on the command line may leave a request's recipe without use.
    wanted = [spec for spec in config.fits if spec.name in known]
    unknown = [spec.name for spec in config.fits if not _is_named(spec.name)]
    if unknown:
        raise RequestError(
            f"[[fits]] names '{unknown[0]}', which is no explainer; {nearest(unknown[0], known)}"
        )
    return {spec.name: _recipe(spec, known[spec.name], config.run) for spec in wanted}


def made(asked: Training) -> Fit | None:
    """The fit that a request asks for, where it has been made."""
    for folder in fitting.folders(asked.plugin.name):
        file: Path = folder / asked.file_name
        if file.is_file():
            return fitting.read(file)
    return None


def fit_or_reason(asked: Training, failed: dict[str, str], watcher: Watcher) -> Fit | str:
    """Make a fit that a request asks for; where it fails, the reason, so that the others go on.

    Args:
        asked: what is fitted to what; the model is on its device.
        failed: the reasons of those that failed, by file: one that several lines ask for is tried once.
        watcher: is told how it goes on.
    """
    if asked.file_name not in failed:
        try:
            return train(asked, watcher, out=fitting.requested_folder(asked.plugin.name))
        except FaithmapError as error:
            # Folders of this machine have no place on a board.
            told = str(error).replace(str(fitting.home()), f"${fitting.HOME_VARIABLE}")
            failed[asked.file_name] = f"not fitted: {told}"
    return failed[asked.file_name]


def _is_named(name: str) -> bool:
    return any(plugin.name == name for plugin in plugins("explainer"))


def _recipe(spec: Spec, plugin: Plugin, run: RunSettings) -> Recipe:
    given = dict(spec.params)
    source = given.pop("dataset", None)
    settings = {key: given.pop(key) for key in SETTINGS if key in given}
    options = fit_options(plugin, given)
    # Checked as the same settings of a run are; without a limit a fit takes every image.
    checked = run_settings({"part": "all", "seed": run.seed, **settings}, f"[[fits]] for '{spec.name}'")
    found = _dataset(source, spec)
    get("dataset", found.name).check(found.params)  # a mistake, unlike files that are not here
    try:
        dataset = load_dataset(found)
    except RequestError as error:
        # A fit that is there already serves without the images that it learnt from.
        return Recipe(
            None, (), options, checked.part, checked.limit, checked.seed, checked.precision, str(error)
        )
    samples = choose(dataset.samples, checked.part, checked.limit)
    return Recipe(dataset, samples, options, checked.part, checked.limit, checked.seed, checked.precision)


def _dataset(source: Any, spec: Spec) -> Spec:
    if isinstance(source, str):
        named = parse_spec(source)
        return Spec(named.name, named.params, base=spec.base)
    if isinstance(source, Mapping) and isinstance(source.get("name"), str):
        rest = {key: value for key, value in source.items() if key not in OF_THE_LINE}
        return Spec(source["name"], rest, str(source.get("label", "")), spec.base)
    raise RequestError(
        f"[[fits]] for '{spec.name}': dataset is {source!r}; name the images to learn from, such as "
        'dataset = "shapes[split=train]"'
    )
