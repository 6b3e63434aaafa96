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
PAGE_TABLE, TPU_PAGE_TABLE = 2**24, 2**18  # bytes, at most
SNAPSHOT_SHARE = 0.25  # of the cache, beyond what the longest sequence needs, goes to states for others at most
RESERVE = 0.05  # of an accelerator's memory stays free of weights and cache, for what steps compute


@dataclass(frozen=True)
class Sizes:
    """Of the cache.

    max_model_len: in tokens, prompt and output together.
    num_pages: the reserved page 0 among them; the first pool's of several.
    page_size: tokens a page.
    bytes: on each device.
    snapshots: states that are kept for sequences that begin alike, beside those of sequences that run.
    """

    max_model_len: int
    num_pages: int
    page_size: int
    bytes: int
    snapshots: int = 0


def page_size(
    wanted: int | None, placement: jax.Device | Mesh, max_num_seqs: int, max_model_len: int, chunk: int = 0
) -> int:
    """Tokens a page. Small pages are shared by more sequences. But the table of all rows' pages goes to the device with
    each call, and the TPU's kernel keeps it in a small memory of its own: they are as large as that needs, as far as
    they divide `chunk`, if there is one. Raises ValueError where that, or `wanted`, is too little on TPU."""
    on_tpu = devices_of(placement)[0].platform == "tpu"
    if wanted is not None and not on_tpu:
        return wanted
    most = TPU_PAGE_TABLE if on_tpu else PAGE_TABLE

    def too_large(size: int) -> bool:
        return 4 * max_num_seqs * -(-max_model_len // size) > most

    fitting = wanted or math.gcd(64 if on_tpu else 16, chunk)
    while too_large(fitting) and chunk % (2 * fitting) == 0:
        fitting *= 2
    if on_tpu and (too_large(fitting) or wanted not in (None, fitting)):
        needed = (
            f"more, which can't divide {chunk}, the model's chunk of attention"
            if too_large(fitting)
            else f"at least {fitting}"
        )
        raise ValueError(
            f"page_size is {wanted or fitting}: on TPU, {max_num_seqs} sequences of up to {max_model_len} tokens need "
            f"{needed}; or lower max_num_seqs or max_model_len"
        )
    return fitting


def default_length(layout: CacheLayout, placement: jax.Device | Mesh, max_num_seqs: int, max_context: int) -> int:
    """Tokens of the longest sequences, if there is memory for them, where nobody says how many: as many as the model is
    defined for, on TPU in tables of pages that divide its chunk of attention."""
    if not layout.chunk or devices_of(placement)[0].platform != "tpu":
        return max_context
    largest = layout.chunk & -layout.chunk  # power of 2
    return min(max_context, TPU_PAGE_TABLE // (4 * max_num_seqs) * largest)


def choose_sizes(
    layout: CacheLayout,
    placement: jax.Device | Mesh,
    wanted: int | None,
    *,
    max_num_seqs: int,
    max_model_len: int | None,
    max_context: int,
    prefix_caching: bool = True,
    **more: int,
) -> Sizes:
    """See `size_cache`, with pages that suit: where nobody says how long sequences are, those that there is room for.
    wanted: as in `page_size`."""

    def sized(length: int) -> Sizes:
        return size_cache(
            layout,
            page_size=page_size(wanted, placement, max_num_seqs, length, layout.chunk),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_context=max_context if max_model_len else length,
            prefix_caching=prefix_caching,
            **more,
        )

    length = max_model_len or default_length(layout, placement, max_num_seqs, max_context)
    sizes = sized(length)
    return sized(sizes.max_model_len) if sizes.max_model_len < length else sizes


def most_snapshots(max_num_seqs: int) -> int:
    """States that are kept for others: those at the end of a prompt and of its answer for each row, and for some more
    where there are few rows."""
    return max(64, 2 * max_num_seqs)


def size_cache(
    layout: CacheLayout,
    *,
    page_size: int,
    reach: int,
    max_num_seqs: int,
    max_model_len: int | None,
    max_context: int,
    available: int,
    prefix_caching: bool = True,
) -> Sizes:
    """The cache that fits in `available` bytes, at most what `max_num_seqs` sequences of full length need. reach: as in
    CacheLayout. prefix_caching: there is room for snapshots.

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
    beyond = available - layout.least(length, page_size, reach, max_num_seqs)
    snapshots = 0
    if layout.slot_bytes and prefix_caching:
        snapshots = min(int(beyond * SNAPSHOT_SHARE) // layout.slot_bytes, most_snapshots(max_num_seqs))

    def nbytes(pages: int) -> int:
        return layout.nbytes(pages + 1, page_size, reach, length, max_num_seqs + snapshots)

    needed = layout.needed(length, page_size, reach)[:1]
    pages = _most(lambda n: nbytes(n) <= available, sum(needed) * max_num_seqs)
    return Sizes(length, pages + 1, page_size, nbytes(pages), snapshots)


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
