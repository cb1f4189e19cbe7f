"""Freed memory is kept by the command line, where glibc hands out memory and nobody has chosen otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from faithmap._memory import CHOSEN

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
PROGRAM = """
import resource, sys
from faithmap._memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
import torch
torch.set_num_threads(1)
layer = torch.nn.Conv2d(3, 64, 3, padding=1)
images = torch.zeros(16, 3, 128, 128)
def passes(count):
    with torch.no_grad():
        for _ in range(count):
            layer(images).relu()
passes(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(10)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def measured(word: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept in a process of its own, and the page faults of ten passes of a layer."""
    plain = {key: value for key, value in os.environ.items() if key not in CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], env={**plain, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
def test_blocks_are_mapped_once() -> None:
    """Two results of 64 MB a pass are 32,000 pages, each mapped anew in each pass unless they are kept."""
    kept, faults = measured("keep")
    usual, others = measured("leave")
    assert (kept, usual) == (True, False)
    assert faults < 0.05 * others, (faults, others)


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
@pytest.mark.parametrize("name", CHOSEN)
def test_who_has_chosen_is_left_alone(name: str) -> None:
    assert measured("keep", **{name: "" if name != "MALLOC_MMAP_MAX_" else "65536"})[0] is False
