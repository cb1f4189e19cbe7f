"""What every registered explainer promises, tried on a CNN and on a transformer."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from faithmap import registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.explaining import HOOK_KINDS, bind, undefined
from faithmap.models import Model
from faithmap.registry import Plugin

#: Explainers that are classes must be fitted first and have tests of their own.
PLUGINS = [plugin for plugin in registry.plugins("explainer") if not inspect.isclass(plugin.target)]
EXACT = (
    "gradcam", "gradcam++", "xgradcam", "layercam", "hirescam", "eigencam", "fullgrad", "guided-gradcam",
    "augmented-gradcam++", "saliency", "integrated-gradients", "occlusion", "iba",
    "input-x-gradient", "smoothgrad", "gradient-shap", "deeplift", "lime", "rise",
    "raw-attention", "rollout", "generic-attention", "attention-guided-cam",
    "lrp", "partial-lrp", "explainability", "attnlrp",
    "centre", "edges", "oracle", "fake-cam", "random", "random-grid",
    "centre", "edges", "oracle", "fake-cam", "random", "random-grid",
)  # fmt: skip

pytestmark = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)


@pytest.fixture
def batch(batch: Batch) -> Batch:
    """Three of the four images: enough to tell a batch from its images."""
    return batch.select([0, 1, 2])


def params_of(plugin: Plugin) -> dict[str, Any]:
    return plugin.check(plugin.facts.check_params)


def maps_of(plugin: Plugin, model: Model, batch: Batch) -> torch.Tensor:
    """The maps of a batch of which nothing is known yet; skips where the explainer is not defined."""
    reason = undefined(plugin, model, frozenset({"label", "mask", "box"}))
    if reason:
        pytest.skip(reason)
    return bind(plugin, params_of(plugin))(model, batch.select(range(len(batch))))


def declared(value: Any, model: Model, params: Mapping[str, Any]) -> float:
    return float(value(model, params)) if callable(value) else float(value)


def global_random_states() -> tuple[bytes, bytes, object]:
    """The states of torch's, numpy's and Python's global generators."""
    legacy = np.random.get_state()[1]  # noqa: NPY002 - the one that libraries may have moved
    return torch.get_rng_state().numpy().tobytes(), np.asarray(legacy).tobytes(), random.getstate()


def test_no_room_file_is_broken(plugin: Plugin) -> None:
    assert registry.broken("explainer") == {}
    assert plugin.facts.version >= 1 and plugin.facts.source and plugin.summary.endswith(".")


def test_maps_are_whole(plugin: Plugin, model: Model, batch: Batch) -> None:
    maps = maps_of(plugin, model, batch)
    assert maps.ndim == 3 and len(maps) == len(batch) and min(maps.shape[1:]) > 1
    assert maps.dtype == torch.float32 and not maps.requires_grad
    assert bool(torch.isfinite(maps).all())
    assert bool((maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).any())


def test_a_batch_equals_its_images_one_by_one(plugin: Plugin, model: Model, batch: Batch) -> None:
    together = maps_of(plugin, model, batch)
    for i in range(len(batch)):
        alone = maps_of(plugin, model, batch.select([i]))[0]
        assert float((together[i] - alone).abs().max()) <= 1e-4 * float(alone.max() - alone.min())


def test_same_seed_same_map(plugin: Plugin, model: Model, batch: Batch) -> None:
    assert torch.equal(maps_of(plugin, model, batch), maps_of(plugin, model, batch))


def test_class_specific_as_declared(plugin: Plugin, model: Model, batch: Batch) -> None:
    other = replace(batch, targets=(batch.targets + 1) % model.num_classes)
    one, two = maps_of(plugin, model, batch), maps_of(plugin, model, other)
    # Maps have units of their own: products of small gradients may lie below any fixed threshold.
    same = torch.allclose(one, two, rtol=1e-3, atol=1e-6 * float(one.abs().max()))
    assert plugin.facts.class_specific != same


def test_passes_counted_as_declared(plugin: Plugin, model: Model, batch: Batch) -> None:
    facts = plugin.facts
    if facts.forwards is None or facts.backwards is None:
        pytest.skip("declares no counts")
    for count in (1, 3):
        some = batch.select(range(count))
        with model.counting() as meter:
            maps_of(plugin, model, some)
        forwards = count * declared(facts.forwards, model, params_of(plugin))
        backwards = count * declared(facts.backwards, model, params_of(plugin))
        assert meter.forwards <= forwards and meter.backwards <= backwards
        if plugin.name in EXACT:
            assert (meter.forwards, meter.backwards) == (forwards, backwards)


def test_touches_nothing(plugin: Plugin, model: Model, batch: Batch) -> None:
    model.requires_grad_(True)
    next(iter(model.parameters())).requires_grad_(False)
    images, targets = batch.images.clone(), batch.targets.clone()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    states = global_random_states()
    whole = batch.select(range(len(batch)))
    maps_of(plugin, model, whole)
    assert torch.equal(batch.images, images) and torch.equal(batch.targets, targets)
    assert whole.images.grad is None and not whole.images.requires_grad
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == flags
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, kind) for module in model.modules() for kind in HOOK_KINDS)
    assert global_random_states() == states
    assert torch.is_grad_enabled()


def test_frozen_model_and_disabled_gradients(plugin: Plugin, model: Model, batch: Batch) -> None:
    expected = maps_of(plugin, model, batch)
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = maps_of(plugin, model, batch)
    assert float((frozen - expected).abs().max()) <= 1e-5 * float(expected.max() - expected.min())


def test_bf16_and_no_warnings(plugin: Plugin, model: Model, batch: Batch) -> None:
    model.precision = "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = maps_of(plugin, model, batch)
    assert maps.dtype == torch.float32 and bool(torch.isfinite(maps).all())


def test_images_that_are_not_square(plugin: Plugin, cnn: Model) -> None:
    model = Model(cnn.module, mean=0.5, std=0.5, input_size=(40, 24))
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 40, 24, dtype=torch.bool)
    masks[:, 8:30, 4:9] = True
    batch = Batch(
        images, torch.tensor([0, 1]), ("a", "b"), Context(model, images), masks=masks, grid=model.grid
    )
    maps = maps_of(plugin, model, batch)
    assert bool(torch.isfinite(maps).all())
    assert (maps.shape[1] > maps.shape[2]) and len(maps) == 2
