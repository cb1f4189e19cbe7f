"""Parameters of plugins: which a function takes, and whether values are of the kind of their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faithmap.errors import RequestError


def checked_grid(name: str, value: Any) -> Any:
    """A grid that maps may be reduced to."""
    if value == "model" or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
        return value
    raise RequestError(
        f"explainer '{name}', map_grid: got {value!r}; expected \"model\" or a side of at least 2 cells"
    )


def keyword_only(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function or class with their defaults, in order."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def with_defaults(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values over defaults; a whole number given for a float becomes one, so that 4 and 4.0 are one value."""
    values = {
        key: float(value) if type(value) is int and type(known.get(key)) is float else value
        for key, value in given.items()
    }
    return {**known, **values}


def check_type(where: str, value: Any, default: Any) -> None:
    """Refuse a value that the default's type excludes; a default of None admits anything.

    Raises:
        RequestError: the value is of another type.
    """
    if default is None or default is inspect.Parameter.empty or value is None:
        return
    kinds: dict[type, tuple[type, ...]] = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str, Path),
        tuple: (tuple, list),
        list: (tuple, list),
    }
    allowed = kinds.get(type(default))
    fits = allowed is None or isinstance(value, allowed)
    if fits and isinstance(value, bool) and type(default) in (int, float):
        fits = False
    if not fits:
        raise RequestError(f"{where}: got {value!r}, expected {type(default).__name__} such as {default!r}")
