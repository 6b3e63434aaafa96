"""Attention on TPUs, which reads pages in place: JAX's ragged paged attention kernel (Pallas).

One program for prefill, chunks and decoding in any mixture. It could not be run for this project yet: checked is
that it compiles for each generation of TPUs, and what it is called with, against its own reference.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.blocks import block_sizes
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import InterleavedPages, LayerCache
from jaxinfer.sharding import KV, ROWS

LANES = 128  # the last axis of an array comes in multiples of this
SUBLANES = 8
WORD = 4  # bytes of a lane


class TPUAttention(AttentionBackend):
    """Head sizes are padded to 128, and heads to what fills tiles. The kernel loads every n-th row of a block, which
    the compiler does for rows of 128 only: wider heads have a pool, and a call, for each word of them."""

    name = "JAX's ragged paged attention kernel"
    platform = "tpu"
    asked = frozenset({"auto", "pallas", "jax"})
    partition_spec = PartitionSpec(ROWS, None, KV)

    def supports(self, case: AttentionCase) -> str | None:
        if (problem := elsewhere(case)) is not None:
            return problem
        if case.head_dim > LANES and 2 * case.kept.itemsize > WORD:
            return f"the kernel for TPUs reads heads of more than {LANES} in bfloat16 and fp8, and not in {case.kept}"
        if case.sinks:
            return "JAX's and tokamax's kernels know no attention sinks, which the model has"
        return None

    def refusal(self, case: AttentionCase) -> str | None:
        if case.kept == case.dtype:
            return None
        if case.kept != jnp.float8_e4m3fn:
            return f"JAX's and tokamax's kernels read no cache in {case.kept}; take fp8, or leave `attention` out"
        heads = case.num_kv_heads // case.parts
        kept, unquantized = (math.prod(_pools(replace(case, kept=dtype))) for dtype in (case.kept, case.dtype))
        if kept * case.kept.itemsize < unquantized * case.dtype.itemsize:
            return None
        return (
            f"the kernel for TPUs keeps {kept} heads of it on each device for the {heads} that are there, which saves "
            "nothing; leave it out, or take less `tensor`"
        )

    def kept_heads(self, case: AttentionCase) -> tuple[int, int]:
        return math.prod(_pools(case)) * case.parts, -(-case.head_dim // LANES) * LANES

    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> LayerCache:
        count, heads = _pools(case)
        shape = num_pages, page_size, 2 * heads * case.parts, self.kept_heads(case)[1]
        return (InterleavedPages(jax.ShapeDtypeStruct(shape, case.kept)),) * count  # type: ignore[arg-type, return-value]

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pools: LayerCache, batch: ForwardBatch, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        return attend_pools(q, k, v, cast(tuple[InterleavedPages, ...], pools), batch, spec)


TPU = TPUAttention()


def elsewhere(case: AttentionCase) -> str | None:
    """Why a case is for no kernel for TPUs, or None."""
    if case.device.platform != "tpu":
        return f"it is for TPUs, and this is {case.device.platform}"
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel for TPUs is for bfloat16 and float32, and dtype is {case.dtype}"
    return None


def tile_rows(count: int) -> int:
    """What so many rows of a tile of WORDs take: it may have 1, 2, 4 or 8 of them."""
    return 1 << (count - 1).bit_length() if count < SUBLANES else -(-count // SUBLANES) * SUBLANES


def _pools(case: AttentionCase) -> tuple[int, int]:
    """How many pools a layer has on each device, and how many heads with padding are in each."""
    heads = case.num_kv_heads // case.parts
    if case.head_dim <= LANES:
        return 1, _padded_heads(heads, case.kept)
    in_word = max(WORD // (2 * case.kept.itemsize), 1)
    return -(-heads // in_word), in_word


def _padded_heads(heads: int, dtype: np.dtype[Any]) -> int:
    """The keys and values of a device have to fill whole tiles."""
    packing = WORD // dtype.itemsize
    return tile_rows(-(-2 * heads // packing)) * packing // 2


def attend_pools(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pools: tuple[InterleavedPages, ...],
    batch: ForwardBatch,
    spec: AttentionSpec,
    kernel: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, LayerCache]:
    """`attend_packed` for the heads of each pool."""
    queries, each = q.shape[1] // k.shape[1], pools[0].kv.shape[2] // 2
    results = []
    for i, pool in enumerate(pools):
        own, of_queries = slice(i * each, (i + 1) * each), slice(i * each * queries, (i + 1) * each * queries)
        results.append(attend_packed(q[:, of_queries], k[:, own], v[:, own], pool, batch, spec, kernel))
    outs, after = zip(*results, strict=True)
    return jnp.concatenate(outs, axis=1), after


def attend_packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: InterleavedPages,
    batch: ForwardBatch,
    spec: AttentionSpec,
    kernel: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, InterleavedPages]:
    """See `attend`; padding tokens give zeros. kernel: JAX's, or one that does the same."""
    tokens, heads, head_dim = q.shape
    pairs, width = cache.kv.shape[2:]
    kv_heads = k.shape[1]
    more = pairs // 2 - kv_heads  # heads of zeros, each with as many queries as the others
    padding = ((q, more * heads // kv_heads), (k, more), (v, more))
    q, k, v = (jnp.pad(x, ((0, 0), (0, count), (0, width - head_dim))) for x, count in padding)
    cache = _write(k, v, cache, batch) if spec.writes else cache
    # The kernel fetches keys for every row that it is told of, and waits for them only if there are any. So rows that
    # have stopped look at one key, and a batch without rows has one.
    count = batch.distribution[2]
    places = jnp.arange(batch.cu_q_lens.shape[0], dtype=jnp.int32)
    starts = jnp.where(count > 0, batch.cu_q_lens, jnp.minimum(places, 1))
    lengths = jnp.maximum(batch.kv_lens, jnp.diff(starts))
    blocks = block_sizes(batch.device_kind, q, cache.kv, batch.pages.shape[1], batch.decode_only)
    scale = None if cache.kv.dtype == q.dtype else 1.0  # what makes the kernel convert what it reads
    full = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with full:
        out = (kernel or _kernel())(
            q,
            cache.kv,
            lengths,
            batch.pages,
            starts,
            jnp.maximum(count, 1)[None],
            sm_scale=spec.scale,
            sliding_window=spec.window,
            soft_cap=spec.soft_cap,
            k_scale=scale,
            v_scale=scale,
            num_kv_pages_per_block=blocks.pages,
            num_queries_per_block=blocks.queries,
            vmem_limit_bytes=blocks.limit,
        )
    live = (jnp.arange(tokens, dtype=jnp.int32) < batch.cu_q_lens[-1]) & (batch.kv_lens[batch.segment_ids] > 0)
    return jnp.where(live[:, None, None], out[:, :heads, :head_dim], jnp.zeros((), q.dtype)), cache


def _kernel() -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return ragged_paged_attention


def _write(k: jax.Array, v: jax.Array, cache: InterleavedPages, batch: ForwardBatch) -> InterleavedPages:
    page, slot = batch.slot_mapping(cache.kv.shape[1])
    tokens, heads, width = k.shape
    pairs = jnp.stack([k, v], axis=2).reshape(tokens, 2 * heads, width)
    if cache.kv.dtype.itemsize == 1:  # beyond its range there is no infinity, only NaN
        largest = jnp.finfo(cache.kv.dtype).max.astype(pairs.dtype)
        pairs = jnp.clip(pairs, -largest, largest)
    return InterleavedPages(cache.kv.at[page, slot].set(pairs.astype(cache.kv.dtype)))
