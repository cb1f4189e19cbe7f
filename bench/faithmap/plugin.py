"""A plugin as it is registered: its facts, its code, and the check of its parameters."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from faithmap.errors import RequestError, nearest
from faithmap.parameters import (
    annotated_types,
    check_type,
    checked_grid,
    keyword_only,
    refuse_nan,
    with_defaults,
)
from faithmap.records import Facts

BUILT_IN = "built in"
#: The parameter that names a fit, and its value where there is only one.
FITTED, AUTO = "fitted", "auto"
#: The parameter that reduces one explainer's maps to a grid as soon as they are made: "model", or a side in
#: cells. It belongs to the core; where it is not given, an explainer has no such parameter.
REDUCED = "map_grid"


@dataclass(frozen=True)
class Plugin:
    """One registered plugin: its facts, its code, and the file that holds it."""

    facts: Facts
    target: Callable[..., Any]
    file: Path | None
    #: "built in", the name of the distribution, the path given to `--plugin`, or where else it is defined.
    origin: str

    @property
    def built_in(self) -> bool:
        """Whether the plugin comes with this package."""
        return self.origin == BUILT_IN

    @property
    def name(self) -> str:
        """The registry name."""
        return self.facts.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The keyword-only parameters with their defaults, in the order of the signature.

        An explainer that is fitted first has one more, which the core reads: `fitted` says which of
        several fits to take.
        """
        own = keyword_only(self.target)
        return {**own, FITTED: AUTO} if self.fits else own

    @property
    def fits(self) -> bool:
        """Whether it is an explainer that must be fitted before it explains: a class with a `fit`."""
        return (
            self.facts.kind == "explainer"
            and inspect.isclass(self.target)
            and callable(getattr(self.target, "fit", None))
        )

    @property
    def documentation(self) -> str:
        """The docstring, without its indentation."""
        return inspect.getdoc(self.target) or ""

    @property
    def fit_options(self) -> dict[str, Any]:
        """The options of its fit with their defaults; none where it is not fitted."""
        if not self.fits:
            return {}
        return keyword_only(self.target.fit)  # type: ignore[attr-defined]

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join(self.documentation.split("\n\n")[0].split())

    def file_sha256(self) -> str:
        """SHA-256 of the plugin's file: a change of the code changes the keys of what it computed."""
        if self.file is None or not self.file.is_file():
            return ""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters with `given` over the defaults.

        Raises:
            RequestError: a name is unknown, a value has another type than the default (or, where that is
                None, than the annotation) or is NaN, or a parameter without a default was left out.
        """
        known = self.parameters
        kind = self.facts.kind
        core = {}
        if kind == "explainer" and REDUCED in given and REDUCED not in known:
            core = {REDUCED: checked_grid(self.name, given[REDUCED])}
            given = {key: value for key, value in given.items() if key != REDUCED}
        annotated = annotated_types(self.target)
        for key, value in given.items():
            if key not in known:
                raise RequestError(
                    f"{kind} '{self.name}' has no parameter '{key}'; {nearest(key, known)}"
                    if known
                    else f"{kind} '{self.name}' takes no parameters, but '{key}' was given"
                )
            where = f"{kind} '{self.name}', parameter '{key}'"
            check_type(where, value, known[key], annotated.get(key, ()))
            refuse_nan(where, value, known[key])
        resolved = with_defaults(known, given)
        missing = [key for key, value in resolved.items() if value is inspect.Parameter.empty]
        if missing:
            raise RequestError(f"{kind} '{self.name}' needs the parameter '{missing[0]}'; give it a value")
        return resolved | core

    def make(self, params: Mapping[str, Any]) -> Callable[..., Any]:
        """Bind checked parameters: what is returned takes the positional arguments alone."""
        # What the core reads is not handed on, unless the plugin has a parameter of that name itself.
        core = (
            {FITTED, REDUCED} - keyword_only(self.target).keys() if self.facts.kind == "explainer" else set()
        )
        own = {key: value for key, value in params.items() if key not in core}
        if inspect.isclass(self.target):
            return cast("Callable[..., Any]", self.target(**own))

        def bound(*args: Any) -> Any:
            return self.target(*args, **own)

        return bound
