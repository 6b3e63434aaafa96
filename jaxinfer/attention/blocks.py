"""How many keys and queries the TPU's attention kernel takes at a time, for each generation of TPUs.

From the table of measurements that JAX ships with its kernel. JAX's own look-up asks the devices that are there, which
are not those that a program is compiled for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jaxinfer.sharding import tpu_generation

KEYS = 512  # of a block, two of which are in fast memory, where there is no measurement
QUERIES = 32  # likewise
FAST_MEMORY = 32 * 2**20  # bytes, of 64 MiB and more; the 16 that v5e gives by itself are just too few for one entry


class Blocks(NamedTuple):
    """What the kernel takes at a time.

    pages: of keys.
    queries: how many.
    limit: bytes of fast memory; None for what the compiler gives.
    """

    pages: int
    queries: int
    limit: int | None


def block_sizes(kind: str, q: jax.Array, kv: jax.Array, width: int, decode_only: bool) -> Blocks:
    """kind: of the device; q `[T, H, d]`, kv `[pages, page_size, 2K, d]`; width: pages of the longest sequence.

    From the nearest measurement: of these types, K and d (of what the kernel takes at once), then by H, page size,
    length of sequences, and T. Without one, KEYS and QUERIES: for v4, tpu7x, float32, and heads of more than 128.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import get_min_heads_per_blk
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.tuned_block_sizes import TUNED_BLOCK_SIZES

    tokens, heads, head_dim = q.shape
    _, page_size, pairs, _ = kv.shape
    measured = TUNED_BLOCK_SIZES.get(f"TPU v{tpu_generation(kind)}", {})
    if measured:
        heads, pairs = get_min_heads_per_blk(heads, pairs, q.dtype, kv.dtype)
    wanted = heads, page_size, width * page_size, tokens

    def fits(key: tuple[Any, ...]) -> bool:
        # Sequences of 1280 were measured too, with blocks that suit just those.
        same = (*key[:2], *key[3:5]) == (q.dtype.name, kv.dtype.name, pairs // 2, head_dim)
        return same and key[7].bit_count() == 1

    def distance(key: tuple[Any, ...]) -> list[float]:
        return [abs(math.log2(a / b)) for a, b in zip((key[2], key[5], key[7], key[6]), wanted, strict=True)]

    keys, queries, limit = KEYS, QUERIES, None
    nearest = min(filter(fits, measured), key=distance, default=None)
    if nearest is not None:
        pages, queries = measured[nearest]
        keys, limit = pages * nearest[5], FAST_MEMORY
        if heads > nearest[2]:  # a block should not be larger than what was measured
            queries = 1 << max(queries * nearest[2] // heads, 1).bit_length() - 1
    if decode_only:  # each row's keys meet all queries of a block, and only one of them is the row's
        queries = min(queries, QUERIES)
    return Blocks(min(max(keys // page_size, 1), width), min(queries, tokens), limit)
