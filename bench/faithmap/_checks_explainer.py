"""The checks of explainers. Each is a function of a `Trial` and says in its message what to mend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from faithmap._checks import (
    CALLS,
    GROWTH_MB,
    ROUNDING,
    CheckError,
    CheckSkipped,
    InterruptionError,
    check_common_facts,
    fail,
    growth,
    isolated,
    listed,
    tripwire,
)
from faithmap._checks_fit import check_fit, check_fit_facts, check_resume
from faithmap._checks_reconstruct import check_reconstruct
from faithmap._trial import (
    IMAGES,
    Trial,
    agree_in_double,
    disagreement,
    equal_enough,
    has_features,
    may_be_rounding,
    same_bits,
    spread,
    tall,
)
from faithmap.costs import declared
from faithmap.errors import PluginError, nearest
from faithmap.explaining import HANDED, bind
from faithmap.records import FAMILIES

#: Raises CheckError or CheckSkipped; may return a note.
Check = Callable[[Trial], str | None]
#: Gradients that are not recorded change no kernel: closer than batches need to be.
FROZEN_TOLERANCE = ROUNDING
SEEDING = "Draw from batch.generator(i), or declare per_image=True where a library draws from a global state."


def check_facts(trial: Trial) -> None:
    """Version, source, docstring and parameters are stated; nothing but model and batch is positional."""
    without = [name for name, value in trial.plugin.parameters.items() if value is inspect.Parameter.empty]
    if without:
        raise fail(
            f"the parameter '{without[0]}' has no default", "a default for each", "Give it the paper's value."
        )
    check_common_facts(trial.plugin)
    parameters = inspect.signature(trial.plugin.target).parameters.values()
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    target: Any = trial.plugin.target
    is_class = inspect.isclass(target)
    if len(positional) != (0 if is_class else 2):
        raise fail(
            f"the signature takes {', '.join(positional) or 'nothing'} by position",
            "(*, parameters)" if is_class else "(model, batch, *, parameters)",
            "Put a * before the parameters and give each a default.",
        )
    if is_class and not any("__call__" in vars(base) for base in inspect.getmro(target)):
        raise fail("the class has no __call__", "(self, model, batch) -> maps", "Define it.")
    truths = sorted(trial.plugin.facts.needs - HANDED)
    if trial.plugin.facts.role == "method" and truths:
        raise fail(
            f"needs= names {', '.join(truths)}, which maps are scored against",
            "a method that knows the images and the targets alone",
            'Drop needs=, or declare role="control", which is shown beside the methods, unranked.',
        )
    unknown = sorted(trial.plugin.facts.families - set(FAMILIES))
    if unknown:
        raise fail(
            f"families= names '{unknown[0]}'", " or ".join(FAMILIES), nearest(unknown[0], FAMILIES) + "."
        )
    check_fit_facts(trial.plugin)


def check_tried(trial: Trial) -> None:
    """The explainer is defined for one model at least of those that it is tried on."""
    reasons = {other.model: other.reason for other in trial.others}
    if all(reasons.values()):
        told = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise fail(
            f"it is defined for none of {told}",
            "a model to try it on",
            "Name one that it is defined for (--models NAME), or mend families= or defined_for=.",
        )


def check_maps(trial: Trial) -> None:
    """A map for each image: (B, h, w), finite, of 32 bits or more, and not constant."""
    seen = trial.base
    if seen.error is not None:
        if isinstance(seen.error, PluginError):
            raise CheckError(f"{seen.error}. Return the map at any resolution, one for each image.")
        raise fail(
            f"the explainer raises {seen.said}",
            f"maps of {IMAGES} images",
            "Mend the error, or say in families= or defined_for= for which models it is not defined. "
            "(Labels, masks and boxes are None unless needs= names them, as controls do.)",
        )
    maps = trial.maps()
    if not bool(torch.isfinite(maps).all()):
        bad = int((~torch.isfinite(maps)).sum())
        raise fail(
            f"{bad} values are NaN or infinite",
            "finite maps",
            "Look for a division by zero, a log or a root.",
        )
    if seen.dtype is not None and (not seen.dtype.is_floating_point or seen.dtype.itemsize < 4):
        raise fail(
            f"maps come as {seen.dtype}",
            "torch.float32",
            "Convert before you compute: coarse numbers tie pixels that differ.",
        )
    flat = maps.flatten(1)
    if not bool((flat.amax(1) > flat.amin(1)).any()):
        raise fail(
            f"all {IMAGES} maps are constant",
            "maps that tell pixels apart",
            "Is the gradient cut off, or the wrong class explained? Constant maps are scored as empty.",
        )


def check_same_seed(trial: Trial) -> str:
    """The same images and the same seed give the same maps, to the bit.

    Some kernels of a CPU round by where a tensor lies in memory, and steps of an optimisation let that
    grow: up to a hundred-thousandth of the range it is noted. Draws without a seed differ by far more.
    """
    one, two = trial.maps(), trial.maps(trial.again, "at a second call")
    if not same_bits(one, two):
        gap = float((one - two).abs().nan_to_num().max()) / (spread(one) or 1.0)
        if gap <= ROUNDING:
            return f"two calls differ by {100 * gap:.3g}% of the maps' range, by rounding"
        raise fail(
            f"two calls with one seed differ by {100 * gap:.3g}% of the maps' range", "the same maps", SEEDING
        )
    return ""


def check_batch(trial: Trial) -> str:
    """A map does not depend on the other images of its batch: a batch of N equals N batches of one.

    Where a formula divides by what may vanish, or at a kink, single precision alone can part them, by a
    hundredth of the range at most; what is gone in double precision is rounding, which is noted, and no
    dependence.
    """
    together = trial.steady_maps()
    for i, seen in enumerate(trial.alone):
        alone = trial.maps(seen, "on one image alone")[0]
        apart = disagreement(trial, together[i], alone)
        if not apart:
            continue
        if may_be_rounding(together[i], alone) and agree_in_double(trial):
            return f"image {i} in a batch and alone: {apart}, by rounding (none in double precision)"
        raise fail(
            f"the map of image {i} in a batch of {IMAGES} and its map alone have {apart}",
            equal_enough(trial),
            "Normalise and select by image, not over the batch, and seed by image (batch.generator(i)); "
            "where steps let rounding grow, declare iterative=True.",
        )
    return ""


def check_target(trial: Trial) -> None:
    """Another class gives another map, or the plugin declares that it does not look at the class."""
    maps = trial.steady_maps()
    for shift in (1, 2):
        others = trial.maps(trial.try_images(shift=shift), "for other classes")
        same = all(not disagreement(trial, one, two) for one, two in zip(maps, others, strict=True))
        if same and trial.plugin.facts.class_specific:
            continue
        if not same and not trial.plugin.facts.class_specific:
            raise fail(
                "maps change with batch.targets, but class_specific=False is declared",
                "the same maps for every class",
                "Drop class_specific=False, or do not use the targets.",
            )
        if not same:
            return
    if trial.plugin.facts.class_specific:
        raise fail(
            "maps are the same whatever batch.targets asks for",
            "another map for another class",
            "Explain the logits of batch.targets, or declare class_specific=False.",
        )


def check_inputs(trial: Trial) -> None:
    """Images, targets, truths and the passes that all explainers share are not written to."""
    trial.maps()
    for name in trial.base.changes["inputs"]:
        raise fail(
            f"batch.{name} is no longer what it was",
            "inputs left alone",
            "Work on a copy: batch.images.clone().",
        )
    model = trial.fresh()
    batch = trial.batch(model)
    if not has_features(model):
        return
    shared = {"logits": batch.logits, "activations()": batch.activations(), "gradients()": batch.gradients()}
    before = {name: value.clone() for name, value in shared.items()}
    trial.maps(trial.call(model, batch), "on a batch whose passes are computed")
    for name, value in shared.items():
        if not torch.equal(value, before[name]):
            raise fail(
                f"batch.{name} is written to",
                "passes that other explainers share left alone",
                "Avoid in-place operations (relu_, +=, masked_fill_) on it, or clone it first.",
            )


def _unchanged(trial: Trial, kind: str, expected: str, advice: str) -> None:
    trial.maps()
    # What only the first call does is an import of a library that the plugin puts off, rightly.
    again = trial.again.changes[kind] if trial.base.changes[kind] else ()
    changed = [name for name in trial.base.changes[kind] if name in again]
    if changed:
        raise fail(f"changed by the call: {listed(changed)}", expected, advice)


def check_weights(trial: Trial) -> None:
    """Weights and buffers are as before."""
    _unchanged(
        trial,
        "weights",
        "weights and buffers as before",
        "Change a copy.deepcopy of the network, never the model.",
    )


def check_gradients(trial: Trial) -> None:
    """No parameter's `.grad` is set or cleared."""
    _unchanged(
        trial,
        "gradients",
        "parameters' .grad as before",
        "Take torch.autograd.grad(score, images) instead of backward().",
    )


def check_flags(trial: Trial) -> None:
    """Training flags, `requires_grad`, layers and their switches are as before."""
    _unchanged(
        trial,
        "flags",
        "training flags, requires_grad, layers and their attributes as before",
        "Restore what you switch in a finally block, or work on a copy.",
    )


def check_hooks(trial: Trial) -> None:
    """No hook is left on the model, none of its own removed."""
    _unchanged(
        trial,
        "hooks",
        "the hooks that were there",
        "Remove each handle in a finally block, or use batch.activations().",
    )


def check_random_state(trial: Trial) -> None:
    """The global random states of torch, numpy and Python are as before."""
    _unchanged(trial, "random state", "global random states as before", SEEDING)


def check_settings(trial: Trial) -> None:
    """Torch's gradient mode, default type and threads are as before, wherever they stood."""
    trial.maps()
    changed = [*trial.base.changes["settings"], *trial.frozen.changes["settings"]]
    if changed:
        raise fail(
            f"changed by the call: {listed(changed)}",
            "torch's settings as before",
            "Read the setting beforehand and put it back in a finally block, or use a context manager.",
        )


def check_frozen(trial: Trial) -> str:
    """Maps are the same on frozen parameters and under `torch.no_grad()`."""
    expected = trial.steady_maps()
    found = trial.maps(trial.frozen, "under torch.no_grad(), with frozen parameters")
    for one, two in zip(found, expected, strict=True):
        apart = disagreement(trial, one, two, FROZEN_TOLERANCE)
        if not apart:
            continue
        if may_be_rounding(one, two) and agree_in_double(trial, frozen=True):
            return (
                f"frozen parameters and torch.no_grad() make {apart}, by rounding (none in double precision)"
            )
        raise fail(
            f"frozen parameters and torch.no_grad() make {apart}",
            equal_enough(trial, FROZEN_TOLERANCE),
            "Ask for gradients of the images or features, not of the parameters.",
        )
    return ""


def check_bf16(trial: Trial) -> None:
    """A model that computes in bfloat16 gives finite maps."""
    trial.sound_maps()
    maps = trial.maps(trial.bf16, "on a model in bf16")
    if not bool(torch.isfinite(maps).all()):
        raise fail(
            "on a model in bf16 the maps hold NaN or infinity",
            "finite maps",
            "Convert activations and gradients with .float() before sums, products and divisions.",
        )


def check_sizes(trial: Trial) -> None:
    """Images that are higher than wide give maps that are, too."""
    trial.sound_maps()
    model = tall(trial)
    seen = trial.call(model, trial.batch(model, [0, 1]))
    height, width = model.input_size
    maps = trial.maps(seen, f"on images of {height} x {width} pixels")
    if not bool(torch.isfinite(maps).all()):
        raise fail(f"on images of {height} x {width} pixels the maps hold NaN or infinity", "finite maps", "")
    if len(maps) != 2 or maps.shape[1] <= maps.shape[2]:
        raise fail(
            f"images of {height} x {width} pixels give maps of {maps.shape[1]} x {maps.shape[2]}",
            "maps that are higher than wide",
            "Keep (height, width) apart and in this order; read the grid off the features, not off a square.",
        )


def check_warnings(trial: Trial) -> None:
    """No warning is given, in any precision or mode."""
    trial.maps()
    given = [text for seen in (trial.base, trial.frozen, trial.bf16) for text in seen.warnings]
    if given:
        raise fail(
            f"{len(given)} warnings, the first: {given[0]}",
            "none",
            "Mend the cause; a warning for each batch of a run helps nobody.",
        )


def check_cost(trial: Trial) -> None:
    """Images passed through the model, forwards and backwards, are as declared."""
    facts = trial.plugin.facts
    trial.maps()
    for seen in (trial.base, trial.alone[0]):
        if seen.beside:
            raise fail(
                f"{seen.beside} images go through the network itself, where they are not counted",
                "passes of the model",
                "Call model(images), not model.module(...); hooks on its layers work all the same.",
            )
    stated = declared(trial.plugin, trial.original, trial.params)
    if stated.forwards is None or stated.backwards is None:
        raise CheckSkipped("declares no forwards= and backwards=")
    for seen, count in ((trial.alone[0], 1), (trial.base, IMAGES)):
        trial.maps(seen, "on one image alone")
        for name, each, found in (
            ("forwards", stated.forwards, seen.forwards),
            ("backwards", stated.backwards, seen.backwards),
        ):
            if found > count * each or (facts.exact_cost and found != count * each):
                bound = "" if facts.exact_cost else "at most "
                raise fail(
                    f"{found} {name} counted for {count} image{'s' if count > 1 else ''}",
                    f"{bound}{count * each:g} as declared ({name}={each:g} an image)",
                    f"Declare what it takes, as a number or a function of (model, params)"
                    f"{', or exact_cost=False for an upper bound.' if found < count * each else '.'}",
                )


def check_interruption(trial: Trial) -> None:
    """A model that fails midway leaves no hooks or changed flags behind, and its error is passed on."""
    trial.maps()
    tried = False
    for passes in (1, 2):
        model = trial.fresh()
        batch = trial.batch(model)
        with tripwire(model, passes) as passed:
            seen = trial.call(model, batch)
        if len(passed) < passes:
            break
        tried = True
        if not isinstance(seen.error, InterruptionError) and not _caused_by_wire(seen.error):
            raise fail(
                f"the model failed in forward pass {passes}, and the explainer "
                + (f"raised {seen.said}" if seen.error else "returned maps all the same"),
                "the model's own error to be passed on",
                "Catch only errors that you can mend.",
            )
        for kind, changed in seen.changes.items():
            names = [name for name in changed if name not in trial.base.changes[kind]]
            if names:  # what an undisturbed call changes as well is told by the other checks
                raise fail(
                    f"after the model failed in forward pass {passes}, {kind} are changed: {listed(names)}",
                    "everything as before",
                    "Put the restoring into a finally block or a context manager.",
                )
    if not tried:
        raise CheckSkipped("passes no image through the whole model")


def _caused_by_wire(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, InterruptionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_memory(trial: Trial) -> None:
    """After a warm-up of 10 calls, 100 calls keep no tensors and grow the process by less than 20 MB.

    Where 25 calls leave less than a twentieth of that, they are all.
    """
    trial.maps()
    model = trial.fresh()
    image = trial.batch(model, [0])
    call = bind(trial.plugin, dict(trial.params), fit=trial.fit)
    with isolated():
        grown = growth(lambda: call(model, image.select([0])))
        if grown.leaks:
            # An allocator may still be finding its size, a cache filling; what leaks, leaks again.
            grown = growth(lambda: call(model, image.select([0])))
    if grown.leaks:
        raise fail(
            f"{CALLS} calls {grown.leaks}",
            f"none, and less than {GROWTH_MB} MB",
            "Keep no tensors in globals, closures or on the model; detach what outlives the call.",
        )


#: Asked of the plugin alone.
PLUGIN_CHECKS: tuple[Check, ...] = (check_facts,)
#: Asked of the plugin and the kit's own models together.
ZOO_CHECKS: tuple[Check, ...] = (check_tried,)
#: Asked on every model.
MODEL_CHECKS: tuple[Check, ...] = (
    check_maps, check_same_seed, check_batch, check_target, check_inputs, check_weights, check_gradients,
    check_flags, check_hooks, check_random_state, check_settings, check_frozen, check_bf16, check_sizes,
    check_warnings, check_cost, check_interruption, check_memory,
)  # fmt: skip
#: Asked on every model of explainers that are fitted first.
FIT_CHECKS: tuple[Check, ...] = (check_fit, check_resume)
#: Asked on every model of explainers that give a reconstruction beside their maps.
RECONSTRUCTION_CHECKS: tuple[Check, ...] = (check_reconstruct,)
#: Those that take long.
SLOW_CHECKS: tuple[Check, ...] = (check_memory,)
