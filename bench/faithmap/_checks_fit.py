"""The checks of explainers that are fitted before they explain."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faithmap._checks import ROUNDING, CheckError, CheckSkipped, fail, isolated, make_batch, watch
from faithmap._trial import IMAGES, Trial, samples_of
from faithmap.errors import FaithmapError
from faithmap.fitting import wants_fit
from faithmap.models import Model
from faithmap.parameters import keyword_only
from faithmap.plugin import FITTED, Plugin
from faithmap.training import Session, Silent, TrainingData, fit_options

#: How far a fit that went on after a kill may be from one that was not disturbed.
RESUMED = 1e-6


class _StopError(Exception):
    """The kit stops a fit."""


class _Stopper(Silent):
    """A watcher that stops a fit after some steps."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.done = 0

    def begin(self, title: str, steps: int, done: int) -> None:
        """Keep how many steps were done before."""
        self.done = done

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Stop, where the time has come."""
        if step == self._at:
            raise _StopError


def check_fit_facts(plugin: Plugin) -> None:
    """What a fitted explainer declares fits its code.

    Raises:
        CheckError: a method is missing, or a name is unknown.
    """
    if not plugin.fits:
        return
    calls = any("__call__" in vars(base) for base in getattr(plugin.target, "__mro__", ()))
    if not callable(getattr(plugin.target, "load", None)) or not calls:
        raise fail(
            "the class has a fit but no load or no __call__",
            "fit(model, data, session, *, options), load(model, tensors) and __call__(model, batch)",
            "Add what is missing.",
        )
    own = keyword_only(plugin.target)
    unknown = sorted((plugin.facts.fit_params or frozenset()) - set(own))
    if unknown or FITTED in own:
        raise fail(
            f"fit_params names {unknown[0]!r}" if unknown else f"a parameter is named '{FITTED}'",
            "names of parameters" if unknown else "that name to be left to the core",
            "Mend the declaration.",
        )
    try:
        fit_options(plugin, plugin.facts.check_fit)
    except FaithmapError as error:
        raise CheckError(f"check_fit does not fit the options of fit: {error}. Mend check_fit=.") from error


def check_fit(trial: Trial) -> None:
    """A fit leaves the model as it was, and the same seed gives the same tensors."""
    model = _fitted(trial)
    batch = make_batch(model, IMAGES)
    kept: list[dict[str, Tensor]] = []
    seen = watch(lambda: kept.append(_fit(trial, model, Session())), model, batch)
    if seen.error is not None:
        raise fail(f"the fit raises {seen.said}", "tensors by name", "See the error.")
    changed = {kind: names for kind, names in seen.changes.items() if names}
    if changed:
        kind, names = next(iter(changed.items()))
        raise fail(
            f"after the fit, {kind} are changed: {', '.join(sorted(names)[:3])}",
            "the model as before",
            "Train a network of your own; leave the model frozen.",
        )
    apart = _apart(kept[0], _fit(trial, trial.fresh(), Session()))
    if apart > ROUNDING:
        raise fail(
            f"two fits with the same seed differ by {apart:.2g} of their range",
            "equal tensors",
            "Draw from generators seeded by session.seed and the step.",
        )


def check_resume(trial: Trial) -> None:
    """A fit that is stopped halfway goes on from its checkpoint to the same result."""
    whole = Session()
    undisturbed = _fit(trial, _fitted(trial), whole)
    steps = len(whole.curve)
    if steps < 2:
        raise CheckSkipped("the fit takes a single step")
    at = 1 + steps // 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fit.checkpoint"
        with suppress(_StopError):
            _fit(trial, trial.fresh(), Session(file=file, every=0.0, watcher=_Stopper(at)))
        if not file.is_file():
            raise fail(
                "no checkpoint is written",
                "session.checkpoint(make_state) after each step",
                "Offer the state after every step; the session writes it when it is time.",
            )
        watcher = _Stopper(0)
        second = Session(file=file, every=torch.inf, watcher=watcher)
        resumed = _fit(trial, trial.fresh(), second)
    if not watcher.done:
        raise fail(
            f"a fit stopped in step {at} begins at its first step again",
            "it to go on from its checkpoint",
            "Ask session.resume() for the state, and go on behind its step.",
        )
    gap = _curve_gap(whole.curve, second.curve)
    if gap > RESUMED or _apart(undisturbed, resumed) > ROUNDING:
        raise fail(
            f"a fit of {steps} steps that is stopped in step {at} ends after {len(second.curve)} reported "
            f"steps, {gap:.2g} from the undisturbed curve",
            f"the same curve to {RESUMED:g}",
            "Keep parameters, optimiser, schedule and step in the checkpoint, and go on behind that step.",
        )


def _fitted(trial: Trial) -> Model:
    """A copy of the model, where the explainer must be fitted at all."""
    trial.require_defined()
    if not wants_fit(trial.plugin, dict(trial.params)):
        raise CheckSkipped("needs no fit")
    return trial.fresh()


def _fit(trial: Trial, model: Model, session: Session) -> dict[str, Tensor]:
    data = TrainingData(samples_of(make_batch(model, 2 * IMAGES)), model, seed=0)
    options = fit_options(trial.plugin, trial.plugin.facts.check_fit)
    explainer: Any = trial.plugin.make(trial.params)
    with isolated(), torch.enable_grad():
        tensors: dict[str, Tensor] = explainer.fit(model, data, session, **options)
    return tensors


def _curve_gap(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """The largest difference of two curves, relative where values exceed one; infinite for other steps."""
    if [line["step"] for line in one] != [line["step"] for line in two]:
        return torch.inf
    return max(
        abs(found[name] - value) / max(1.0, abs(value))
        for line, found in zip(one, two, strict=True)
        for name, value in line.items()
    )


def _apart(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The largest difference of tensors of equal names, as a share of their range."""
    if {name: tuple(t.shape) for name, t in one.items()} != {name: tuple(t.shape) for name, t in two.items()}:
        return torch.inf
    gaps = [0.0]
    for name, tensor in one.items():
        first, second = tensor.detach().double().cpu(), two[name].detach().double().cpu()
        if first.numel():
            gaps.append(float((first - second).abs().max()) / max(float(first.max() - first.min()), 1e-3))
    return max(gaps)
