"""The register of plugins: the three decorators, and discovery.

A plugin is one decorated function or class in one file. It is found in the rooms of this package
(`explainers/`, `metrics/`, `datasets/`), in the entry-point groups `faithmap.explainers`,
`faithmap.metrics` and `faithmap.datasets` of installed packages, and in files named by `--plugin`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import faithmap
from faithmap._score_names import refuse_taken
from faithmap.errors import FaithmapError, PluginError, RequestError, nearest
from faithmap.plugin import BUILT_IN, Plugin
from faithmap.records import OF_THE_LINE, Direction, Facts, Kind, Role

Function = TypeVar("Function", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
KINDS: tuple[Kind, ...] = ("explainer", "metric", "dataset")

_plugins: dict[tuple[Kind, str], Plugin] = {}
_discovered: set[Kind] = set()
_broken: dict[Kind, dict[str, str]] = {kind: {} for kind in KINDS}
#: What keeps a built-in plugin from being registered: another of its name.
_clashes: dict[Kind, str] = {}
_origin = BUILT_IN


def _register(facts: Facts, target: Callable[..., Any]) -> None:
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise PluginError(
                f"{facts.kind} '{facts.name}' takes **{parameter.name}; a plugin names its parameters, "
                "keyword-only and with defaults, so that they can be checked and stored"
            )
        if parameter.name in OF_THE_LINE and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(
                f"{facts.kind} '{facts.name}' has a parameter '{parameter.name}'; in a request that is the "
                f"{'name of the plugin' if parameter.name == 'name' else 'label of its line'}, so give the "
                "parameter another name"
            )
    source = inspect.getsourcefile(target)
    file = Path(source).resolve() if source else None
    plugin = Plugin(facts, target, file, _origin_of(facts.kind, file))
    known = _plugins.get((facts.kind, facts.name))
    if known is not None and (known.file, known.target.__qualname__) != (plugin.file, target.__qualname__):
        raise PluginError(
            f"two {facts.kind}s are named '{facts.name}': {known.file} and {plugin.file}; "
            "give one of them another name (name=...)"
        )
    if facts.kind == "metric":
        refuse_taken(facts.name, facts.scores, scores_beside(facts.name))
    _plugins[facts.kind, facts.name] = plugin


def scores_beside(metric: str) -> dict[str, tuple[str, ...]]:
    """The scores of all other metrics that are registered, by the metric's name."""
    return {
        name: tuple(plugin.facts.scores)
        for (kind, name), plugin in _plugins.items()
        if kind == "metric" and name != metric
    }


def _origin_of(kind: Kind, file: Path | None) -> str:
    """Where a plugin comes from: what is decorated in a script or a notebook is not built in."""
    if _origin != BUILT_IN or (file is not None and file.parent in _rooms(kind)):
        return _origin
    return str(file or "this session")


def _rooms(kind: Kind) -> list[Path]:
    return [(Path(entry) / f"{kind}s").resolve() for entry in faithmap.__path__]


def _hyphened(name: str) -> str:
    """A function's or class's name as a registry name.

    >>> _hyphened("input_x_gradient"), _hyphened("MaskedFeatures")
    ('input-x-gradient', 'masked-features')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def _decorator(kind: Kind, name: str | None, facts: dict[str, Any]) -> Callable[[Function], Function]:
    def decorate(target: Function) -> Function:
        title = name or _hyphened(target.__name__)
        _register(Facts(kind=kind, name=title, **facts), target)
        return target

    return decorate


def _with_facts(register: Callable[P, R]) -> Callable[P, R]:
    """Have a decorator say what to write where it stands alone, without the facts of the plugin."""

    @functools.wraps(register)
    def asking(*bare: P.args, **facts: P.kwargs) -> R:
        if bare:
            kind, name = register.__name__, getattr(bare[0], "__name__", repr(bare[0]))
            raise PluginError(
                f"@{kind} above '{name}' says nothing of it; write "
                f'@{kind}(version=1, source="paper and equation", ...)'
            )
        return register(*bare, **facts)

    return asking


@_with_facts
def explainer(
    *,
    version: int,
    source: str,
    name: str | None = None,
    families: Iterable[str] = (),
    defined_for: Callable[..., str | None] | None = None,
    class_specific: bool = True,
    forwards: float | Callable[..., float] | None = None,
    backwards: float | Callable[..., float] | None = None,
    exact_cost: bool = True,
    iterative: bool = False,
    check_params: Mapping[str, Any] | None = None,
    fit_params: Iterable[str] | None = None,
    check_fit: Mapping[str, Any] | None = None,
    per_image: bool = False,
    role: Role = "method",
    needs: Iterable[str] = (),
) -> Callable[[Function], Function]:
    """Register an explainer: `f(model, batch, *, params) -> maps (B, H, W)` at any resolution.

    An explainer that must be fitted first is a class with `__init__(*, params)`,
    `fit(model, data, session, *, options)`, `load(model, tensors)` and the same call; see
    `faithmap.fitting`.

    Args:
        version: raise it when the maps change; stored rows of other versions are not reused.
        source: paper and equation that the method comes from.
        name: registry name; by default the function's (or class's) name with hyphens.
        families: families of models ("cnn", "vit") it is defined for; empty means all.
        defined_for: called with the model, and with the parameters if it takes two arguments, before
            anything is computed; returns the reason why the method is not defined for it, or None.
        class_specific: False where the map does not depend on the class explained.
        forwards: images passed through the model per explained image, beyond none; a number or a
            function of (model, params).
        backwards: likewise for backward passes.
        exact_cost: False where the two counts are upper bounds rather than what each call takes.
        iterative: True where the map is found by steps that let rounding grow (an optimisation, a
            fit): the kit then takes maps for equal by their rank correlation too.
        check_params: small settings with which the conformance kit runs the plugin.
        fit_params: of an explainer that is fitted first, the parameters that the fit depends on; by
            default all.
        check_fit: small options of its `fit` with which the kit fits it.
        per_image: the plugin draws from torch's or numpy's global random state; it is then called
            one image at a time under a seeded, forked state.
        role: "method" is ranked; "control" and "null" are shown apart.
        needs: what an image must come with: "mask", "box", "region" (either) or "label".
    """
    facts = {
        "version": version, "source": source, "families": frozenset(families), "defined_for": defined_for,
        "class_specific": class_specific, "forwards": forwards, "backwards": backwards,
        "exact_cost": exact_cost, "iterative": iterative, "check_params": dict(check_params or {}),
        "fit_params": None if fit_params is None else frozenset(fit_params),
        "check_fit": dict(check_fit or {}), "per_image": per_image, "role": role, "needs": frozenset(needs),
    }  # fmt: skip
    return _decorator("explainer", name, facts)


@_with_facts
def metric(
    *,
    version: int,
    source: str,
    scores: Mapping[str, Direction],
    name: str | None = None,
    needs: Iterable[str] = (),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    fallback: Mapping[str, str] | None = None,
    map_free: Iterable[str] = (),
    calibrate: bool = False,
    sample: int | None = None,
    default: bool = True,
    check_params: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Register a metric: `f(model, batch, maps, *, params) -> {score: values (B,)}`.

    Args:
        version: raise it when the formula changes; only rows of this version are then shown.
        source: paper and section of the definition.
        scores: each score's name and direction ("higher", "lower" or "none").
        name: registry name; by default the function's name with hyphens.
        needs: what an image must come with: "mask", "box", "region" (either), "label"; or what the
            core hands over: "explainer" (the metric calls the explainer itself), "pool" (the dataset's
            other images).
        bounds: the least and the largest value that a score can take at the default parameters.
        fallback: score -> the score of the same image that stands in for an empty or failed map, or
            "" where nothing may, because knowing nothing would score best; all others take the mean of
            the reference null's draws.
        map_free: scores that describe the image alone, stored whatever became of the map.
        calibrate: score each method's swapped and rolled maps too.
        sample: scored on this many images of a run instead of on all.
        default: False for a metric that is scored only where it is named, because it would multiply
            the time of a run or belongs to few readers' questions.
        check_params: small settings with which the conformance kit runs the plugin.
    """
    facts = {
        "version": version, "source": source, "scores": dict(scores), "needs": frozenset(needs),
        "bounds": dict(bounds or {}), "fallback": dict(fallback or {}), "map_free": frozenset(map_free),
        "calibrate": calibrate, "sample": sample, "default": default,
        "check_params": dict(check_params or {}),
    }  # fmt: skip
    return _decorator("metric", name, facts)


@_with_facts
def dataset(
    *,
    version: int,
    source: str,
    license: str,
    revision: str = "",
    citation: str = "",
    gives: Iterable[str] = ("label",),
    name: str | None = None,
    check_params: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Register a dataset: `f(*, params) -> iterable of Sample`.

    Args:
        version: raise it when images, labels or masks change.
        source: who made it; a paper where there is one.
        license: the terms under which the images may be used.
        revision: the pinned revision of the data, or of what renders them.
        citation: how to cite it.
        gives: what its samples come with: "label", "box", "mask".
        name: registry name; by default the function's name with hyphens.
        check_params: settings with which the conformance kit lists it, small and at hand.
    """
    facts = {
        "version": version, "source": source, "license": license, "revision": revision,
        "citation": citation, "gives": frozenset(gives), "check_params": dict(check_params or {}),
    }  # fmt: skip
    return _decorator("dataset", name, facts)


def get(kind: Kind, name: str) -> Plugin:
    """Find a plugin by its registry name.

    Raises:
        RequestError: no plugin has that name; the nearest names are suggested, and a plugin file
            that could not be imported is named with its error.
    """
    _discover(kind)
    plugin = _plugins.get((kind, name))
    if plugin is not None:
        return plugin
    broken = _broken[kind].get(_hyphened(name))
    if broken:
        raise RequestError(f"{kind} '{name}' could not be loaded: {broken}")
    raise RequestError(f"unknown {kind} '{name}'; {nearest(name, (p.name for p in plugins(kind)))}")


def plugins(kind: Kind) -> list[Plugin]:
    """All plugins of a kind, by name."""
    _discover(kind)
    return [plugin for (k, _), plugin in sorted(_plugins.items()) if k == kind]


def default_metrics() -> list[Plugin]:
    """The metrics of a request that names none, by name."""
    return [plugin for plugin in plugins("metric") if plugin.facts.default]


def broken(kind: Kind) -> dict[str, str]:
    """Plugin files and entry points that failed to load, with the reason."""
    _discover(kind)
    return dict(_broken[kind])


def load_file(path: str | Path) -> list[Plugin]:
    """Load the plugins of one file (`--plugin FILE`) and return them.

    Raises:
        RequestError: the file is missing, fails to import, or registers nothing.
    """
    file = Path(path).expanduser().resolve()
    for kind in KINDS:  # before the file: it is the later one of two of a name that is refused
        _discover(kind)
    before = dict(_plugins)
    import_file(file, origin=str(file))
    found = [
        plugin for key, plugin in _plugins.items() if plugin.file == file or before.get(key) is not plugin
    ]
    if not found:
        raise RequestError(
            f"{path} registers no plugin; decorate a function with @faithmap.explainer, @faithmap.metric "
            "or @faithmap.dataset"
        )
    return found


def import_file(file: Path, origin: str = "") -> ModuleType:
    """Import a Python file by path, once; its plugins are registered under `origin`."""
    if not file.is_file():
        raise RequestError(f"no such file: {file}; give the path of a Python file")
    name = f"faithmap_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RequestError(f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    global _origin
    previous, _origin = _origin, origin or _origin
    try:
        spec.loader.exec_module(module)
    except FaithmapError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RequestError(f"{file} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        _origin = previous
    return module


def room_files(kind: Kind) -> list[Path]:
    """The plugin files in the room of a kind, sorted."""
    folders = [Path(entry) / f"{kind}s" for entry in faithmap.__path__]
    return sorted(file for folder in folders for file in folder.glob("*.py") if not file.name.startswith("_"))


def _discover(kind: Kind) -> None:
    if kind not in _discovered:
        _discovered.add(kind)
        _load_rooms(kind)
        _load_entry_points(kind)
    if kind in _clashes:
        raise PluginError(_clashes[kind])


def _load_rooms(kind: Kind) -> None:
    for file in room_files(kind):
        try:
            importlib.import_module(f"faithmap.{kind}s.{file.stem}")
        except PluginError as error:  # what a script has registered before has the name of a built-in one
            _clashes[kind] = str(error)
        except Exception as error:
            _broken[kind][_hyphened(file.stem)] = f"{type(error).__name__}: {error}"


def _load_entry_points(kind: Kind) -> None:
    global _origin
    for entry in entry_points(group=f"faithmap.{kind}s"):
        previous, _origin = _origin, entry.dist.name if entry.dist else entry.name
        try:
            if not _registers(kind, entry.load()):
                raise PluginError(f"it is no {kind}; decorate it with @faithmap.{kind}(...)")
        except (Exception, SystemExit) as error:
            told = f"entry point {entry.value}: {type(error).__name__}: {error}"
            _broken[kind][_hyphened(entry.name)] = told
        finally:
            _origin = previous


def _registers(kind: Kind, loaded: Any) -> bool:
    """Whether what an entry point names is a plugin, or a module that holds one or imports it."""
    targets = [plugin.target for (known, _), plugin in _plugins.items() if known == kind]
    if isinstance(loaded, ModuleType):
        held = {id(value) for value in vars(loaded).values()}
        return any(
            id(target) in held or target.__module__.startswith(f"{loaded.__name__}.") for target in targets
        )
    return any(target is loaded for target in targets)
