"""How the process of the command line treats memory that is freed.

A convolution of a batch needs a block of tens of megabytes for its result, and glibc asks the system for
each such block and gives it back when it is freed. Every page is then zeroed and mapped anew, block after
block, which on a virtual machine takes as long as the arithmetic.
"""

from __future__ import annotations

import os
import sys

#: Parameters of mallopt (malloc.h): no block is a mapping of its own, and what is free at the top stays.
MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * 2**20))
#: Whoever sets one of these, or another allocator, has chosen.
CHOSEN = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next ones instead of handing them back; False where that cannot be had.

    Only glibc is told, and only where the environment says nothing of it. The process then keeps the most
    memory that it ever needed until it ends.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CHOSEN):
        return False
    import ctypes

    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (there in glibc alone)
        return all(library.mallopt(parameter, value) == 1 for parameter, value in SETTINGS)
    except (AttributeError, OSError):
        return False
