"""The kit's checks of explainers: for each a method that breaks one promise, and is told which."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import make_cnn
from torch import Tensor

from faithmap import conformance, registry
from faithmap._checks import growth
from faithmap.batch import Batch
from faithmap.models import Model

Method = Callable[..., Tensor]
MODELS = {"tiny": make_cnn}
KEPT: list[Tensor] = []
STREAM = torch.Generator()


pytestmark = pytest.mark.usefixtures("own_plugins")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Forget what a test keeps."""
    yield
    KEPT.clear()


def gradient(model: Model, batch: Batch, targets: Tensor | None = None) -> Tensor:
    """A well-behaved map: the size of the target logit's gradient."""
    images = batch.images.clone().requires_grad_()
    with torch.enable_grad():
        scores = model(images).gather(1, (batch.targets if targets is None else targets)[:, None]).sum()
        (found,) = torch.autograd.grad(scores, images)
    return found.abs().sum(1)


def checked(method: Method, *, slow: bool = False, **facts: Any) -> tuple[conformance.Result, ...]:
    """The kit on a method, with facts of a well-behaved one but for those given."""

    def planted(model: Model, batch: Batch) -> Tensor:
        """A method that a test plants."""
        return method(model, batch)

    facts = {"version": 1, "source": "a test", "forwards": 1, "backwards": 1} | facts
    registry.explainer(name="planted", **facts)(planted)
    return conformance.check_explainer(planted, MODELS, slow=slow)


def failing(results: tuple[conformance.Result, ...]) -> dict[str, str]:
    return {result.check: result.message for result in results if result.status == "failed"}


def test_a_good_method_passes_everything() -> None:
    results = checked(gradient, slow=True)
    assert {result.status for result in results} == {"passed"}, results
    elsewhere = {"check_fit", "check_resume", "check_reconstruct", "check_tried"}
    expected = [name for name in conformance.check_names("explainer") if name not in elsewhere]
    assert [result.check for result in results] == expected
    assert {result.model for result in results} == {"", "tiny"}


# --- one broken promise each -------------------------------------------------------------------


def constant(model: Model, batch: Batch) -> Tensor:
    return 0 * gradient(model, batch)


def infinite(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch).sub(1).log()


def coarse(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch).half()


def flat(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch).flatten(1)


def raising(model: Model, batch: Batch) -> Tensor:
    raise ValueError("no such layer")


def drifting(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch) * torch.rand(batch.size, generator=STREAM)


def stretched_over_the_batch(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    return maps - maps.mean()


def seeded_by_place(model: Model, batch: Batch) -> Tensor:
    noise = [torch.rand(batch.size, generator=torch.Generator().manual_seed(i)) for i in range(len(batch))]
    return gradient(model, batch) * torch.stack(noise)


def of_the_first_class(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch, torch.zeros_like(batch.targets))


def halving(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    batch.images.mul_(0.5)
    return maps


def rectifying(model: Model, batch: Batch) -> Tensor:
    return batch.activations().sub_(0.1).relu_().mul(batch.gradients().abs()).sum(1)


def training(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    with torch.no_grad():
        model.get_parameter("module.head.weight").add_(0.01)
    return maps


def backward(model: Model, batch: Batch) -> Tensor:
    images = batch.images.clone().requires_grad_()
    with torch.enable_grad():
        model(images).gather(1, batch.targets[:, None]).sum().backward()
    assert images.grad is not None
    return images.grad.abs().sum(1)


def thawing(model: Model, batch: Batch) -> Tensor:
    model.requires_grad_(True)
    return gradient(model, batch)


def leaving_training_mode(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    model.train()
    return maps


def switching(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    model.module.fused_attn = False  # type: ignore[assignment]
    return maps


def leaving_a_hook(model: Model, batch: Batch) -> Tensor:
    maps = gradient(model, batch)
    model.layer().register_forward_hook(lambda *_: None)
    return maps


def reseeding(model: Model, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    return gradient(model, batch) + torch.rand(1)


def taking_all_threads(model: Model, batch: Batch) -> Tensor:
    # The core shields the gradient mode; the number of threads is left to the method's manners.
    torch.set_num_threads(torch.get_num_threads() + 1)
    return gradient(model, batch)


def counting_on_parameters(model: Model, batch: Batch) -> Tensor:
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    return gradient(model, batch) * (1.0 if trainable else -1.0)


def overflowing(model: Model, batch: Batch) -> Tensor:
    coarse = model(batch.images).to(torch.bfloat16) if model.precision == "bf16" else model(batch.images)
    exact = (model(batch.images) - coarse).abs().sum() == 0
    return gradient(model, batch) / (1 - float(exact) * (model.precision == "bf16"))


def transposing(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch).transpose(1, 2)


def warning(model: Model, batch: Batch) -> Tensor:
    warnings.warn("this will go away", FutureWarning, stacklevel=2)
    return gradient(model, batch)


def passing_twice(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch) + gradient(model, batch)


def hooked_without_finally(model: Model, batch: Batch) -> Tensor:
    handle = model.layer().register_forward_hook(lambda *_: None)
    maps = gradient(model, batch)
    handle.remove()
    return maps


def swallowing(model: Model, batch: Batch) -> Tensor:
    try:
        return gradient(model, batch)
    except RuntimeError:
        return batch.images.mean(1)


def keeping(model: Model, batch: Batch) -> Tensor:
    KEPT.append(torch.ones(120_000))
    return gradient(model, batch)


def keeping_images(model: Model, batch: Batch) -> Tensor:
    KEPT.append(batch.images)
    return gradient(model, batch)


def keeping_graphs(model: Model, batch: Batch) -> Tensor:
    KEPT.append(model(batch.images.clone().requires_grad_()).sum())
    return gradient(model, batch)


def beside_the_meter(model: Model, batch: Batch) -> Tensor:
    images = model.normalise(batch.images).requires_grad_()
    (found,) = torch.autograd.grad(model.module(images).gather(1, batch.targets[:, None]).sum(), images)
    return found.abs().sum(1)


def on_a_copy(model: Model, batch: Batch) -> Tensor:
    return gradient(model, batch) + 0 * copy.deepcopy(model.module)(batch.images).sum()


def peeking(model: Model, batch: Batch) -> Tensor:
    assert batch.masks is not None
    return gradient(model, batch) + batch.masks


BROKEN: list[tuple[str, Method, dict[str, Any], str]] = [
    ("check_facts", gradient, {"version": 0}, "Raise it whenever the values change"),
    ("check_facts", gradient, {"source": " "}, "Name the paper"),
    ("check_facts", gradient, {"check_params": {"steps": 3}}, "Mend check_params="),
    ("check_maps", constant, {"backwards": 1}, "Constant maps are scored as empty"),
    ("check_maps", infinite, {}, "division by zero"),
    ("check_maps", coarse, {}, "coarse numbers tie pixels"),
    ("check_maps", flat, {}, "expected a tensor"),
    ("check_maps", raising, {}, "ValueError: no such layer"),
    ("check_maps", peeking, {}, "masks and boxes are None unless needs= names them"),
    ("check_facts", peeking, {"needs": {"mask"}}, 'role="control"'),
    ("check_facts", gradient, {"families": {"cnn", "vitt"}}, "did you mean 'vit'"),
    ("check_same_seed", drifting, {}, "batch.generator(i)"),
    ("check_batch", stretched_over_the_batch, {}, "not over the batch"),
    ("check_batch", seeded_by_place, {}, "seed by image"),
    ("check_target", of_the_first_class, {}, "declare class_specific=False"),
    ("check_target", gradient, {"class_specific": False}, "Drop class_specific=False"),
    ("check_inputs", halving, {}, "batch.images.clone()"),
    ("check_inputs", rectifying, {}, "in-place operations"),
    ("check_weights", training, {}, "copy.deepcopy"),
    ("check_gradients", backward, {}, "torch.autograd.grad"),
    ("check_flags", thawing, {}, "requires_grad"),
    ("check_flags", leaving_training_mode, {}, "finally"),
    ("check_flags", switching, {}, "fused_attn"),
    ("check_hooks", leaving_a_hook, {}, "Remove each handle"),
    ("check_random_state", reseeding, {}, "batch.generator(i)"),
    ("check_settings", taking_all_threads, {}, "put it back in a finally block"),
    ("check_frozen", counting_on_parameters, {}, "not of the parameters"),
    ("check_bf16", overflowing, {"forwards": 3}, ".float()"),
    ("check_sizes", transposing, {}, "Keep (height, width) apart"),
    ("check_warnings", warning, {}, "FutureWarning: this will go away"),
    ("check_cost", passing_twice, {}, "2 forwards counted for 1 image"),
    ("check_cost", gradient, {"forwards": 2}, "exact_cost=False"),
    ("check_cost", passing_twice, {"exact_cost": False}, "expected at most 1"),
    ("check_cost", beside_the_meter, {"forwards": 0, "backwards": 0}, "Call model(images), not model.module"),
    ("check_cost", on_a_copy, {}, "images go through the network itself, where they are not counted"),
    ("check_interruption", hooked_without_finally, {}, "finally block"),
    ("check_interruption", swallowing, {}, "Catch only errors that you can mend"),
]


@pytest.mark.parametrize(
    ("check", "method", "facts", "advice"),
    [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}-{i}") for i, case in enumerate(BROKEN)],
)
def test_a_broken_promise_is_told_by_its_check_alone(
    check: str, method: Method, facts: dict[str, Any], advice: str
) -> None:
    found = failing(checked(method, **facts))
    assert set(found) == {check}, found
    assert advice in found[check]


@pytest.mark.parametrize(
    "method",
    [keeping, *(pytest.param(each, marks=pytest.mark.long) for each in (keeping_images, keeping_graphs))],
)
def test_growth_is_told(method: Method) -> None:
    """However small the images are on which it is looked for."""
    found = failing(checked(method, forwards=2 if method is keeping_graphs else 1, slow=True))
    assert set(found) == {"check_memory"}, found
    assert re.search(r"100 calls leave \d+ tensors of [\d.]+ MB behind", found["check_memory"])
    assert "Keep no tensors in globals" in found["check_memory"]


def test_growth_that_holds_no_tensor_is_told() -> None:
    words: list[bytes] = []

    def hoarding(model: Model, batch: Batch) -> Tensor:
        words.append(b"x" * (400_000 + len(words)))
        return gradient(model, batch)

    found = failing(checked(hoarding, slow=True))
    assert set(found) == {"check_memory"}, found
    assert "100 calls grow the process by" in found["check_memory"]


@pytest.mark.parametrize(
    ("leaves", "calls"), [(lambda n: 0, 35), (lambda n: int(n > 20), 110), (lambda n: int(n % 4 == 0), 110)]
)
def test_calls_are_watched_until_it_is_clear_that_nothing_stays(
    leaves: Callable[[int], int], calls: int
) -> None:
    """Nothing is left; something after a while; in one call of four, which is no leak yet."""
    kept, made = [], 0

    def call() -> None:
        nonlocal made
        made += 1
        kept.extend(torch.zeros(1) for _ in range(leaves(made)))

    grown = growth(call)
    assert made == calls
    assert grown.tensors == len(kept) - sum(leaves(n + 1) for n in range(10))
    assert bool(grown.leaks) == (grown.tensors >= 50)


def test_every_check_has_a_method_that_breaks_it() -> None:
    # Fits and reconstructions are broken in test_conformance_fit.py.
    elsewhere = {"check_memory", "check_tried", "check_fit", "check_resume", "check_reconstruct"}
    assert {case[0] for case in BROKEN} | elsewhere == set(conformance.check_names("explainer"))


def test_parameters_need_defaults_and_a_star() -> None:
    @registry.explainer(version=1, source="a test", name="planted")
    def positional(model: Model, batch: Batch, power: float = 1.0) -> Tensor:
        """Takes a parameter by position."""
        return gradient(model, batch) ** power

    @registry.explainer(version=1, source="a test", name="planted-too")
    def undecided(model: Model, batch: Batch, *, power: float) -> Tensor:
        """Leaves a parameter open."""
        return gradient(model, batch) ** power

    for target, advice in ((positional, "Put a * before"), (undecided, "has no default")):
        results = conformance.check_explainer(target, MODELS, only=["check_facts"])
        assert advice in failing(results)["check_facts"]


# --- declarations ------------------------------------------------------------------------------


def test_an_upper_bound_may_be_declared() -> None:
    assert failing(checked(gradient, forwards=5, backwards=2, exact_cost=False)) == {}


def test_counts_may_be_left_out() -> None:
    results = checked(gradient, forwards=None)
    assert {r.check for r in results if r.status == "skipped"} == {"check_cost"}


def test_iterative_methods_are_compared_by_rank() -> None:
    def nearly(model: Model, batch: Batch) -> Tensor:
        """Off by a little more than the tolerance in a batch of several."""
        maps = gradient(model, batch)
        return maps + 3e-4 * (len(batch) > 1) * maps.amax()

    assert set(failing(checked(nearly))) == {"check_batch"}
    assert failing(checked(nearly, iterative=True)) == {}

    def far(model: Model, batch: Batch) -> Tensor:
        """Another order in a batch of several."""
        return gradient(model, batch) * (1 if len(batch) > 1 else -1)

    found = failing(checked(far, iterative=True))
    assert set(found) == {"check_batch"}
    assert (
        "a rank correlation of -1.0000; expected a rank correlation of at least 0.999" in found["check_batch"]
    )


def test_noise_on_a_plateau_is_no_other_order() -> None:
    def stepped(model: Model, batch: Batch) -> Tensor:
        """Two plateaus; a millionth of noise in a batch of several, which shuffles their ranks."""
        maps = gradient(model, batch)
        noise = 1e-6 * batch.images.mean(1) * (len(batch) > 1)
        return (maps > maps.flatten(1).median(1).values.view(-1, 1, 1)).float() + noise

    assert failing(checked(stepped, iterative=True)) == {}


def test_rounding_is_no_dependence_on_the_batch() -> None:
    def ill_conditioned(model: Model, batch: Batch) -> Tensor:
        """As if large numbers cancelled: an error of the type's precision, another in each batch."""
        precision = torch.finfo(next(model.parameters()).dtype).eps
        maps = gradient(model, batch)
        return maps + size * precision * len(batch) * maps.max() * batch.images.mean(1)

    size = 1e3
    results = checked(ill_conditioned)
    (found,) = [result for result in results if result.check == "check_batch"]
    assert found.status == "passed", found
    assert "by rounding (none in double precision)" in found.message
    size = 1e6  # an error of more than a hundredth is one, whatever it comes of
    assert "not over the batch" in failing(checked(ill_conditioned))["check_batch"]


def test_where_it_is_not_defined_nothing_is_tried() -> None:
    results = checked(raising, families={"vit"})
    assert {r.status for r in results if r.check != "check_facts"} == {"skipped"}
    assert {r.message for r in results if r.model} == {"defined for vit, not for cnn"}


@pytest.mark.parametrize("facts", [{"families": {"cn"}}, {"defined_for": lambda model: "never"}])
def test_a_method_that_is_tried_on_nothing_does_not_pass(facts: dict[str, Any]) -> None:
    @registry.explainer(version=1, source="a test", name="planted", **facts)
    def planted(model: Model, batch: Batch) -> Tensor:
        """A method that a test plants."""
        return gradient(model, batch)

    found = failing(conformance.check_explainer(planted, slow=False))
    assert "it is defined for none of shapes/resnet (" in found["check_tried"]
    assert "Name one that it is defined for" in found["check_tried"]
    if "defined_for" in facts:  # on models that are named it need not be defined
        assert failing(conformance.check_explainer(planted, MODELS, slow=False)) == {}


def test_a_broken_defined_for_is_told() -> None:
    def careless(model: Model) -> str | None:
        return str(model.module.no_such_part)

    found = failing(checked(gradient, defined_for=careless))
    assert "defined_for raises AttributeError" in found["check_maps"]


def test_a_method_may_draw_under_a_forked_state() -> None:
    def drawing(model: Model, batch: Batch) -> Tensor:
        return gradient(model, batch) * torch.rand(batch.size)

    assert failing(checked(drawing, per_image=True)) == {}
