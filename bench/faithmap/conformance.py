"""The conformance kit: what every plugin promises, as checks that say what to mend.

```python
from faithmap import conformance

for result in conformance.check_explainer("my-method"):
    print(result.check, result.model, result.status, result.message)
```

In a test suite of one's own, with an id for each plugin, model and check:

```python
@conformance.parametrized("explainer", ["my-method"])
def test_my_method(case: conformance.Case) -> None:
    case.run()
```

Explainers are tried on a CNN and on a vision transformer, both embedded, where they are defined;
metrics on images whose right answer is planted; datasets on a few of their samples. Every plugin
runs at its declared `check_params`. Nothing here needs pytest, but for `parametrized`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from faithmap import _checks_dataset, _checks_explainer, _checks_metric, registry
from faithmap._checks import DEFAULT_MODELS, CheckError, CheckSkipped, ModelSource, isolated, named_sources
from faithmap._trial import Trial
from faithmap.errors import RequestError, nearest
from faithmap.explaining import describe, reconstructs
from faithmap.plugin import Plugin
from faithmap.records import Kind

if TYPE_CHECKING:
    import pytest

__all__ = [
    "Case",
    "CheckError",
    "CheckSkipped",
    "Result",
    "Status",
    "cases",
    "check_dataset",
    "check_explainer",
    "check_metric",
    "check_names",
    "failures",
    "parametrized",
]

Status = Literal["passed", "failed", "skipped", "expected failure", "unexpectedly passed"]
#: A plugin, its registry name (parameters in brackets), or the decorated function.
Target = str | Plugin | Callable[..., Any]
Models = Sequence[ModelSource] | Mapping[str, ModelSource]


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found of one plugin, on one model where it needs one."""

    kind: Kind
    plugin: str
    check: str
    #: Name of the model, empty where the check needs none.
    model: str
    status: Status
    #: What was seen, what was expected, what to do; or why it was skipped; or a note.
    message: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the plugin keeps the promise, as far as is expected of it."""
        return self.status not in ("failed", "unexpectedly passed")


@dataclass(frozen=True)
class Case:
    """One check of one plugin on one model, not made yet."""

    plugin: Plugin
    check: Callable[[Any], str | None]
    model: str
    #: Shared by the checks of a plugin on a model, which look at the same calls.
    trial: Any = field(repr=False)
    #: Why the check is expected to fail; empty where it is not.
    expected: str = ""

    @property
    def name(self) -> str:
        """The name of the check."""
        return self.check.__name__

    @property
    def id(self) -> str:
        """Plugin, model and check: a test id."""
        return "-".join(part for part in (self.plugin.name, self.model, self.name) if part)

    def run(self) -> str:
        """Make the check; returns a note, mostly empty.

        Raises:
            CheckError: the plugin breaks the promise, whether that is expected or not.
            CheckSkipped: the check does not apply; test runners take it for a skipped test.
        """
        try:
            with isolated():
                return self.check(self.trial) or ""
        except (CheckError, CheckSkipped):
            raise
        except RequestError as error:
            raise CheckError(str(error)) from error
        except Exception as error:
            raise CheckError(
                f"the check could not be made: {describe(error)}; expected facts and functions of the plugin "
                "that answer for every model. See the traceback (faithmap.conformance.cases, Case.run)."
            ) from error

    def result(self) -> Result:
        """Make the check and say how it went, expectations included."""
        started = time.perf_counter()
        status: Status
        try:
            message = self.run()
            status = "passed"
            if self.expected:
                status = "unexpectedly passed"
                message = f"passes, but is expected to fail ({self.expected}): drop the expectation"
        except CheckSkipped as skipped:
            status, message = "skipped", str(skipped)
        except CheckError as error:
            status, message = "failed", str(error)
            if self.expected:
                status, message = "expected failure", f"{self.expected} ({message})"
        seconds = time.perf_counter() - started
        return Result(
            self.plugin.facts.kind, self.plugin.name, self.name, self.model, status, message, seconds
        )


def check_explainer(
    explainer: Target,
    models: Models | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    slow: bool = True,
) -> tuple[Result, ...]:
    """Check an explainer on every model.

    Args:
        explainer: its registry name, or the decorated function.
        models: names, `Model`s or functions that make one, also as a dictionary by name; by default
            the embedded `shapes/resnet` and `shapes/vit`. Copies are used, never the models.
        expected_failures: `{check: reason}`; a key `"check[model]"` holds for one model. Strict: an
            expected failure that passes is reported as "unexpectedly passed", which is not ok.
        params: parameters over the declared `check_params`.
        only: names of checks; by default all.
        slow: make the slow checks too (memory).

    Returns:
        A result for each check and model, in a fixed order.

    Raises:
        RequestError: a name is unknown.
    """
    return _results(
        cases("explainer", explainer, models, expected_failures, params=params, only=only, slow=slow)
    )


def check_metric(
    metric: Target,
    expected_failures: Mapping[str, str] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
) -> tuple[Result, ...]:
    """Check a metric on images whose right answer is planted; arguments as for `check_explainer`."""
    return _results(cases("metric", metric, None, expected_failures, params=params, only=only))


def check_dataset(
    dataset: Target,
    expected_failures: Mapping[str, str] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
) -> tuple[Result, ...]:
    """Check a dataset on a few of its samples; arguments as for `check_explainer`."""
    return _results(cases("dataset", dataset, None, expected_failures, params=params, only=only))


def _results(made: Iterable[Case]) -> tuple[Result, ...]:
    return tuple(case.result() for case in made)


def failures(results: Iterable[Result]) -> list[Result]:
    """The results that are not ok."""
    return [result for result in results if not result.ok]


def check_names(kind: Kind) -> list[str]:
    """The names of all checks of a kind."""
    return [check.__name__ for check in _checks(kind)]


def _checks(kind: Kind) -> list[Callable[[Any], str | None]]:
    if kind == "explainer":
        return [
            *_checks_explainer.PLUGIN_CHECKS, *_checks_explainer.ZOO_CHECKS, *_checks_explainer.FIT_CHECKS,
            *_checks_explainer.RECONSTRUCTION_CHECKS, *_checks_explainer.MODEL_CHECKS,
        ]  # fmt: skip
    return [*(_checks_metric.CHECKS if kind == "metric" else _checks_dataset.CHECKS)]


def cases(
    kind: Kind,
    target: Target,
    models: Models | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    slow: bool = True,
) -> list[Case]:
    """The checks of one plugin, to be made one by one; arguments as for `check_explainer`.

    No model is loaded before a check asks for it.
    """
    if kind not in get_args(Kind):
        raise RequestError(f"unknown kind '{kind}'; {nearest(kind, get_args(Kind))}")
    plugin, given = _resolve(kind, target)
    checked = {**plugin.facts.check_params, **given, **(params or {})}
    if params or given:
        plugin.check(checked)
    names = check_names(kind)
    for name in only or ():
        if name not in names:
            raise RequestError(f"no check of {kind}s is named '{name}'; {nearest(name, names)}")
    wanted = set(names if only is None else only)
    if not slow:
        wanted -= {check.__name__ for check in _checks_explainer.SLOW_CHECKS}
    made = []
    for model, trial, checks in _trials(plugin, _with_defaults(plugin, checked), models):
        for check in checks:
            if check.__name__ in wanted:
                made.append(Case(plugin, check, model, trial))
    return _with_expectations(made, names, dict(expected_failures or {}))


def _with_defaults(plugin: Plugin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults below what is given; unlike `Plugin.check` without complaints, which `check_facts` makes."""
    known = plugin.parameters
    return {**known, **{name: value for name, value in given.items() if name in known}}


def _trials(
    plugin: Plugin, params: Mapping[str, Any], models: Models | None
) -> list[tuple[str, Any, Sequence[Callable[[Any], str | None]]]]:
    """(Model's name, trial, checks) of a plugin."""
    kind = plugin.facts.kind
    if kind == "metric":
        return [("", _checks_metric.MetricTrial(plugin, params), _checks_metric.CHECKS)]
    if kind == "dataset":
        return [("", _checks_dataset.DatasetTrial(plugin, params), _checks_dataset.CHECKS)]
    sources = named_sources(models)
    whole = Trial(plugin, params, "", None)
    # Models that are named need not be all that a method is defined for.
    whole_checks = [*_checks_explainer.PLUGIN_CHECKS]
    if sources.keys() >= set(DEFAULT_MODELS):
        whole_checks += _checks_explainer.ZOO_CHECKS
    trials: list[tuple[str, Any, Sequence[Callable[[Any], str | None]]]] = [("", whole, whole_checks)]
    checks = _checks_explainer.MODEL_CHECKS
    if reconstructs(plugin):
        checks = _checks_explainer.RECONSTRUCTION_CHECKS + checks
    if plugin.fits:
        checks = _checks_explainer.FIT_CHECKS + checks
    for name, source in sources.items():
        trial = Trial(plugin, params, name, source)
        whole.others.append(trial)
        trials.append((name, trial, checks))
    return trials


def _resolve(kind: Kind, target: Target) -> tuple[Plugin, dict[str, Any]]:
    """The plugin meant, and the parameters that its name came with."""
    from faithmap.config import parse_spec

    if isinstance(target, str):
        spec = parse_spec(target)
        return registry.get(kind, spec.name), dict(spec.params)
    if isinstance(target, Plugin):
        if target.facts.kind != kind:
            raise RequestError(
                f"'{target.name}' is a {target.facts.kind}; expected a {kind}: use check_{kind}"
            )
        return target, {}
    for plugin in registry.plugins(kind):
        if plugin.target is target:
            return plugin, {}
    name = getattr(target, "__name__", repr(target))
    raise RequestError(f"{name} is no registered {kind}; decorate it with @faithmap.{kind}(...)")


def _with_expectations(made: list[Case], names: list[str], expected: dict[str, str]) -> list[Case]:
    """Attach the expected failures to their cases.

    Raises:
        RequestError: an expectation names no check, or gives no reason.
    """
    known = {*names, *(f"{case.name}[{case.model}]" for case in made if case.model)}
    for key, reason in expected.items():
        if key not in known:
            raise RequestError(f"expected_failures names '{key}', which is no check; {nearest(key, known)}")
        if not str(reason).strip():
            raise RequestError(f"expected_failures gives no reason for '{key}'; say why it fails")
    attached = []
    for case in made:
        reason = expected.get(f"{case.name}[{case.model}]") or expected.get(case.name) or ""
        attached.append(Case(case.plugin, case.check, case.model, case.trial, reason))
    return attached


def parametrized(
    kind: Kind,
    plugins: Iterable[Target] | None = None,
    *,
    models: Models | None = None,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    only: Iterable[str] | None = None,
    slow: bool = True,
    argument: str = "case",
) -> pytest.MarkDecorator:
    """A pytest mark that runs a test once for each plugin, model and check.

    Args:
        kind: "explainer", "metric" or "dataset".
        plugins: which; by default all that are registered.
        models: as for `check_explainer`.
        expected_failures: `{plugin: {check: reason}}`; such a test is a strict xfail.
        only: names of checks; by default all.
        slow: make the slow checks too (memory).
        argument: name of the test's argument, which is a `Case`.

    Raises:
        RequestError: pytest is not installed, or a name is unknown.
    """
    try:
        import pytest
    except ImportError as error:
        raise RequestError(
            "conformance.parametrized needs pytest: pip install pytest; without it use check_explainer"
        ) from error
    chosen = registry.plugins(kind) if plugins is None else list(plugins)
    resolved = [_resolve(kind, target) for target in chosen]
    expected = dict(expected_failures or {})
    for name in expected:
        if name not in {plugin.name for plugin, _ in resolved}:
            raise RequestError(
                f"expected_failures names '{name}', which is not checked; "
                f"{nearest(name, (plugin.name for plugin, _ in resolved))}"
            )
    made = [
        case
        for plugin, params in resolved
        for case in cases(
            kind, plugin, models, expected.get(plugin.name), params=params, only=only, slow=slow
        )
    ]
    wanted = [
        pytest.param(
            case,
            id=case.id,
            marks=[pytest.mark.xfail(reason=case.expected, raises=CheckError, strict=True)]
            if case.expected
            else [],
        )
        for case in made
    ]
    return pytest.mark.parametrize(argument, wanted)
