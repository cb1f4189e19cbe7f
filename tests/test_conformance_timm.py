"""Every explainer on timm's own architectures: maps that are finite, and no image that sees another.

Random weights, and images of 64 pixels for speed; `faithmap check all --models
"timm/vgg11[pretrained=false]" --only check_maps,check_batch` tries the same at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import pytest
import torch

from faithmap import conformance, registry
from faithmap.conformance import Case
from faithmap.models import Model, load_model

SIDE = 64
#: Transformers of a fixed size are told the size; the others take any. VGG's head is narrowed: its 120
#: million weights would be most of the test's time.
NETS: dict[str, dict[str, Any]] = {
    "timm/vit_tiny_patch16_224": {"img_size": SIDE},
    "timm/deit_tiny_distilled_patch16_224": {"img_size": SIDE},
    "timm/convnext_atto": {},
    "timm/mobilenetv2_100": {},
    "timm/resnet18": {},
    "timm/vgg11": {"mlp_ratio": 1 / 16},
}
#: They pass the image once for each channel, of which networks have up to 1280, or dozens of changed images.
MANY_PASSES = (
    "ablationcam", "scorecam", "scorecam++", "kernel-shap", "lime", "mask", "occlusion", "rise",
)  # fmt: skip
#: Whether images see each other takes several passes: tried on these in every run of the tests, and on the
#: others, as are explainers of many passes, where minutes do not count.
ALWAYS = ("timm/vit_tiny_patch16_224", "timm/resnet18")
CHECKS = ("check_maps", "check_batch")
#: A transformer that has learnt nothing spreads its attention evenly: the class token alone has large
#: gradients, and the mask leaves nothing of the patches.
NOTHING_LEFT = "no patch has a gradient among the largest 5%"


def empty(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The expected failures on some of the networks."""
    told = [f"check_maps[{name}]" for name in names if "img_size" in NETS[name]]
    return {"masked-features": dict.fromkeys(told, NOTHING_LEFT)}


@cache
def net(name: str) -> Model:
    """Made once, as the kit works on copies of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(name, pretrained=False, input_size=SIDE, kwargs=NETS[name])


def models(names: Iterable[str]) -> dict[str, Callable[[], Model]]:
    return {name: partial(net, name) for name in sorted(names)}


REST = NETS.keys() - set(ALWAYS)
FEW_PASSES = [p for p in registry.plugins("explainer") if p.name not in MANY_PASSES]


@pytest.mark.slow
@conformance.parametrized(
    "explainer", FEW_PASSES, models=models(NETS), only=["check_maps"], expected_failures=empty(NETS)
)
def test_maps(case: Case) -> None:
    case.run()


@pytest.mark.slow
@conformance.parametrized("explainer", FEW_PASSES, models=models(ALWAYS), only=["check_batch"])
def test_batches(case: Case) -> None:
    case.run()


@pytest.mark.slow
@conformance.parametrized("explainer", MANY_PASSES, models=models(ALWAYS[:1]), only=CHECKS)
def test_explainers_of_many_passes(case: Case) -> None:
    case.run()


@pytest.mark.long
@conformance.parametrized("explainer", FEW_PASSES, models=models(REST), only=["check_batch"])
def test_batches_on_the_other_networks(case: Case) -> None:
    case.run()


@pytest.mark.long
@conformance.parametrized("explainer", MANY_PASSES, models=models(NETS.keys() - {ALWAYS[0]}), only=CHECKS)
def test_explainers_of_many_passes_on_the_other_networks(case: Case) -> None:
    case.run()
