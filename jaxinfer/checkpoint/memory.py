"""Where weights lie on CPUs: in huge pages, if the system has them.

Decoding reads all weights once a token, and in pages of 4 KiB looking up where they are costs a good part of that.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import jax
import numpy as np

Host = np.ndarray[Any, np.dtype[Any]]

HUGE = 2**21  # bytes of a huge page on x86 and on most ARM systems
CHUNK = 32 * HUGE  # that is asked for at a time: nothing is resident before it is written
LARGE = 16 * HUGE  # numpy asks for huge pages for what is large, and all but its ends lies in them
ALIGNMENT = 64  # XLA:CPU takes an array of this alignment without copying it


class HugePages:
    """Puts arrays one after the other into huge pages, which live as long as an array in them."""

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)

    def moved(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Arrays with their parts on CPUs as `copied` gives them. `arrays` is empty then."""
        return {name: self._moved(arrays.pop(name)) for name in list(arrays)}

    def _moved(self, array: jax.Array) -> jax.Array:
        held = [shard.data for shard in array.addressable_shards]
        if any(part.device.platform != "cpu" for part in held):
            return array
        parts = [jax.device_put(self.copied(np.asarray(part)), part.device) for part in held]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    def copied(self, array: Host) -> Host:
        """A copy, or the array itself where that would change little."""
        if array.nbytes >= LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return array
        size = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._chunk.size:
            memory = mmap.mmap(-1, CHUNK + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            chunk = np.frombuffer(memory, np.uint8)
            self._chunk = chunk[-chunk.ctypes.data % HUGE :]
        copy = self._chunk[: array.nbytes].view(array.dtype).reshape(array.shape)
        self._chunk = self._chunk[size:]
        np.copyto(copy, array)
        return copy
