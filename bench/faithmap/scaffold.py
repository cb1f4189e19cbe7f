"""`faithmap new`: a plugin file to begin with, which passes the conformance kit as it stands."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template
from typing import get_args

from rich.console import Console

from faithmap import registry
from faithmap._score_names import taken
from faithmap.errors import RequestError, nearest
from faithmap.records import Kind

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write(kind: str, name: str, folder: Path) -> Path:
    """Write the file of a new plugin and return its path.

    Args:
        kind: "explainer", "metric" or "dataset".
        name: the registry name; the file and its function are named so with underscores.
        folder: where to.

    Raises:
        RequestError: the kind or the name will not do, or the file is there already.
    """
    checked = _kind(kind)
    stem = _stem(checked, name)
    file = folder / f"{stem}.py"
    if file.exists():
        raise RequestError(
            f"{file.name} is there already and is left as it is; choose another name, or move it"
        )
    _refuse_hiding(stem, name)
    text = _filled(checked, name, stem)
    _refuse_meeting(checked, name, stem)
    try:
        with file.open("x", encoding="utf-8") as stream:  # never over a file that has just appeared
            stream.write(text)
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error.strerror or error}; go to another folder") from error
    return file


def _kind(given: str) -> Kind:
    for kind in get_args(Kind):
        if given == kind:
            return kind  # type: ignore[no-any-return]
    raise RequestError(f"there is no '{given}' to write; {nearest(given, get_args(Kind))}")


def _stem(kind: Kind, name: str) -> str:
    """The name of the file and the function, after a look at the registry name."""
    if not NAME.fullmatch(name):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        hint = f", such as {plain}" if NAME.fullmatch(plain) else ""
        raise RequestError(
            f"'{name}' is no name for a plugin; use small letters, digits and single hyphens, "
            f"a letter first{hint}"
        )
    stem = name.replace("-", "_")
    if keyword.iskeyword(stem):
        raise RequestError(f"'{name}' is a word of Python; choose another name")
    if any(plugin.name == name for plugin in registry.plugins(kind)):
        raise RequestError(f"there is {_article(kind)} '{name}' already; choose another name")
    return stem


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _refuse_hiding(stem: str, name: str) -> None:
    """Refuse a file that would hide a module of the same name from whatever runs in its folder."""
    try:
        known = stem in sys.stdlib_module_names or importlib.util.find_spec(stem) is not None
    except (ImportError, ValueError):
        known = False
    if known:
        raise RequestError(
            f"a file {stem}.py would hide the Python module of that name; choose another, such as my-{name}"
        )


def _filled(kind: Kind, name: str, stem: str) -> str:
    template = (resources.files("faithmap") / "templates" / f"{kind}.txt").read_text(encoding="utf-8")
    return Template(template).substitute(name=name, function=stem, score=stem)


def _refuse_meeting(kind: Kind, name: str, stem: str) -> None:
    """Refuse a name that means something else within the file, or on a board."""
    words = {node.id for node in ast.walk(ast.parse(_filled(kind, name, "_"))) if isinstance(node, ast.Name)}
    if hasattr(builtins, stem) or stem in words:
        raise RequestError(
            f"'{stem}' means something else in the file; choose another name, such as my-{name}"
        )
    if kind == "metric":
        reason = taken([stem], registry.scores_beside(name))
        if reason:
            raise RequestError(
                f"the score of metric '{name}': {reason}; choose another name, such as my-{name}"
            )


def new(kind: str, name: str, console: Console) -> int:
    """Write the file into the working directory and say what to do next."""
    file = write(kind, name, Path.cwd())
    console.print(f"wrote {file.name}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"edit it, then: faithmap check {file.name}", markup=False, highlight=False, soft_wrap=True)
    flag = {"explainer": f" --explainers {name},gradcam", "dataset": f" --datasets {name}"}.get(kind, "")
    console.print(
        f"and then: faithmap run --plugin {file.name}{flag}", markup=False, highlight=False, soft_wrap=True
    )
    return 0
