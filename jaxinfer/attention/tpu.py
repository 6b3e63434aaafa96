"""Attention on TPUs, which reads pages in place: JAX's ragged paged attention kernel (Pallas).

One program for prefill, chunks and decoding in any mixture. It could not be run for this project yet: checked is
that it compiles for each generation of TPUs, and what it is called with, against its own reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.attention.batch import Batch
from jaxinfer.attention.blocks import block_sizes
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import PackedPages


def attend_packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: PackedPages,
    batch: Batch,
    spec: AttentionSpec,
    kernel: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, PackedPages]:
    """See `attend`; padding tokens give zeros. kernel: JAX's, or one that does the same."""
    tokens, heads, head_dim = q.shape
    pairs, width = cache.kv.shape[2:]
    kv_heads = k.shape[1]
    more = pairs // 2 - kv_heads  # heads of zeros, each with as many queries as the others
    padding = ((q, more * heads // kv_heads), (k, more), (v, more))
    q, k, v = (jnp.pad(x, ((0, 0), (0, count), (0, width - head_dim))) for x, count in padding)
    cache = _write(k, v, cache, batch)
    # The kernel fetches keys for every row that it is told of, and waits for them only if there are any. So rows that
    # have stopped look at one key, and a batch without rows has one.
    count = batch.rows[2]
    places = jnp.arange(batch.q_start.shape[0], dtype=jnp.int32)
    starts = jnp.where(count > 0, batch.q_start, jnp.minimum(places, 1))
    lengths = jnp.maximum(batch.kv_len, jnp.diff(starts))
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
            k_scale=scale,
            v_scale=scale,
            num_kv_pages_per_block=blocks.pages,
            num_queries_per_block=blocks.queries,
            vmem_limit_bytes=blocks.limit,
        )
    live = (jnp.arange(tokens, dtype=jnp.int32) < batch.q_start[-1]) & (batch.kv_len[batch.row] > 0)
    return jnp.where(live[:, None, None], out[:, :heads, :head_dim], jnp.zeros((), q.dtype)), cache


def _kernel() -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return ragged_paged_attention


def _write(k: jax.Array, v: jax.Array, cache: PackedPages, batch: Batch) -> PackedPages:
    page, slot = batch.places(cache.kv.shape[1])
    tokens, heads, width = k.shape
    pairs = jnp.stack([k, v], axis=2).reshape(tokens, 2 * heads, width)
    if cache.kv.dtype.itemsize == 1:  # beyond its range there is no infinity, only NaN
        largest = jnp.finfo(cache.kv.dtype).max.astype(pairs.dtype)
        pairs = jnp.clip(pairs, -largest, largest)
    return PackedPages(cache.kv.at[page, slot].set(pairs.astype(cache.kv.dtype)))
