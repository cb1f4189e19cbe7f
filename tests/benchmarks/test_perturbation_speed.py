"""Perturbation scoring runs at the model's own speed: hardly any time goes elsewhere."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import faithmap
from faithmap.registry import get
from slow_metrics import batch_of, random_images

IMAGES, SIDE, ROUNDS = 16, 224, 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = (8, 16, 32, 64)
#: Images in a short run that only serves to choose the rival.
TRIAL = 64
LEAST_RATIO = 0.8


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bare(network: nn.Module, layout: torch.memory_format, size: int) -> Callable[[int], None]:
    """The network alone on ready-made, normalised images; called with how many it shall forward."""
    network = copy.deepcopy(network).to(memory_format=layout)
    images = torch.randn(size, 3, SIDE, SIDE).contiguous(memory_format=layout)

    @torch.inference_mode()
    def call(passes: int) -> None:
        for start in range(0, passes, size):
            network(images[: passes - start])

    return call


def best_of(rivals: dict[str, Callable[[int], None]]) -> tuple[str, dict[str, float]]:
    """The fastest by the median of three short runs each, in turns; and all rates in images a second."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for call in rivals.values():
        call(TRIAL)
    for _ in range(3):
        for name, call in rivals.items():
            rates[name].append(TRIAL / seconds(lambda call=call: call(TRIAL)))  # type: ignore[misc]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return max(medians, key=medians.__getitem__), medians


@pytest.mark.slow
@pytest.mark.benchmark(group="perturbation")
def test_scoring_forwards_at_the_bare_rate(benchmark: BenchmarkFixture) -> None:
    """At least 80% of the rate of the same network in its best batch size and memory order.

    The best bare configuration is chosen beforehand. Then both sides forward the same number of
    images in this process, in turns; the medians of their times count.
    """
    model = faithmap.load_model("timm/resnet18", pretrained=False)
    batch = batch_of(
        model, random_images(IMAGES, SIDE), labels=torch.zeros(IMAGES, dtype=torch.long), grid=(7, 7)
    )
    metric = get("metric", "perturbation").make({})
    maps: Tensor = torch.randn(IMAGES, SIDE, SIDE)
    with model.counting() as meter:
        metric(model, batch, maps)
    # The clean logits are there by now; from here on only masked images are forwarded.
    passes = 2 * 9 * IMAGES
    assert meter.forwards == passes
    rivals = {
        f"{name}, {size}": bare(model.module, layout, size)
        for name, layout in LAYOUTS.items()
        for size in SIZES
    }
    best, trials = best_of(rivals)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(seconds(lambda: rivals[best](passes)))
        ours.append(seconds(lambda: metric(model, batch, maps)))
    ratio = statistics.median(theirs) / statistics.median(ours)
    benchmark.extra_info.update(
        images_per_second=passes / statistics.median(ours),
        bare_images_per_second=passes / statistics.median(theirs),
        best=best,
        ratio=ratio,
        median_of_ratios=statistics.median(rival / own for rival, own in zip(theirs, ours, strict=True)),
        trials=trials,
    )
    benchmark.pedantic(lambda: metric(model, batch, maps), rounds=1)
    print(benchmark.extra_info)
    assert ratio >= LEAST_RATIO, benchmark.extra_info
