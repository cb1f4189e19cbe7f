"""Every registered plugin keeps what it promises: the kit over the whole register.

Explainers are tried on two tiny networks with random weights, a CNN and a transformer, for speed;
`faithmap check all` tries them on the embedded ones.
"""

from __future__ import annotations

import pytest
from conftest import make_cnn, make_vit

from faithmap import conformance, registry
from faithmap.conformance import Case
from faithmap.explaining import EVERYTHING, undefined
from faithmap.plugin import Plugin

MODELS = {"tiny-cnn": make_cnn, "tiny-vit": make_vit}


@conformance.parametrized("explainer", models=MODELS, slow=False)
def test_explainers(case: Case) -> None:
    case.run()


@conformance.parametrized("metric")
def test_metrics(case: Case) -> None:
    case.run()


@conformance.parametrized("dataset")
def test_datasets(case: Case) -> None:
    case.run()


@pytest.mark.parametrize("plugin", registry.plugins("explainer"), ids=lambda plugin: plugin.name)
def test_every_explainer_is_tried_on_a_model(plugin: Plugin) -> None:
    """One that both networks are skipped for would pass unseen."""
    models = [make() for make in MODELS.values()]
    assert [model for model in models if not undefined(plugin, model, EVERYTHING)]


#: Calls are repeated a hundred times where something might stay. Of each way to make a map one is tried in
#: every run of the tests: features and gradients, a fitted decoder, gates that are optimised, rules for
#: relevance, attention, captum's gradients; all of them where minutes do not count.
WATCHED = {"gradcam", "scan", "infocam", "lrp", "rollout", "deeplift"}


@pytest.mark.parametrize(
    "plugin",
    [
        pytest.param(each, marks=pytest.mark.slow if each.name in WATCHED else pytest.mark.long)
        for each in registry.plugins("explainer")
    ],
    ids=lambda plugin: plugin.name,
)
def test_explainers_do_not_grow_the_process(plugin: Plugin) -> None:
    """On the first of the two networks that the method is defined for."""
    name = next(name for name, make in MODELS.items() if not undefined(plugin, make(), EVERYTHING))
    results = conformance.check_explainer(plugin, {name: MODELS[name]}, only=["check_memory"])
    assert conformance.failures(results) == []
