"""Attention within the rows of a flat stream, without a cache: each token sees its own row, in one direction or both.

Work is in proportion to the sum of the squares of the rows' lengths. On CPUs a native kernel does it. Plain XLA cuts
rows into tiles of queries, of which it does some at a time in a loop with a run-time trip count; each goes over the
blocks of keys that it sees by an online softmax (Milakov and Gimelshein, arXiv:1805.02867). What a row is cut into, and
in which order things are summed, depends on its own length alone: so its result does, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.relative import Relative
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.xla import NEGATIVE, capped, dot, sees, with_sink
from jaxinfer.kernels.cpu import attention

# Queries of a tile, and keys of a block: the smaller ones are for rows that fit in one. By the TPU compiler's own
# estimates other rows take half the time with the larger.
TILES = (64, 128)
STEP = 512  # tokens of tiles that are done at a time


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,
    relative: Relative | None = None,
) -> jax.Array:
    """See `attend`. Rows are whole sequences: a token's position is its place in its row. Zeros for padding tokens."""
    tiles = functools.partial(by_tiles, spec=spec)
    operands = q, k, v, batch, sinks, relative
    products = relative is not None and (relative.keys is not None or relative.queries is not None)
    if products or spec.chunk is not None or not attention.attends_rows(q.dtype.name, q.shape[1] // k.shape[1]):
        return tiles(*operands)
    return lax.platform_dependent(*operands, cpu=functools.partial(_kernel, spec=spec), default=tiles)


def _kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    sinks: jax.Array | None,
    relative: Relative | None,
    spec: AttentionSpec,
) -> jax.Array:
    queries = q.reshape(*k.shape[:2], -1, q.shape[-1])
    how = spec.scale, spec.causal, spec.window, spec.soft_cap, sinks, None if relative is None else relative.bias
    return attention.attend_rows(queries, k, v, batch.cu_q_lens, *how).reshape(q.shape)


@attend_rows.defjvp
def _attend_rows_jvp(
    spec: AttentionSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Of the definition: loops with a run-time trip count have no gradient."""

    def call(q: Any, k: Any, v: Any, sinks: Any, relative: Any) -> jax.Array:
        return as_one(q, k, v, primals[3], sinks, relative, spec)

    return jax.jvp(call, primals[:3] + primals[4:], tangents[:3] + tangents[4:])


def as_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    sinks: jax.Array | None,
    relative: Relative | None,
    spec: AttentionSpec,
) -> jax.Array:
    """`attend_rows` as it is defined, by scores `[H, T, T]` of which other rows' don't count: for gradients."""
    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    position = token - batch.cu_q_lens[batch.segment_ids]
    queries, keys, values = (jnp.repeat(x.transpose(1, 0, 2), q.shape[1] // x.shape[1], axis=0) for x in (q, k, v))
    scores = dot(queries, keys, (2, 2))
    away = position[None, :] - position[:, None]

    def near(by_distance: jax.Array) -> jax.Array:
        middle = by_distance.shape[-1] // 2
        return jnp.take_along_axis(by_distance, jnp.clip(away + middle, 0, 2 * middle)[None], axis=2)

    if relative is not None and relative.keys is not None:
        scores += near(dot(queries, relative.keys, (2, 2)))
    if relative is not None and relative.queries is not None:
        scores += jnp.swapaxes(near(dot(keys, relative.queries, (2, 2))[..., ::-1]), 1, 2)
    scores = capped(scores * spec.scale, spec)
    if relative is not None and relative.bias is not None:
        scores += near(relative.bias[:, None, :])
    seen = (batch.segment_ids[:, None] == batch.segment_ids[None, :]) & sees(position[:, None], position[None, :], spec)
    live = token < batch.cu_q_lens[-1]
    scores = jnp.where(seen & live, scores, NEGATIVE)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = with_sink(jnp.sum(weights, axis=-1), top, None if sinks is None else sinks[:, None])
    out = dot((weights / total[..., None]).astype(v.dtype), values, (2, 1))
    return jnp.where(live[:, None, None], out.transpose(1, 0, 2).astype(q.dtype), jnp.zeros((), q.dtype))


def by_tiles(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    sinks: jax.Array | None,
    relative: Relative | None,
    spec: AttentionSpec,
) -> jax.Array:
    """`attend_rows` in plain XLA."""
    tokens = q.shape[0]
    lengths = jnp.diff(batch.cu_q_lens)
    # Heads as one axis: on TPUs an array with two small ones at its end is twice as large and more.
    out = jnp.zeros((tokens + TILES[-1], math.prod(q.shape[1:])), q.dtype)
    smaller = 0
    for size in TILES:
        if tokens > smaller:
            own = (lengths > smaller) & ((lengths <= size) | (size == TILES[-1]))
            tiles = jnp.where(own, (lengths + size - 1) // size, 0)
            made = functools.partial(_tiles, size, q, k, v, spec=spec, sinks=sinks, relative=relative)
            out = _of_size(size, tiles, out, batch, made)
        smaller = size
    return out[:tokens].reshape(q.shape)


def _of_size(
    size: int,
    tiles: jax.Array,
    out: jax.Array,
    batch: ForwardBatch,
    made: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`out [T + more, H * d]` with what rows give that have so many tiles of this size. made: tiles, see `_tiles`."""
    tokens = batch.tokens.shape[0]
    width = min(STEP // size, -(-tokens // size))
    starts, lengths = batch.cu_q_lens[:-1], jnp.diff(batch.cu_q_lens)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)

    def some(i: jax.Array, out: jax.Array) -> jax.Array:
        index = i * width + jnp.arange(width, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32), tiles.shape[0] - 1)
        first = (index - (ends - tiles)[row]) * size
        done = made(starts[row], lengths[row], first)
        counts = jnp.where(index < ends[-1], lengths[row] - first, 0)
        places = jnp.where(index < ends[-1], starts[row] + first, tokens)
        for tile, count, place in zip(done, counts, places, strict=True):
            # It may reach into the next row's tokens: those stay as they are.
            own = (jnp.arange(size, dtype=jnp.int32) < count)[:, None]
            tile = jnp.where(own, tile, lax.dynamic_slice_in_dim(out, place, size))
            out = lax.dynamic_update_slice_in_dim(out, tile, place, 0)
        return out

    return lax.fori_loop(0, (ends[-1] + width - 1) // width, some, out)


def _tiles(
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    relative: Relative | None,
) -> jax.Array:
    """Of W rows, so long and starting there, each the tile of queries from `first` on: `[W, size, H * d]`."""
    width, (heads, head_dim), kv_heads = starts.shape[0], q.shape[1:], k.shape[1]
    offset = jnp.arange(size, dtype=jnp.int32)

    def taken(x: jax.Array, first: jax.Array) -> jax.Array:
        """Tokens of each row from there on, `[W * K, G * size, d]`."""
        part = x.reshape(x.shape[0], -1).at[(starts + first)[:, None] + offset].get(mode="clip")
        part = part.reshape(width, size, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        return part.reshape(width * kv_heads, -1, head_dim)

    queries, position = taken(q, first), first[:, None] + offset
    low, high = jnp.zeros_like(first), lengths
    if spec.causal:
        high = jnp.minimum(high, first + size)
    elif spec.window is not None:
        high = jnp.minimum(high, first + size + spec.window - 1)
    if spec.window is not None:
        low = jnp.maximum(first - spec.window + 1, 0)
    if spec.chunk is not None:
        low = jnp.maximum(low, first - first % spec.chunk)
    low //= size
    blocks = (high + size - 1) // size - low

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, total, acc = state
        begin = (low + i) * size
        key_position = begin[:, None] + offset
        there = key_position < lengths[:, None]
        keys, values = taken(k, begin), taken(v, begin)
        # What isn't the row's doesn't count even if it is NaN.
        values = jnp.where(jnp.repeat(there, kv_heads, axis=0)[..., None], values, jnp.zeros((), values.dtype))
        scores = dot(queries, keys, (2, 2)).reshape(width, heads, size, size)
        if relative is not None:
            scores = _with_products(scores, queries, keys, begin - first, relative)
        scores = capped(scores * spec.scale, spec)
        if relative is not None and relative.bias is not None:
            bias = _near(size, relative.bias, begin - first)[:, :, None, :]
            scores += _diagonals(jnp.broadcast_to(bias, (*scores.shape[:3], 2 * size)))
        seen = sees(position[:, :, None], key_position[:, None, :], spec) & there[:, None, :]
        scores = jnp.where(seen[:, None], scores, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        keep = jnp.exp(top - new_top)
        # A query that has seen no key yet has new_top == NEGATIVE: its weights must not count.
        weights = jnp.where(scores > NEGATIVE, jnp.exp(scores - new_top[..., None]), 0)
        added = dot(weights.astype(values.dtype).reshape(width * kv_heads, -1, size), values, (2, 1))
        acc = acc * keep[..., None] + added.reshape(acc.shape)
        return new_top, total * keep + jnp.sum(weights, axis=-1), acc

    flat = width, heads, size
    zeros = jnp.zeros(flat, jnp.float32), jnp.zeros((*flat, head_dim), jnp.float32)
    top, total, acc = lax.fori_loop(0, jnp.max(blocks), body, (jnp.full(flat, NEGATIVE, jnp.float32), *zeros))
    total = with_sink(total, top, None if sinks is None else sinks[:, None])
    out = (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)
    return out.reshape(width, size, -1)


def _with_products(
    scores: jax.Array, queries: jax.Array, keys: jax.Array, shift: jax.Array, relative: Relative
) -> jax.Array:
    """Scores `[W, H, size, size]`, with the products that `relative` has. shift: i32[W], from the first query to the
    first key."""
    width, heads, size, _ = scores.shape

    def products(x: jax.Array, near: jax.Array) -> jax.Array:
        x = x.reshape(width, -1, size, x.shape[-1])
        x = jnp.repeat(x, heads // x.shape[1], axis=1).reshape(width * heads, size, -1)
        return _diagonals(dot(x, near.reshape(width * heads, 2 * size, -1), (2, 2))).reshape(scores.shape)

    if relative.keys is not None:
        scores += products(queries, _near(size, relative.keys, shift))
    if relative.queries is not None:
        scores += jnp.swapaxes(products(keys, _near(size, relative.queries, shift, -1)), 2, 3)
    return scores


def _near(size: int, by_distance: jax.Array, shift: jax.Array, sign: int = 1) -> jax.Array:
    """What `[H, 2D-1, ...]` has for distances from shift - (size - 1) to shift + size, `[W, H, 2 * size, ...]`; of the
    other sign from there on back."""
    furthest = by_distance.shape[1] // 2
    distance = shift[:, None] + sign * jnp.arange(1 - size, size + 1, dtype=jnp.int32)
    return jnp.swapaxes(by_distance[:, furthest + jnp.clip(distance, -furthest, furthest)], 0, 1)


def _diagonals(x: jax.Array) -> jax.Array:
    """`out[..., i, j] = x[..., i, size - 1 - i + j]` of `[..., size, 2 * size]`: each row by one further right."""
    *outer, size, wide = x.shape
    flat = x.reshape(*outer, size * wide)[..., size - 1 : -1]
    return flat.reshape(*outer, -1, wide - 1)[..., :size]
