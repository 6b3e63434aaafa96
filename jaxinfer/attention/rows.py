"""Attention within the rows of a flat stream, without a cache: each token sees its own row, in one direction or both.

Work is in proportion to the sum of the squares of the rows' lengths. On CPUs a native kernel does it. Plain XLA has a
loop for each size of tiles, 16, 32, 64 and so on, with a run-time trip count: a row is one tile of the smallest size
that it fits in, so many of them are done at a time, and only what is longer than the largest size has several tiles of
queries, each of which goes over its blocks of keys by an online softmax (Milakov and Gimelshein, arXiv:1805.02867). What a row
is cut into, and in which order things are summed, depends on its own length alone: so its result does, too.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.relative import Relative
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.xla import NEGATIVE, capped, dot, sees, with_sink

SMALLEST, LARGEST = 16, 512  # tiles
NARROW = 128  # the largest with a window that is no wider
STEP = 512  # tokens at a time


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
    return by_tiles(q, k, v, batch, spec, sinks, relative)


@attend_rows.defjvp
def _attend_rows_jvp(
    spec: AttentionSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Loops with a run-time trip count have no gradient."""

    def of(q: Any, k: Any, v: Any, batch: ForwardBatch, *rest: Any) -> tuple[Any, ...]:
        return q, k, v, *rest

    batch = primals[3]
    return jax.jvp(lambda q, k, v, *rest: as_one(q, k, v, batch, spec, *rest), of(*primals), of(*tangents))


def as_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    relative: Relative | None,
) -> jax.Array:
    """`attend_rows` as it is defined, by scores `[H, T, T]` of which other rows' don't count: for short streams, and for
    gradients."""
    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    position = token - batch.cu_q_lens[batch.segment_ids]
    queries, keys, values = (
        jnp.repeat(x.transpose(1, 0, 2), q.shape[1] // x.shape[1], axis=0) for x in (q, k, v)
    )
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
    seen = (batch.segment_ids[:, None] == batch.segment_ids[None, :]) & sees(
        position[:, None], position[None, :], spec
    )
    scores = jnp.where(seen & (token < batch.cu_q_lens[-1]), scores, NEGATIVE)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = with_sink(jnp.sum(weights, axis=-1), top, None if sinks is None else sinks[:, None])
    out = dot((weights / total[..., None]).astype(v.dtype), values, (2, 1))
    return out.transpose(1, 0, 2).astype(q.dtype)


def tile_sizes(tokens: int, spec: AttentionSpec) -> list[int]:
    """In a stream of so many tokens, from the smallest on."""
    largest = LARGEST if spec.window is None or spec.window > NARROW else NARROW
    sizes = itertools.takewhile(lambda size: size < min(tokens, largest), (SMALLEST << i for i in itertools.count()))
    smaller = list(sizes)
    return [*smaller, 2 * smaller[-1] if smaller else SMALLEST]


def by_tiles(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    relative: Relative | None,
) -> jax.Array:
    """`attend_rows` in plain XLA."""
    tokens, heads, head_dim = q.shape
    sizes = tile_sizes(tokens, spec)
    step = max(min(STEP, tokens), sizes[-1])
    starts, lengths = batch.cu_q_lens[:-1], jnp.diff(batch.cu_q_lens)
    rows = lengths.shape[0]
    # Tiles of one size follow each other in what comes out, and a row has less than twice its tokens there, or SMALLEST.
    # A step may write beyond the tiles of its size, where those of the next one will be.
    most = 2 * tokens + (SMALLEST - 2) * min(rows, tokens)
    out = jnp.zeros((most + step, heads, head_dim), q.dtype)
    places = jnp.zeros_like(lengths)  # of each row's first tile
    begin = jnp.zeros((), jnp.int32)
    smaller = 0
    for size in sizes:
        own = (lengths > smaller) if size == sizes[-1] else (lengths > smaller) & (lengths <= size)
        tiles = jnp.where(own, (lengths + size - 1) // size, 0)
        ends = jnp.cumsum(tiles, dtype=jnp.int32)
        places = jnp.where(own, begin + (ends - tiles) * size, places)
        several = tokens > size == sizes[-1]  # tiles a row, perhaps
        width = 1 if several else max(step // size, 1)

        def some(
            i: jax.Array,
            out: jax.Array,
            size: int = size,
            width: int = width,
            several: bool = several,
            begin: jax.Array = begin,
            tiles: jax.Array = tiles,
            ends: jax.Array = ends,
        ) -> jax.Array:
            index = i * width + jnp.arange(width, dtype=jnp.int32)
            row = jnp.minimum(jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), rows - 1)
            first = (index - (ends - tiles)[row])[0] if several else None
            done = _tile(q, k, v, starts[row], lengths[row], size, first, spec, sinks, relative)
            place = begin + i * width * size
            return lax.dynamic_update_slice_in_dim(out, done.reshape(-1, heads, head_dim), place, 0)

        out = lax.fori_loop(0, (ends[-1] + width - 1) // width, some, out)
        begin, smaller = begin + ends[-1] * size, size
    token = jnp.arange(tokens, dtype=jnp.int32)
    place = places[batch.segment_ids] + token - starts[batch.segment_ids]
    place = jnp.where(token < batch.cu_q_lens[-1], place, most + step)
    return out.at[place].get(mode="fill", fill_value=0)


def _tile(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    size: int,
    number: jax.Array | None,
    spec: AttentionSpec,
    sinks: jax.Array | None,
    relative: Relative | None,
) -> jax.Array:
    """One tile of queries of W rows: `[W, size, H, d]`. number: of which tile, where W is 1; None: rows have but one."""
    width, (heads, head_dim), kv_heads = starts.shape[0], q.shape[1:], k.shape[1]
    group = heads // kv_heads
    offset = jnp.arange(size, dtype=jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    first = zero if number is None else number * size

    def taken(x: jax.Array, first: jax.Array, grouped: int) -> jax.Array:
        """Tokens from `first` on of each row, `[W * K, G * size, d]`."""
        part = x.at[starts[:, None] + first + offset].get(mode="clip")
        part = part.reshape(width, size, kv_heads, grouped, head_dim).transpose(0, 2, 3, 1, 4)
        return part.reshape(width * kv_heads, grouped * size, head_dim)

    queries, position = taken(q, first, group), first + offset

    def body(block: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, total, acc = state
        begin = block * size
        there = begin + offset < lengths[:, None]  # [W, size]
        keys, values = taken(k, begin, 1), taken(v, begin, 1)
        values = jnp.where(jnp.repeat(there, kv_heads, axis=0)[..., None], values, jnp.zeros((), values.dtype))
        scores = dot(queries, keys, (2, 2)).reshape(width, heads, size, size)
        if relative is not None:
            scores = _with_relative(scores, queries, keys, begin - first, relative, spec)
        else:
            scores = capped(scores * spec.scale, spec)
        seen = sees(position[:, None], begin + offset, spec) & there[:, None, :]
        scores = jnp.where(seen[:, None], scores, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        keep = jnp.exp(top - new_top)
        # A query that has seen no key yet has new_top == NEGATIVE: its weights must not count.
        weights = jnp.where(scores > NEGATIVE, jnp.exp(scores - new_top[..., None]), 0)
        added = dot(weights.astype(values.dtype).reshape(width * kv_heads, -1, size), values, (2, 1))
        acc = acc * keep[..., None] + added.reshape(acc.shape)
        return new_top, total * keep + jnp.sum(weights, axis=-1), acc

    flat = width, heads, size
    state = jnp.full(flat, NEGATIVE, jnp.float32), jnp.zeros(flat, jnp.float32), jnp.zeros((*flat, head_dim), jnp.float32)
    if number is None:
        top, total, acc = body(zero, state)
    else:
        low, high = zero, lengths[0]
        if spec.causal:
            high = jnp.minimum(high, first + size)
        elif spec.window is not None:
            high = jnp.minimum(high, first + size + spec.window - 1)
        if spec.window is not None:
            low = jnp.maximum(first - spec.window + 1, 0)
        if spec.chunk is not None:
            low = jnp.maximum(low, first - first % spec.chunk)
        top, total, acc = lax.fori_loop(low // size, (high + size - 1) // size, body, state)
    total = with_sink(total, top, None if sinks is None else sinks[:, None])
    return (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)


def _with_relative(
    scores: jax.Array, queries: jax.Array, keys: jax.Array, shift: jax.Array, relative: Relative, spec: AttentionSpec
) -> jax.Array:
    """Scores `[W, H, size, size]` of products, with what distances give. shift: from the first query to the first key."""
    width, heads, size, _ = scores.shape

    def near(by_distance: jax.Array, sign: int = 1) -> jax.Array:
        """Of distances from shift - (size - 1) to shift + size; of the other sign from there on back."""
        middle = by_distance.shape[1] // 2
        others = jnp.arange(1 - size, size + 1, dtype=jnp.int32) * sign
        return by_distance[:, jnp.clip(middle + shift + others, 0, 2 * middle)]

    def products(x: jax.Array, near: jax.Array) -> jax.Array:
        """Of tokens `[W * K, G * size, d]`, each with what is given for distances: `[W, H, size, size]`."""
        x = x.reshape(width, -1, size, x.shape[-1]).transpose(1, 0, 2, 3)
        x = jnp.repeat(x, heads // x.shape[0], axis=0).reshape(heads, width * size, -1)
        return _diagonals(dot(x, near, (2, 2)).reshape(heads, width, size, -1).transpose(1, 0, 2, 3))

    if relative.keys is not None:
        scores += products(queries, near(relative.keys))
    if relative.queries is not None:
        scores += jnp.swapaxes(products(keys, near(relative.queries, -1)), 2, 3)
    scores = capped(scores * spec.scale, spec)
    if relative.bias is not None:
        bias = near(relative.bias)[:, None, :]
        scores += _diagonals(jnp.broadcast_to(bias, (heads, size, 2 * size)))
    return scores


def _diagonals(x: jax.Array) -> jax.Array:
    """`out[..., i, j] = x[..., i, size - 1 - i + j]` of `[..., size, 2 * size]`: each row by one further to the left."""
    *outer, size, wide = x.shape
    flat = x.reshape(*outer, size * wide)[..., size - 1 : -1]
    return flat.reshape(*outer, -1, wide - 1)[..., :size]
