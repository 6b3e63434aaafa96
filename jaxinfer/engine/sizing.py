"""How much context there is room for: computed once, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

CPU_SHARE = 0.1  # of the machine's memory goes to the cache on CPU, at most
DEVICE_SHARE = 0.9  # of an accelerator's memory is used in all
RESERVE = 0.05  # of an accelerator's memory stays free of weights and cache, for what steps compute


@dataclass(frozen=True)
class Sizes:
    """num_pages counts the reserved page 0; max_model_len is in tokens, prompt and output together."""

    max_model_len: int
    num_pages: int
    page_size: int
    bytes: int


def page_size(given: Mapping[str, Any], place: jax.Device | Mesh) -> int:
    """What is asked for; else small pages, of which sequences share more, but on TPU, where the kernel keeps the page
    table in a small memory of its own."""
    device = place.devices.flat[0] if isinstance(place, Mesh) else place
    return int(given["page_size"] or (64 if device.platform == "tpu" else 16))


def size_cache(
    *,
    bytes_per_token: int,
    page_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    max_context: int,
    available: int,
) -> Sizes:
    """The pool that fits in `available` bytes, at most what `max_num_seqs` sequences of full length need.

    `max_model_len=None` takes the model's `max_context`, or as much of it as one sequence has room for.
    Raises ValueError with the numbers and the remedy when what is asked for does not fit.
    """
    if max_model_len is not None and max_model_len > max_context:
        raise ValueError(f"max_model_len is {max_model_len}: config.json defines the model for at most {max_context}")
    page_bytes = bytes_per_token * page_size
    most = available // page_bytes - 1  # page 0 is reserved
    length = max_context if max_model_len is None else max_model_len
    needed = -(-length // page_size)
    if needed > most:
        if max_model_len is not None or most < 1:
            lower = f"lower max_model_len to at most {most * page_size} or " if most >= 1 else ""
            raise ValueError(
                f"max_model_len {length} needs {(needed + 1) * page_bytes:,} bytes of KV cache, and there are "
                f"{available:,}: {lower}raise kv_cache_memory or take a device with more memory"
            )
        length = most * page_size
        needed = most
    pages = min(most, needed * max_num_seqs) + 1
    return Sizes(length, pages, page_size, pages * page_bytes)


def device_bytes(tree: Any) -> int:
    """Bytes that abstract arrays take of each device."""

    def one(array: Any) -> int:
        shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * int(array.dtype.itemsize)

    return sum(map(one, jax.tree.leaves(tree)))
