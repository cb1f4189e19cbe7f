"""One explainer tried on one model: the calls that the checks of explainers look at."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from faithmap import stats
from faithmap._checks import (
    CORRELATION,
    ROUNDING,
    ROUNDING_LIMIT,
    TOLERANCE,
    CheckError,
    CheckSkipped,
    ModelSource,
    Seen,
    build,
    fail,
    isolated,
    make_batch,
    watch,
)
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.explaining import EVERYTHING, bind, undefined, why_undefined
from faithmap.fitting import Fit, wants_fit
from faithmap.models import Model, Transform
from faithmap.plugin import Plugin
from faithmap.records import Sample
from faithmap.training import TrainingData, fit_in_memory

IMAGES = 3


class Trial:
    """One explainer on one model of the kit. Each kind of call is made once, when a check asks for it.

    Every call gets a fresh copy of the model, so that what a plugin spoils in one call does not
    show in the next.
    """

    def __init__(
        self, plugin: Plugin, params: Mapping[str, Any], model: str, source: ModelSource | None
    ) -> None:
        self.plugin = plugin
        self.params = params
        self.model = model
        self._source = source
        #: The trials on models, of the trial that is asked about the plugin alone.
        self.others: list[Trial] = []

    @cached_property
    def original(self) -> Model:
        """The model that copies are made of."""
        assert self._source is not None
        model = build(self._source)
        _ = model.anatomy if has_features(model) else None  # found once, not once a copy
        return model

    def fresh(self) -> Model:
        """A copy of the model; its first parameter is frozen, its last holds a gradient."""
        model = copy.deepcopy(self.original).requires_grad_(True)
        parameters = list(model.parameters())
        if parameters:
            parameters[0].requires_grad_(False)
            parameters[-1].grad = torch.ones_like(parameters[-1])
        return model

    @cached_property
    def reason(self) -> str:
        """Why the explainer cannot be tried on the model; empty where it can."""
        try:
            return why_undefined(self.plugin, self.original, EVERYTHING, self.params)
        except Exception as error:
            raise CheckError(
                f"defined_for raises {type(error).__name__}: {error}; expected a reason or None. It is asked "
                "about every model, so it must not count on what some models lack."
            ) from error

    @cached_property
    def fit(self) -> Fit | None:
        """What an explainer that must be fitted has learnt from the trial's images; None for others."""
        plugin, params = self.plugin, dict(self.params)
        if not wants_fit(plugin, params):
            return None
        model = copy.deepcopy(self.original).requires_grad_(True)
        data = TrainingData(samples_of(make_batch(model, 2 * IMAGES)), model, seed=0)
        with isolated(), torch.enable_grad():
            return fit_in_memory(plugin, params, model, data, **plugin.facts.check_fit)

    def require_defined(self) -> None:
        """Skip a check where the explainer is not defined."""
        if self.reason:
            raise CheckSkipped(self.reason)

    def call(self, model: Model, batch: Batch, *, gradients: bool = True) -> Seen:
        """One watched call on a batch of which nothing has been computed yet."""
        self.require_defined()

        types: list[torch.dtype] = []  # before the core converts them

        def note(returned: Any) -> Any:
            types.extend([returned.dtype] if isinstance(returned, Tensor) else [])
            return returned

        call = bind(_noting(self.plugin, note), dict(self.params), fit=self.fit)
        seen = watch(lambda: call(model, batch), model, batch, gradients=gradients)
        return replace(seen, dtype=types[0] if types else None)

    def batch(self, model: Model, positions: Sequence[int] = range(IMAGES), shift: int = 0) -> Batch:
        """The trial's images for a copy of its model; a shift explains other classes."""
        whole = make_batch(model, IMAGES)
        targets = (whole.targets + shift) % whole.logits.shape[1]
        return replace(whole, targets=targets).select(list(positions))

    def try_images(self, positions: Sequence[int] = range(IMAGES), shift: int = 0) -> Seen:
        """Explain some of the images on a fresh copy of the model."""
        model = self.fresh()
        return self.call(model, self.batch(model, positions, shift))

    @cached_property
    def base(self) -> Seen:
        """All images, explained for their predictions: what the other calls are compared with."""
        return self.try_images()

    @cached_property
    def again(self) -> Seen:
        """The same once more."""
        return self.try_images()

    @cached_property
    def alone(self) -> list[Seen]:
        """Each image in a batch of its own."""
        return [self.try_images([i]) for i in range(IMAGES)]

    @cached_property
    def frozen(self) -> Seen:
        """Frozen parameters and gradients switched off."""
        model = self.fresh().requires_grad_(False)
        return self.call(model, self.batch(model), gradients=False)

    @cached_property
    def bf16(self) -> Seen:
        """The model computes in bfloat16."""
        model = self.fresh()
        batch = self.batch(model)
        model.precision = "bf16"
        return self.call(model, batch)

    def maps(self, seen: Seen | None = None, when: str = "") -> Tensor:
        """The maps of a call.

        Raises:
            CheckSkipped: the explainer does not even run; `check_maps` says so.
            CheckError: it runs, but not in the way of this call.
        """
        self.require_defined()
        if self.base.error is not None:
            raise CheckSkipped("not tried: the explainer raises, see check_maps")
        seen = seen or self.base
        if seen.error is not None:
            raise fail(f"{when}, the explainer raises {seen.said}", "maps as always", "See the error.")
        maps: Tensor = seen.result
        return maps

    def sound_maps(self) -> Tensor:
        """The base's maps, for checks that look at their values.

        Raises:
            CheckSkipped: they are constant, or not finite; `check_maps` says so.
        """
        maps = self.maps()
        if not bool(torch.isfinite(maps).all()) or spread(maps) == 0:
            raise CheckSkipped("not tried: there are no usable maps, see check_maps")
        return maps

    def steady_maps(self) -> Tensor:
        """The base's maps, for checks that compare them with those of other calls.

        Raises:
            CheckSkipped: they differ from call to call; `check_same_seed` says so.
        """
        maps = self.sound_maps()
        again = self.maps(self.again, "at a second call")
        gap = float((maps - again).abs().nan_to_num().max()) if maps.shape == again.shape else torch.inf
        if not same_bits(maps, again) and gap > ROUNDING * spread(maps):
            raise CheckSkipped("not tried: maps differ from call to call, see check_same_seed")
        return maps


def _noting(plugin: Plugin, note: Callable[[Any], Any]) -> Plugin:
    """The plugin, with whatever it returns shown to a function first."""
    target: Any = plugin.target
    if inspect.isclass(target):
        called = target.__call__

        def __call__(self: Any, *args: Any) -> Any:  # noqa: N807
            return note(called(self, *args))

        return replace(plugin, target=type(target.__name__, (target,), {"__call__": __call__}))

    @functools.wraps(target)
    def noting(*args: Any, **kwargs: Any) -> Any:
        return note(target(*args, **kwargs))

    return replace(plugin, target=noting)


def samples_of(batch: Batch) -> list[Sample]:
    """The images of a batch as a dataset gives them."""
    labels = batch.predicted.tolist()
    return [
        Sample(id=name, image=image.cpu(), label=label)
        for name, image, label in zip(batch.ids, batch.images, labels, strict=True)
    ]


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    return one.shape == two.shape and bool(torch.equal(one.nan_to_num(), two.nan_to_num()))


def has_features(model: Model) -> bool:
    """Whether the network has spatial features that can be found."""
    try:
        return bool(model.target_layer)
    except RequestError:
        return False


def spread(maps: Tensor) -> float:
    """The range of some maps."""
    return float(maps.nan_to_num().max() - maps.nan_to_num().min())


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's correlation of two maps; 1 where both are constant, 0 where one is."""
    found = stats.rank_correlation(one.double().cpu(), two.double().cpu())
    return float(all(each.max() == each.min() for each in (one, two))) if math.isnan(found) else found


def disagreement(trial: Trial, one: Tensor, two: Tensor, tolerance: float = TOLERANCE) -> str:
    """How far two maps of an image, which should be equal, are apart; empty where they are equal enough.

    Maps of iterative methods may differ more than by the tolerance as long as they order the pixels alike.
    Within it they need not: noise of a millionth shuffles the ranks of a plateau.
    """
    if one.shape != two.shape:
        return f"shapes {tuple(one.shape)} and {tuple(two.shape)}"
    gap = float((one.nan_to_num() - two.nan_to_num()).abs().max()) / (spread(two) or 1.0)
    if gap <= tolerance:
        return ""
    if trial.plugin.facts.iterative:
        found = rank_correlation(one, two)
        return "" if found >= CORRELATION else f"a rank correlation of {found:.4f}"
    return f"a difference of {100 * gap:.3g}% of the map's range"


def equal_enough(trial: Trial, tolerance: float = TOLERANCE) -> str:
    """What a check of equal maps asks for, in words."""
    if trial.plugin.facts.iterative:
        return (
            f"a rank correlation of at least {CORRELATION} (iterative=True), or at most {100 * tolerance:g}%"
        )
    return f"at most {100 * tolerance:g}%"


def may_be_rounding(one: Tensor, two: Tensor) -> bool:
    """Whether two maps are so close that single precision may be what parts them."""
    return float((one - two).abs().nan_to_num(torch.inf).max()) <= ROUNDING_LIMIT * spread(two)


def agree_in_double(trial: Trial, *, frozen: bool = False) -> bool:
    """Whether maps that differ do so by rounding alone: on the model in double precision they agree.

    Args:
        trial: the trial.
        frozen: compare frozen parameters and switched-off gradients, else each image alone, with
            the images together.
    """
    model = trial.fresh().double()
    whole = trial.call(model, trial.batch(model))
    if frozen:
        other = trial.fresh().double().requires_grad_(False)
        calls = [(trial.call(other, trial.batch(other), gradients=False), list(range(IMAGES)))]
    else:
        calls = [(trial.call(model, trial.batch(model, [i])), [i]) for i in range(IMAGES)]
    if whole.error is not None or any(seen.error is not None for seen, _ in calls):
        return False
    pairs = [(seen.result[k], whole.result[i]) for seen, at in calls for k, i in enumerate(at)]
    return all(not disagreement(trial, one, two) for one, two in pairs)


def tall(trial: Trial) -> Model:
    """The model for images a quarter higher than wide.

    Raises:
        CheckSkipped: it takes no such images.
    """
    model = trial.fresh()
    height, width = model.input_size
    # Whole steps of the feature grid, where there is one, so that tokens fill the image.
    step = height // model.grid[0] if has_features(model) else 1
    size = (height, max(step, round(0.625 * width / step) * step))
    try:
        resize = getattr(model.module, "set_input_size", None)
        if callable(resize):  # timm's transformers take their own size alone
            resize(img_size=size)
        model.transform = Transform(size, model.transform.crop_pct, model.transform.interpolation)
        model._anatomy = None
        with torch.no_grad():
            model(torch.zeros(1, 3, *size, device=model.device))
        _ = model.grid if has_features(model) else None
    except Exception as error:
        raise CheckSkipped(f"the model takes no images of {size[0]} x {size[1]} pixels") from error
    reason = undefined(trial.plugin, model, EVERYTHING, trial.params)
    if reason:
        raise CheckSkipped(reason)
    return model
