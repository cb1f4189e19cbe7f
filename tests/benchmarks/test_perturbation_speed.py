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
LEAST_RATIO = 0.8


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bare(network: nn.Module, layout: torch.memory_format, size: int, passes: int) -> Callable[[], None]:
    """The network alone on ready-made, normalised images, for at least as many as scoring forwards."""
    network = copy.deepcopy(network).to(memory_format=layout)
    images = torch.randn(size, 3, SIDE, SIDE).contiguous(memory_format=layout)

    @torch.inference_mode()
    def call() -> None:
        for _ in range(passes // size):
            network(images)

    return call


@pytest.mark.slow
@pytest.mark.benchmark(group="perturbation")
def test_scoring_forwards_at_the_bare_rate(benchmark: BenchmarkFixture) -> None:
    """At least 80% of the rate of the same network in its best batch size and memory order.

    Both sides run in this process, one after the other in every round; the medians count, and
    the best bare configuration is chosen by them.
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
        f"{name}, {size}": (bare(model.module, layout, size, passes), passes // size * size)
        for name, layout in LAYOUTS.items()
        for size in SIZES
    }
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in rivals}
    for call, _ in rivals.values():
        call()
    for _ in range(ROUNDS):
        for name, (call, forwarded) in rivals.items():
            theirs[name].append(forwarded / seconds(call))
        ours.append(passes / seconds(lambda: metric(model, batch, maps)))
    rates = {name: statistics.median(found) for name, found in theirs.items()}
    best = max(rates, key=rates.__getitem__)
    rate = statistics.median(ours)
    benchmark.extra_info.update(
        images_per_second=rate,
        best=best,
        best_images_per_second=rates[best],
        ratio=rate / rates[best],
        bare=rates,
    )
    benchmark.pedantic(lambda: metric(model, batch, maps), rounds=1)
    print(f"scoring {rate:.1f} images/s, bare {rates[best]:.1f} ({best}): {rate / rates[best]:.3f}")
    assert rate >= LEAST_RATIO * rates[best], benchmark.extra_info
