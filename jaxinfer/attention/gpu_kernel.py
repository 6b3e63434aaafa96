"""Attention on NVIDIA GPUs that reads pages in place: a kernel in Pallas, which Triton compiles. Asked for by name.

One kernel for decoding, chunks and any mixture: a program takes a tile of queries of one row, with all query heads of
one key/value head, over that row's pages, with an online softmax. Where all rows decode, a tile is one token, and its
keys are split over several programs as in flash-decoding, so that few long rows fill a GPU too. Pages are looked up key
by key, so they can have any size.

JAX has a kernel of its own for decoding over pages. It reads whole pages, where one NaN that somebody left would spoil
the row, knows neither windows nor chunks, and splits the width of the table and not the length of the row. cuDNN's
paged attention is not public in JAX, and runs nowhere but on a GPU. This kernel could not be run on one for this
project yet either: checked is what it computes, interpreted on a CPU, and that it compiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.xla import NEGATIVE, capped, sees, write_split
from jaxinfer.cache import HeadMajorPages

KEYS = 64  # of a block; with values and queries they fit in 99 KB of shared memory, twice. Not tuned, for want of a GPU
QUERIES = 64  # rows of a tile's matrix: tokens times heads
LEAST_ROWS = 16  # of a matrix that tensor cores multiply
PROGRAMS = 256  # that fill a GPU


def attend_in_place(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: HeadMajorPages, batch: ForwardBatch, spec: AttentionSpec
) -> tuple[jax.Array, HeadMajorPages]:
    """See `attend`; padding tokens and rows that have stopped give zeros. Head sizes are powers of two."""
    cache = write_split(k, v, cache, batch, spec)
    tokens, heads, head_dim = q.shape
    kv_heads, page_size = cache.k.shape[1:3]
    group = pl.next_power_of_2(heads // kv_heads)
    splits, size = 1, max(QUERIES // group, 1)
    if batch.decode_only:
        size = 1
        most = batch.pages.shape[1] * page_size // (4 * KEYS)  # a program should have some blocks to do
        splits = max(min(PROGRAMS // (tokens * kv_heads), most), 1)
    tiles = _tiles(batch, size)
    out, weight = pl.pallas_call(
        functools.partial(_kernel, matrix=max(size * group, LEAST_ROWS), group=group, splits=splits, spec=spec),
        grid=(tiles.shape[0], kv_heads, splits),
        out_shape=(
            jax.ShapeDtypeStruct((splits, *q.shape), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, tokens, heads), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=4 if head_dim <= 128 else 8, num_stages=2),
    )(tiles, batch.pages, q, cache.k, cache.v)
    joined = out[0] if splits == 1 else jnp.sum(out * jax.nn.softmax(weight, axis=0)[..., None], axis=0)
    live = (jnp.arange(tokens, dtype=jnp.int32) < batch.cu_q_lens[-1]) & (batch.kv_lens[batch.segment_ids] > 0)
    return jnp.where(live[:, None, None], joined, 0).astype(q.dtype), cache


def _tiles(batch: ForwardBatch, size: int) -> jax.Array:
    """Up to `size` tokens of one row each: row, first token, how many (0: none), position of the first; i32[N, 4], as
    many as there can be."""
    rows, tokens = batch.kv_lens.shape[0], batch.segment_ids.shape[0]
    lengths = jnp.diff(batch.cu_q_lens)  # of a row that has stopped too: before position 0 there are no keys
    counts = (lengths + size - 1) // size
    ends = jnp.cumsum(counts)
    tile = jnp.arange(min(tokens, tokens // size + rows), dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), rows - 1)
    skip = (tile - (ends - counts)[row]) * size
    count = jnp.where(tile < ends[-1], jnp.minimum(lengths[row] - skip, size), 0)
    return jnp.stack([row, batch.cu_q_lens[row] + skip, count, (batch.kv_lens - lengths)[row] + skip], axis=1)


def _kernel(
    tiles: Any,
    pages: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    weight: Any,
    *,
    matrix: int,
    group: int,
    splits: int,
    spec: AttentionSpec,
) -> None:
    """out `[splits, T, H, d]`: the mean of the values that a query sees in its part of the keys; weight
    `[splits, T, H]`: the logarithm of the sum of their weights. All arguments are references to whole arrays."""
    tile, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row, start, count, base = (tiles[tile, i] for i in range(4))
    page_size, head_dim = k.shape[2:]
    keys = KEYS if head_dim <= 128 else KEYS // 2
    heads = q.shape[1] // k.shape[1]
    index = jnp.arange(matrix, dtype=jnp.int32)
    token, member = index // group, index % group
    column = jnp.arange(head_dim, dtype=jnp.int32)[None, :]
    real = (token < count) & (member < heads)
    where = start + token, head * heads + member
    whole = where[0][:, None], where[1][:, None], column
    queries = triton.load(q.at[whole], mask=real[:, None], other=0.0)

    first = jnp.int32(0) if spec.window is None else jnp.maximum(base - spec.window + 1, 0) // keys
    last = jnp.where(count > 0, (base + count + keys - 1) // keys, first)
    each = (last - first + splits - 1) // splits
    first += part * each

    def body(block: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, total, acc = state
        position = block * keys + jnp.arange(keys, dtype=jnp.int32)
        # Beyond the tile's last token is what somebody else left: 0 * NaN would be NaN.
        own = position < base + count
        page = triton.load(pages.at[row, position // page_size], mask=own, other=0)
        at = page[:, None], head, (position % page_size)[:, None], column
        scores = _dot(queries, triton.load(k.at[at], mask=own[:, None], other=0.0), 1) * spec.scale
        scores = capped(scores, spec)
        scores = jnp.where(sees((base + token)[:, None], position[None, :], spec), scores, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        keep = jnp.exp(top - new_top)
        # Of a block that a query sees nothing of, all counts, until it sees a key: `keep` is 0 then.
        weights = jnp.exp(scores - new_top[:, None])
        values = triton.load(v.at[at], mask=own[:, None], other=0.0)
        acc = acc * keep[:, None] + _dot(weights.astype(values.dtype), values, 0)
        return new_top, total * keep + jnp.sum(weights, axis=1), acc

    state = (
        jnp.full(matrix, NEGATIVE, jnp.float32),
        jnp.zeros(matrix, jnp.float32),
        jnp.zeros((matrix, head_dim), jnp.float32),
    )
    top, total, acc = lax.fori_loop(first, jnp.minimum(first + each, last), body, state)
    total = jnp.maximum(total, 1e-30)
    triton.store(out.at[part, *whole], (acc / total[:, None]).astype(out.dtype), mask=real[:, None])
    triton.store(weight.at[part, *where], top + jnp.log(total), mask=real)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Accumulated in float32; of float32 at full precision, where Triton would take tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
