"""An explainer that must be fitted, registered for a test, and requests to fit it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import plugins_restored
from rich.console import Console
from small_runs import printing_to

from faithmap import cli, registry, training
from faithmap.data import choose, load_dataset
from faithmap.models import Model
from faithmap.records import Spec

TOY = Path(__file__).parent / "plugins" / "toy_fitted.py"
#: What the file registers; it is imported once.
_ENTRIES: dict[Any, registry.Plugin] = {}


@contextmanager
def toy_registered() -> Iterator[None]:
    """The toy, and what a test registers besides, are known within the block."""
    with plugins_restored():
        if not _ENTRIES:
            before = set(registry._plugins)
            registry.load_file(TOY)
            _ENTRIES.update({key: found for key, found in registry._plugins.items() if key not in before})
        registry._plugins.update(_ENTRIES)
        yield


def toy() -> registry.Plugin:
    return registry.get("explainer", "toy-fitted")


def asked(model: Model, n: int = 12, **changes: Any) -> training.Training:
    """A request to fit the toy to some shapes."""
    params = toy().check(changes.pop("params", {}))
    options = training.fit_options(toy(), changes.pop("options", {}))
    dataset = load_dataset(Spec("shapes", {"split": "train", "n": n}))
    samples = choose(dataset.samples, "all", None)
    return training.Training(toy(), params, model, dataset, samples, options, **changes)


def typed(*words: object) -> tuple[int, str]:
    """Type a command: its exit code and all that it printed."""
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    more = ["--threads", "1"] if words[0] == "train" and "--threads" not in words else []
    with printing_to(console, console):
        return cli.main([*(str(word) for word in words), *more]), stream.getvalue()


class KilledError(BaseException):
    """Stands in for a kill."""


class KillAt(training.Silent):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, values: Any) -> None:
        if step == self.at:
            raise KilledError
