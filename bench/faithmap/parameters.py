"""Parameters of plugins: which a function takes, and whether values are of the kind of their defaults."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faithmap.errors import RequestError

#: Of which types a value may be, by the type of the default or of the annotation.
KINDS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str, Path),
    Path: (str, Path),
    tuple: (tuple, list),
    list: (tuple, list),
    Sequence: (tuple, list),
    Mapping: (Mapping,),
    dict: (Mapping,),
}


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


def annotated_types(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """The types that annotations name, for keyword-only parameters whose default tells none.

    These are the parameters without a default, or with None. Left out are those without an annotation, and
    those whose annotation cannot be read here or names more than `KINDS` holds: they admit anything.
    """
    own = getattr(function, "__init__", function) if inspect.isclass(function) else function
    scope = getattr(inspect.unwrap(own), "__globals__", {})
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        open_kind = parameter.default is None or parameter.default is inspect.Parameter.empty
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or not open_kind:
            continue
        named = _named_types(_annotation(parameter.annotation, scope))
        if named and all(kind in KINDS for kind in named):
            found[name] = named
    return found


def _annotation(annotation: Any, scope: dict[str, Any]) -> Any:
    """An annotation, which may be text, as what it stands for; `Any` where that is not known here."""
    if annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, scope)["it"]
    except Exception:  # names that only type checkers import, or whatever a stranger has written there
        return Any


def _named_types(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation consists of, without None and without what they hold."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_named_types(part) for part in typing.get_args(annotation)]
        return tuple(dict.fromkeys(kind for part in parts for kind in part))
    if origin is typing.Literal:
        return tuple(dict.fromkeys(type(value) for value in typing.get_args(annotation) if value is not None))
    if annotation is types.NoneType:
        return ()
    return (origin or annotation,)


def check_type(where: str, value: Any, default: Any, annotated: Iterable[type] = ()) -> None:
    """Refuse a value that the default's type excludes, or, where that is None, the annotation's.

    Args:
        where: what the value was given for.
        value: the value; None is admitted, as left out.
        default: the parameter's default; None, or `inspect.Parameter.empty`, tells no type.
        annotated: the types that the annotation names, from `annotated_types`; none admit anything.

    Raises:
        RequestError: the value is of another type.
    """
    silent = default is None or default is inspect.Parameter.empty
    kinds = tuple(annotated) if silent else (type(default),)
    if value is None or not kinds or any(kind not in KINDS for kind in kinds):
        return
    allowed = tuple(kind for named in kinds for kind in KINDS[named])
    if isinstance(value, allowed) and (not isinstance(value, bool) or bool in kinds):
        return
    expected = " or ".join(kind.__name__ for kind in kinds)
    example = "" if silent else f" such as {default!r}"
    text = str in kinds and isinstance(value, bool | int | float)
    quotes = f'; in quotes, "{value}", it is one' if text else ""
    raise RequestError(f"{where}: got {value!r}, expected {expected}{example}{quotes}")


def refuse_nan(where: str, value: Any, default: Any) -> None:
    """Refuse NaN where it is not the default: every comparison with it is false, so that no check holds it.

    Raises:
        RequestError: the value is NaN.
    """
    if _is_nan(value) and not _is_nan(default):
        raise RequestError(f"{where}: got nan, which is no number; give one, or leave the parameter out")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
