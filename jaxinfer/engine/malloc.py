"""What glibc does with memory that is freed. Elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEPT_BYTES = 128 * 2**20  # at the end of the heap
LARGEST_KEPT = 2**30  # bytes of a block
VARIABLES = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"  # man mallopt


def trim_memory() -> None:
    """Gives back what it keeps: freed pieces below 32 MB, until it is told to."""
    _call("malloc_trim", 0)


def keep_memory() -> None:
    """Keeps what is freed, of larger pieces, too, unless glibc's own variables say something. On a CPU XLA asks for a
    program's temporary memory anew at each call, 50 MB with 64 rows of 32,000 logits: the system would fill what is
    used of it with zeros, a thirtieth of a step."""
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in VARIABLES):
        return
    _call("mallopt", M_MMAP_THRESHOLD, LARGEST_KEPT)
    _call("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)
    _call("mallopt", M_TOP_PAD, KEPT_BYTES)  # or a thread's heap is given back when a block has had it for itself


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
