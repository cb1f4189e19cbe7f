"""Memory that is kept for the next block: how much sooner a network is done on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from faithmap._memory import CHOSEN

PROGRAM = """
import sys, time
import faithmap
from faithmap._memory import keep_freed_memory
from faithmap.models import load_model
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
torch.set_num_threads(1)
model = load_model(sys.argv[2], pretrained=False)
images = torch.rand(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
times = []
with torch.no_grad():
    for _ in range(8):
        begun = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - begun)
print(sorted(times[1:])[3])
"""


def seconds(word: str, model: str) -> float:
    """Median of seven passes of 16 images on one thread, in a process of its own."""
    plain = {key: value for key, value in os.environ.items() if key not in CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word, model], env=plain, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("model", ["timm/mobilenetv2_100", "timm/resnet50", "timm/vit_tiny_patch16_224"])
def test_a_network_is_not_slower(benchmark: BenchmarkFixture, model: str) -> None:
    kept = benchmark.pedantic(seconds, args=("keep", model), rounds=1)
    usual = seconds("leave", model)
    benchmark.extra_info |= {"ms_kept": 1000 * kept / 16, "ms_usual": 1000 * usual / 16}
    assert kept < 1.1 * usual
