"""What an explainer costs in passes through the model: as it declares, and as it is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from faithmap.batch import Batch
from faithmap.explaining import EVERYTHING, bind, describe, guarded, why_undefined
from faithmap.models import Model
from faithmap.plugin import Plugin


@dataclass(frozen=True)
class Passes:
    """Images passed through a model for each image explained; None where that is not declared."""

    forwards: float | None
    backwards: float | None


@dataclass(frozen=True)
class Statement:
    """What an explainer says of itself on a model, at its default parameters."""

    #: Why it is not defined for the model, or why that cannot be told; empty where it is defined.
    reason: str
    passes: Passes


def declared(plugin: Plugin, model: Model, params: Mapping[str, Any] | None = None) -> Passes:
    """The passes that an explainer declares for a model.

    Args:
        plugin: the explainer.
        model: the model.
        params: all of the explainer's parameters; by default the defaults.
    """
    given = dict(plugin.parameters if params is None else params)

    def number(fact: Any) -> float | None:
        value = fact(model, given) if callable(fact) else fact
        return None if value is None else float(value)

    return Passes(number(plugin.facts.forwards), number(plugin.facts.backwards))


def ask(plugin: Plugin, model: Model) -> Statement:
    """Whether an explainer is defined for a model, and what it declares; whatever its functions do."""
    try:
        reason = why_undefined(plugin, model, EVERYTHING)
        passes = Passes(None, None) if reason else declared(plugin, model)
    except Exception as error:  # one plugin must not cost the list of all others
        return Statement(f"cannot be told: {describe(error)}", Passes(None, None))
    return Statement(reason, passes)


def counted(plugin: Plugin, model: Model, batch: Batch, params: Mapping[str, Any] | None = None) -> Passes:
    """The passes that an explainer makes for each image of a batch, of which nothing is computed yet.

    Args:
        plugin: the explainer.
        model: the model.
        batch: images with targets.
        params: all of the explainer's parameters; by default the defaults.
    """
    call = bind(plugin, dict(plugin.parameters if params is None else params))
    cold = batch.select(range(len(batch)))
    with guarded(model), model.counting() as meter:
        call(model, cold)
    cold.context.release()
    return Passes(meter.forwards / len(cold), meter.backwards / len(cold))
