"""Attention in plain XLA: runs everywhere, and is the oracle for every other implementation.

Decode rows and prefill rows share one online softmax (Milakov and Gimelshein, arXiv:1805.02867).
Both paths loop over blocks of keys with a run-time trip count, so that the width of the page table costs
nothing, and both do work in proportion to the keys that are there: decode flattens (row, block of keys) pairs
into one list that is worked off so many pairs at a time (as flash-decoding splits keys), so that one long row
among short ones does not make all of them long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import BITS, SCALE, HeadMajorPages, LayerCache, QuantizedPages, values_dtype
from jaxinfer.quantization.activations import quantize_last
from jaxinfer.sharding import KV, ROWS

KEY_BLOCK = 128  # keys a loop step; larger blocks fall out of the CPU's second-level cache
QUERY_TILE = 128  # most query tokens of one row that a prefill tile holds
DECODE_PAIRS = 32  # (row, block of keys) at a time beside prefill rows, where there may be few decoding ones
Pages = HeadMajorPages | QuantizedPages
P = TypeVar("P", bound=Pages)
NEGATIVE = -1e30  # masks a score; finite, so that a fully masked block gives zeros and not NaN


class XLAAttention(AttentionBackend):
    """Plain XLA. Pools of BITS are kept as integers.

    by_rows: each head of a token is written by itself.
    """

    name = "plain XLA"
    asked = frozenset({"auto", "xla"})
    partition_spec = PartitionSpec(ROWS, KV)
    by_rows: ClassVar[bool] = False

    def supports(self, case: AttentionCase) -> str | None:
        return None

    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> LayerCache:
        heads, width = self.kept_heads(case)
        shape = num_pages, heads, page_size, width
        pool = jax.ShapeDtypeStruct(shape, BITS.get(case.kept, case.kept))
        if case.kept.itemsize > 1:
            return HeadMajorPages(pool, pool)  # type: ignore[arg-type]
        scales = jax.ShapeDtypeStruct(shape[:3], SCALE)
        return QuantizedPages(pool, pool, scales, scales)  # type: ignore[arg-type]

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pools: LayerCache,
        batch: ForwardBatch,
        spec: AttentionSpec,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        head_dim, kept = q.shape[-1], cast(Pages, pools)
        if more := kept.k.shape[-1] - head_dim:
            q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (q, k, v))
        kept = write_split(k, v, kept, batch, spec, self.by_rows)
        out = self.read(q.reshape(q.shape[0], k.shape[1], -1, q.shape[2]), kept, batch, spec, sinks).reshape(q.shape)
        return out[..., :head_dim] if more else out, kept

    def read(
        self, q: jax.Array, pools: Pages, batch: ForwardBatch, spec: AttentionSpec, sinks: jax.Array | None
    ) -> jax.Array:
        """Of queries `[T, K, G, d]`, once this call's keys and values are in the pools."""
        return _attend(q, pools, batch, spec, sinks)


XLA = XLAAttention()


def _attend(q: jax.Array, cache: Pages, batch: ForwardBatch, spec: AttentionSpec, sinks: jax.Array | None) -> jax.Array:
    """q `[T, K, G, d]` -> `[T, K, G, d]`."""
    if batch.decode_only:
        return _decode(q, cache, batch, spec, sinks)
    decode_rows = min(q.shape[0], batch.kv_lens.shape[0])
    out = jnp.zeros((q.shape[0] + QUERY_TILE, *q.shape[1:]), q.dtype)
    decoded = _decode(q[:decode_rows], cache, batch, spec, sinks)
    out = lax.dynamic_update_slice_in_dim(out, decoded, 0, 0)
    return _prefill(q, out, cache, batch, spec, sinks)[: q.shape[0]]


def write_split(
    k: jax.Array, v: jax.Array, cache: P, batch: ForwardBatch, spec: AttentionSpec, by_rows: bool = False
) -> P:
    """The cache with this call's keys and values. by_rows: each head of a token by itself."""
    if not spec.writes:
        return cache
    page, slot = batch.slot_mapping(cache.k.shape[2])
    dtype = values_dtype(cache.k)
    new: Iterable[jax.Array] = (k.astype(dtype), v.astype(dtype))
    if cache[2:]:  # scales
        (k, k_scales), (v, v_scales) = (quantize_last(x, dtype) for x in (k, v))
        new = (k, v, k_scales[..., 0], v_scales[..., 0])

    def write(pool: jax.Array, part: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(part, pool.dtype)
        if not by_rows:
            return pool.at[page, :, slot].set(bits)
        _, heads, size, *width = pool.shape
        rows = (page[:, None] * heads + jnp.arange(heads, dtype=page.dtype)) * size + slot[:, None]
        return pool.reshape(-1, *width).at[rows].set(bits).reshape(pool.shape)

    return type(cache)(*(write(pool, part) for pool, part in zip(cache, new, strict=True)))


def sees(query: jax.Array, key: jax.Array, spec: AttentionSpec) -> jax.Array:
    """True where the query position sees the key position; both broadcast against each other."""
    seen = key <= query if spec.causal else jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
    if spec.window is not None:
        seen &= key > query - spec.window
        if not spec.causal:
            seen &= key < query + spec.window
    if spec.chunk is not None:
        seen &= key >= query - query % spec.chunk
    return seen


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Batched over the first axis, accumulated in float32 (at full precision when the operands are float32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(queries: jax.Array, keys: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Of queries `[B, Q, d]` and keys `[B, S, d]`, before masks."""
    return capped(dot(queries, keys, (2, 2)) * spec.scale, spec)


def capped(scores: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Below the soft cap, if there is one."""
    return scores if spec.soft_cap is None else jnp.tanh(scores / spec.soft_cap) * spec.soft_cap


def with_sink(total: jax.Array, top: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The sums of weights, which are relative to the largest score `top`, with those of the sinks, which have no value:
    so what is attended to is less."""
    return total if sinks is None else total + jnp.exp(sinks - top)


def _key_blocks(
    cache: Pages, batch: ForwardBatch, row: jax.Array, block: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of block `block[w]` of row `row[w]`: each `[W * K, KEY_BLOCK, d]` in this dtype.

    Values beyond the row's length are zeros: those slots hold what somebody else left, and 0 * NaN would be NaN.
    """
    _, kv_heads, page_size, _ = cache.k.shape
    width, table = row.shape[0], batch.pages.shape[1]
    size, pages_a_block = _block_sizes(page_size)
    index = block[:, None] * pages_a_block + jnp.arange(pages_a_block, dtype=jnp.int32)
    ids = batch.pages[row[:, None], jnp.minimum(index, table - 1)]

    def gather(pool: jax.Array) -> jax.Array:
        bits = jnp.swapaxes(pool.at[ids].get(mode="promise_in_bounds"), 1, 2).reshape(width * kv_heads, size, -1)
        return lax.bitcast_convert_type(bits, values_dtype(pool))

    keys, values = gather(cache.k), gather(cache.v)
    if all_scales := cache[2:]:
        keys, values = (
            x.astype(jnp.float32) * gather(scales) for x, scales in zip((keys, values), all_scales, strict=True)
        )
    keys, values = keys.astype(dtype), values.astype(dtype)

    position = block[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    own = jnp.repeat(position < batch.kv_lens[row][:, None], kv_heads, axis=0)[..., None]
    return keys, jnp.where(own, values, jnp.zeros((), values.dtype))


def _block_sizes(page_size: int) -> tuple[int, int]:
    """Keys a block and pages a block: whole pages, about KEY_BLOCK keys."""
    pages_a_block = max(1, KEY_BLOCK // page_size)
    return pages_a_block * page_size, pages_a_block


def _first_block(query: jax.Array, spec: AttentionSpec, size: int) -> jax.Array:
    """The first block of keys that a query at this position can see."""
    if spec.window is None:
        return jnp.zeros_like(query)
    return jnp.maximum(query - spec.window + 1, 0) // size


def _decode(q: jax.Array, cache: Pages, batch: ForwardBatch, spec: AttentionSpec, sinks: jax.Array | None) -> jax.Array:
    """One query token a row, q `[R, K, G, d]` -> `[R, K, G, d]`; rows from `batch.distribution[0]` on give zeros."""
    rows, kv_heads, group, head_dim = q.shape
    size, _ = _block_sizes(cache.k.shape[2])
    pairs = rows if batch.decode_only else min(rows, DECODE_PAIRS)
    index = jnp.arange(rows, dtype=jnp.int32)
    last = batch.kv_lens[:rows] - 1  # the query's own position
    first = _first_block(last, spec, size)
    blocks = jnp.where((index < batch.distribution[0]) & (last >= 0), last // size + 1 - first, 0)
    ends = jnp.cumsum(blocks)
    flat = q.reshape(rows, -1)
    heads = kv_heads * group

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = state
        item = i * pairs + jnp.arange(pairs, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(item[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), rows - 1)
        live = item < ends[-1]
        block = jnp.where(live, item - (ends - blocks)[row] + first[row], 0)
        keys, values = _key_blocks(cache, batch, row, block, q.dtype)
        queries = flat[row].reshape(pairs * kv_heads, group, head_dim)
        scores = _scores(queries, keys, spec)
        position = block[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        seen = sees(last[row][:, None], position, spec) & live[:, None]
        scores = jnp.where(jnp.repeat(seen, kv_heads, axis=0)[:, None, :], scores, NEGATIVE)
        item_top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - item_top[..., None])
        item_total = jnp.sum(weights, axis=-1).reshape(pairs, heads)
        item_out = dot(weights.astype(values.dtype), values, (2, 1)).reshape(pairs, heads, head_dim)
        item_top = item_top.reshape(pairs, heads)
        # Several items can belong to one row: combine them by a small product instead of a scatter.
        own = (row[None, :] == index[:, None]) & live[None, :]
        new_top = jnp.maximum(top, jnp.max(jnp.where(own[..., None], item_top[None], NEGATIVE), axis=1))
        keep = jnp.exp(top - new_top)
        weight = jnp.where(live[:, None], jnp.exp(item_top - new_top[row]), 0)
        # A NaN or infinity stays in its own row: in the product, 0 * NaN would give it to all rows.
        item_out = item_out * weight[..., None]
        finite = jnp.isfinite(item_out)
        item_total = jnp.where(jnp.all(finite, axis=-1), item_total * weight, jnp.nan)
        item_out = jnp.where(finite, item_out, 0).reshape(pairs, -1)
        total = total * keep + jnp.sum(jnp.where(own[..., None], item_total[None], 0), axis=1)
        added = jnp.dot(own.astype(jnp.float32), item_out, precision=lax.Precision.HIGHEST).reshape(out.shape)
        return new_top, total, out * keep[..., None] + added

    state = (
        jnp.full((rows, heads), NEGATIVE, jnp.float32),
        jnp.zeros((rows, heads), jnp.float32),
        jnp.zeros((rows, heads, head_dim), jnp.float32),
    )
    top, total, out = lax.fori_loop(0, (ends[-1] + pairs - 1) // pairs, body, state)
    total = with_sink(total, top, sinks)
    return (out / jnp.maximum(total, 1e-30)[..., None]).reshape(q.shape).astype(q.dtype)


def _prefill(
    q: jax.Array, out: jax.Array, cache: Pages, batch: ForwardBatch, spec: AttentionSpec, sinks: jax.Array | None
) -> jax.Array:
    """Rows of several query tokens: fills `out [T + QUERY_TILE, K, G, d]` tile by tile for rows from rows[0] on."""
    tokens, kv_heads, group, head_dim = q.shape
    size, _ = _block_sizes(cache.k.shape[2])
    tile = min(QUERY_TILE, tokens)
    q = jnp.concatenate([q, jnp.zeros((QUERY_TILE, *q.shape[1:]), q.dtype)])
    index = jnp.arange(batch.kv_lens.shape[0], dtype=jnp.int32)
    lengths = jnp.where((index >= batch.distribution[0]) & (batch.kv_lens > 0), jnp.diff(batch.cu_q_lens), 0)
    tiles = (lengths + tile - 1) // tile
    ends = jnp.cumsum(tiles)
    offset = jnp.arange(tile, dtype=jnp.int32)

    def one_tile(t: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.minimum(jnp.sum(t >= ends, dtype=jnp.int32), index.shape[0] - 1)
        skip = (t - (ends - tiles)[row]) * tile
        start = batch.cu_q_lens[row] + skip
        count = jnp.minimum(lengths[row] - skip, tile)
        base = batch.kv_lens[row] - lengths[row] + skip  # position of the tile's first token
        queries = lax.dynamic_slice_in_dim(q, start, tile).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        position = base + offset

        def body(block: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            top, total, acc = state
            keys, values = _key_blocks(cache, batch, row[None], block[None], q.dtype)
            scores = _scores(queries, keys, spec).reshape(kv_heads, group, tile, size)
            seen = sees(position[:, None], block * size + jnp.arange(size, dtype=jnp.int32), spec)
            scores = jnp.where(seen, scores, NEGATIVE).reshape(kv_heads, -1, size)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            keep = jnp.exp(top - new_top)
            # A row of the tile that has seen no key yet has new_top == NEGATIVE: its weights must not count.
            weights = jnp.where(scores > NEGATIVE, jnp.exp(scores - new_top[..., None]), 0)
            acc = acc * keep[..., None] + dot(weights.astype(values.dtype), values, (2, 1))
            return new_top, total * keep + jnp.sum(weights, axis=-1), acc

        flat = (kv_heads, group * tile)
        state = (jnp.full(flat, NEGATIVE, jnp.float32), jnp.zeros(flat, jnp.float32))
        stop = (base + count - 1) // size + 1
        start_block = _first_block(base, spec, size)
        top, total, acc = lax.fori_loop(start_block, stop, body, (*state, jnp.zeros((*flat, head_dim), jnp.float32)))
        of_tile = None if sinks is None else jnp.repeat(sinks.reshape(kv_heads, group), tile, axis=1)
        total = with_sink(total, top, of_tile)
        result = (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
        result = result.reshape(kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        # The tile may reach into the next row's tokens: leave those as they are.
        there = lax.dynamic_slice_in_dim(out, start, tile)
        result = jnp.where((offset < count)[:, None, None, None], result, there)
        return lax.dynamic_update_slice_in_dim(out, result, start, 0)

    return lax.fori_loop(0, ends[-1], one_tile, out)
