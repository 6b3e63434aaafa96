"""How much context there is room for: computed once, before anything is allocated."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinfer.attention import CacheLayout
from jaxinfer.sharding import devices_of

CPU_SHARE = 0.1  # of the machine's memory goes to the cache on CPU, at most
PAGE_TABLE = 2**18  # bytes, at most, on TPU
RESERVE = 0.05  # of an accelerator's memory stays free of weights and cache, for what steps compute


@dataclass(frozen=True)
class Sizes:
    """Of the cache.

    max_model_len: in tokens, prompt and output together.
    num_pages: the reserved page 0 among them; the first pool's of several.
    page_size: tokens a page.
    bytes: on each device.
    """

    max_model_len: int
    num_pages: int
    page_size: int
    bytes: int


def page_size(wanted: int | None, placement: jax.Device | Mesh, max_num_seqs: int, max_model_len: int) -> int:
    """Tokens a page. Small pages are shared by more sequences. But the TPU's kernel keeps the page table of all rows in
    a small memory of its own, so there they are as large as that needs. Raises ValueError if `wanted` is too small."""
    if devices_of(placement)[0].platform != "tpu":
        return wanted or 16
    fitting = 64 if wanted is None else 1
    while 4 * max_num_seqs * -(-max_model_len // fitting) > PAGE_TABLE:
        fitting *= 2
    if wanted is not None and wanted < fitting:
        raise ValueError(
            f"page_size is {wanted}: on TPU, {max_num_seqs} sequences of up to {max_model_len} tokens need at least "
            f"{fitting}; or lower max_num_seqs or max_model_len"
        )
    return wanted or fitting


def size_cache(
    layout: CacheLayout,
    *,
    page_size: int,
    reach: int,
    max_num_seqs: int,
    max_model_len: int | None,
    max_context: int,
    available: int,
) -> Sizes:
    """The cache that fits in `available` bytes, at most what `max_num_seqs` sequences of full length need. reach: as in
    CacheLayout.

    `max_model_len=None` takes the model's `max_context`, or as much of it as one sequence has room for.
    Raises ValueError with the numbers and the remedy when what is asked for does not fit.
    """
    if max_model_len is not None and max_model_len > max_context:
        raise ValueError(f"max_model_len is {max_model_len}: config.json defines the model for at most {max_context}")
    for group in layout.groups:
        if group.chunk is not None and group.chunk % page_size:
            raise ValueError(f"page_size is {page_size}: it must divide {group.chunk}, the model's chunk of attention")
    length = max_context if max_model_len is None else max_model_len
    if (least := layout.least(length, page_size, reach, max_num_seqs)) > available:
        fitting = longest(layout, page_size, reach, max_num_seqs, length, available)
        if max_model_len is not None or not fitting:
            lower = f"lower max_model_len to at most {fitting} or " if fitting else ""
            raise ValueError(
                f"max_model_len {length} needs {least:,} bytes of KV cache, and there are "
                f"{available:,}: {lower}raise kv_cache_memory or take a device with more memory"
            )
        length = fitting

    def nbytes(pages: int) -> int:
        return layout.nbytes(pages + 1, page_size, reach, length, max_num_seqs)

    needed = layout.needed(length, page_size, reach)[:1]
    pages = _most(lambda n: nbytes(n) <= available, sum(needed) * max_num_seqs)
    return Sizes(length, pages + 1, page_size, nbytes(pages))


def longest(layout: CacheLayout, page_size: int, reach: int, rows: int, most: int, available: int) -> int:
    """Tokens, in whole pages and fewer than `most`, of the longest sequence that can run alone; 0 if none can."""
    pages = -(-most // page_size) - 1
    return page_size * _most(lambda n: layout.least(n * page_size, page_size, reach, rows) <= available, pages)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, of those that do up to some point."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))


def check_cache_memory(wanted: int | None, memory: int) -> None:
    """Raises ValueError if the cache is to have more bytes than a device has, of which weights take some, too."""
    if wanted is not None and wanted > memory:
        raise ValueError(
            f"kv_cache_memory is {wanted:,}: a device here has {memory:,} bytes; lower it, or leave it out"
        )


def device_bytes(tree: Any) -> int:
    """Bytes that abstract arrays take of each device."""

    def nbytes(array: Any) -> int:
        shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * int(array.dtype.itemsize)

    return sum(map(nbytes, jax.tree.leaves(tree)))
