"""Attention on TPUs that reads pages in place: a kernel in Pallas, for decoding, chunks and drafts in any mixture.

A token's keys and values of all heads are one row, each head's key followed by its value, which is cut into columns
of 128 lanes: no head size is padded by itself, and a column of a page is whole tiles, one after the other, whatever the
dtype. A head's key is then some lanes of one or more columns: queries are laid into as many, with zeros beside them,
and of what weights make of them only the value's lanes are kept. So nothing is cut out of a row or shifted.

The stream of queries is cut into blocks, and work is a list of pairs, (block, row that has tokens in it), over blocks
of keys: one grid step each, with an online softmax in float32 (Milakov and Gimelshein, arXiv:1805.02867; the list is as
in grouped products, Gale et al., arXiv:2211.15841). Keys are brought by copies of the kernel's own, a page each, into
two buffers: the next block's, also of the next pair, are on their way while one is worked on. Only pages that some
query sees are read.

It could not be run on a TPU for this project yet: checked is what it computes, in JAX's interpreter of TPUs, which
finds races and gives NaN for memory that nobody wrote, and that it compiles for each generation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.tpu import LANES
from jaxinfer.attention.xla import NEGATIVE, capped
from jaxinfer.cache import QuantizedRowPages, RowPages
from jaxinfer.quantization.activations import quantize_last

KEYS = 512  # of a block, where there is room for them
KEY_BYTES = 4 * 2**20  # of two blocks of keys and values in fast memory, of which v5e gives 16 MiB
SCALED_PAGES = 8  # most of a block, where each brings some lanes of scales
QUERY_BYTES = 6 * 2**20  # of a block of queries, what comes of them, and sums
QUERIES = 128  # most tokens of a block
LEAST_MEMORY = 16 * 2**20  # bytes of fast memory that a kernel may use; more where pages are large


Pages = RowPages | QuantizedRowPages


class Window(NamedTuple):
    """Columns of a token's row in which a key or a value is.

    first, last: column (exclusive).
    offset: of the key or value, in lanes.
    """

    first: int
    last: int
    offset: int

    @property
    def width(self) -> int:
        """In lanes."""
        return (self.last - self.first) * LANES

    @classmethod
    def of(cls, index: int, head_dim: int) -> Window:
        """Of the index-th key or value of a row."""
        first, offset = divmod(index * head_dim, LANES)
        return cls(first, first + -(-(offset + head_dim) // LANES), offset)


def attend_rows_in_place(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Pages,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, Pages]:
    """See `attend`; padding tokens and rows that have stopped give zeros. slopes: f32[H], what a score of each head
    loses by token of distance (ALiBi, Press et al., arXiv:2108.12409)."""
    tokens, heads, _ = q.shape
    cache = write_rows(k, v, cache, batch) if spec.writes else cache
    index = jnp.arange(tokens, dtype=jnp.int32)
    decoding, count = batch.distribution[0], batch.kv_lens.shape[0]
    call = functools.partial(_attend, cache=cache, batch=batch, spec=spec, kv_heads=k.shape[1])
    own = (jnp.zeros(heads, jnp.float32) if x is None else x.astype(jnp.float32) for x in (sinks, slopes))
    call = functools.partial(call, scores=jnp.stack([*own]), sinks=sinks is not None, alibi=slopes is not None)
    rows = jnp.arange(count, dtype=jnp.int32)
    live = batch.kv_lens > 0
    out = call(q[:count], 1, live & (rows < decoding))
    if not batch.decode_only:
        size = _queries(tokens, heads, k.shape[1], q.shape[2], q.dtype.itemsize)
        decoded = jnp.pad(out, ((0, max(tokens - count, 0)), (0, 0), (0, 0)))[:tokens]
        out = jnp.where((index < decoding)[:, None, None], decoded, call(q, size, live & (rows >= decoding)))
    used = (index < batch.cu_q_lens[-1]) & live[batch.segment_ids]
    return jnp.where(used[:, None, None], out, jnp.zeros((), q.dtype)), cache


def write_rows(k: jax.Array, v: jax.Array, cache: Pages, batch: ForwardBatch) -> Pages:
    """The cache with this call's keys and values."""
    tokens, kv_heads, head_dim = k.shape
    _, width, page_size, _ = cache.kv.shape
    page, slot = batch.slot_mapping(page_size)
    pairs, scales = jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim), None
    if isinstance(cache, QuantizedRowPages):
        pairs, new = quantize_last(pairs, cache.kv.dtype)
        at = slot[:, None] + jnp.arange(2 * kv_heads, dtype=jnp.int32) * page_size
        scales = cache.scales.at[page[:, None], at // LANES, at % LANES].set(new[..., 0])
    rows = jnp.pad(pairs.reshape(tokens, -1), ((0, 0), (0, width * LANES - 2 * kv_heads * head_dim)))
    rows = rows.reshape(tokens, width, LANES).astype(cache.kv.dtype)
    # Column by column: of other shapes the compiler makes a copy of the pool in each call.
    at = (page[:, None] * width + jnp.arange(width, dtype=jnp.int32)) * page_size + slot[:, None]
    kv = cache.kv.reshape(-1, LANES).at[at].set(rows).reshape(cache.kv.shape)
    return RowPages(kv) if scales is None else QuantizedRowPages(kv, scales)


def _queries(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Tokens of a block: a power of 2."""
    width = max(Window.of(i, head_dim).width for i in range(2 * kv_heads))
    each = heads * (width * (4 * itemsize + 4) + 2 * LANES * 4)
    most = min(QUERIES, QUERY_BYTES // each, tokens)
    return max(1 << most.bit_length() - 1, 16) if most else 16


class Pairs(NamedTuple):
    """Work: rows, and blocks of queries that they have tokens in.

    row, block: i32[N] of each pair; beyond the last one, its.
    begin, end: i32[N], of the blocks of keys that the queries see; done: how many those of the pairs before have.
    size: i32[1], how many pairs there are.
    """

    row: jax.Array
    block: jax.Array
    begin: jax.Array
    end: jax.Array
    done: jax.Array
    size: jax.Array


def _pairs(batch: ForwardBatch, wanted: jax.Array, size: int, blocks: int, keys: int, window: int | None) -> Pairs:
    """Of the wanted rows. size: tokens of a block of queries; blocks: how many of them; keys: of a block."""
    starts, stops = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    first = starts // size
    counts = jnp.where(wanted & (stops > starts), (stops - 1) // size - first + 1, 0)
    ends = jnp.cumsum(counts)
    number, total = jnp.arange(min(blocks * size, blocks + counts.shape[0]), dtype=jnp.int32), ends[-1]
    here = jnp.maximum(jnp.minimum(number, total - 1), 0)
    row = jnp.minimum(jnp.sum(here[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), counts.shape[0] - 1)
    block = jnp.clip(first[row] + here - (ends - counts)[row], 0, blocks - 1)
    shift = (batch.kv_lens - stops)[row]
    lowest, highest = (
        jnp.maximum(starts[row], block * size) + shift,
        jnp.minimum(stops[row], (block + 1) * size) + shift,
    )
    begin = jnp.zeros_like(row) if window is None else jnp.maximum(lowest - window + 1, 0) // keys
    end = jnp.where(number < total, (highest + keys - 1) // keys, begin)
    steps = end - begin
    return Pairs(row, block, begin, end, jnp.cumsum(steps) - steps, total[None])


def _attend(
    q: jax.Array,
    size: int,
    wanted: jax.Array,
    *,
    cache: Pages,
    batch: ForwardBatch,
    spec: AttentionSpec,
    kv_heads: int,
    scores: jax.Array,
    sinks: bool,
    alibi: bool,
) -> jax.Array:
    """Of queries of the wanted rows, in blocks of `size` tokens; of others anything. scores: f32[2, H], sinks and
    slopes."""
    tokens, heads, head_dim = q.shape
    group, blocks = heads // kv_heads, -(-tokens // size)
    width, page_size = cache.kv.shape[1:3]
    keys_in, values_in = ([Window.of(2 * h + i, head_dim) for h in range(kv_heads)] for i in range(2))
    wide, high = (max(w.width for w in windows) for windows in (keys_in, values_in))
    # [blocks, K, tokens of a block for each query head, lanes]
    q = jnp.pad(q, ((0, blocks * size - tokens), (0, 0), (0, 0))).reshape(blocks, size, kv_heads, group, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(blocks, kv_heads, group * size, head_dim)
    q = _by_head(q, [w.offset for w in keys_in], lambda x, at: _padded(x, at, wide - at - head_dim))

    room = KEY_BYTES // (2 * width * LANES * cache.kv.dtype.itemsize)
    in_block = max(min(KEYS, room, batch.pages.shape[1] * page_size) // page_size, 1)
    in_block = min(in_block, SCALED_PAGES) if isinstance(cache, QuantizedRowPages) else in_block
    pairs = _pairs(batch, wanted, size, blocks, in_block * page_size, spec.window)
    rows = group * size
    scratch = [pltpu.VMEM((2, width, in_block * page_size, LANES), cache.kv.dtype)]
    if isinstance(cache, QuantizedRowPages):
        scratch.append(pltpu.VMEM((2, in_block, *cache.scales.shape[1:]), cache.scales.dtype))

    # Twice what the grid brings, sums, of which two have a lane each that takes a tile, and what the compiler adds.
    each = 2 * (wide + high) * q.dtype.itemsize + (high + 2 * LANES) * 4
    held = kv_heads * -(-rows // 16) * 16 * each + sum(math.prod(s.shape) * s.dtype.itemsize for s in scratch)

    def of_block(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, kv_heads, rows, lanes), lambda p, row, block, *_: (block[p], 0, 0, 0))

    body = functools.partial(
        _kernel,
        spec=spec,
        size=size,
        windows=(keys_in, values_in),
        sinks=sinks,
        alibi=alibi,
    )
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs) + 4,
            grid=(pairs.row.shape[0],),
            in_specs=[of_block(wide), *(pl.BlockSpec(memory_space=pl.ANY) for _ in cache)],
            out_specs=of_block(high),
            scratch_shapes=[
                *scratch,
                *(pltpu.VMEM((kv_heads, rows, lanes), jnp.float32) for lanes in (1, 1, high)),
                pltpu.SemaphoreType.DMA((2, len(cache))),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((blocks, kv_heads, rows, high), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=max(LEAST_MEMORY, held + held // 2)
        ),
        name="ragged_paged_attention",
    )(*pairs, batch.cu_q_lens, batch.kv_lens, batch.pages, scores, q, *cache)
    out = _by_head(out, [w.offset for w in values_in], lambda x, at: x[..., at : at + head_dim])
    out = out.reshape(blocks, kv_heads, group, size, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(blocks * size, heads, head_dim)[:tokens]


def _by_head(x: jax.Array, offsets: list[int], change: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    """Of `[blocks, K, ...]` each head changed by its offset, and all at once where they have the same."""
    if len(set(offsets)) == 1:
        return change(x, offsets[0])
    return jnp.stack([change(x[:, head], offset) for head, offset in enumerate(offsets)], axis=1)


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (before, after)))


def _kernel(
    *refs: Any,
    spec: AttentionSpec,
    size: int,
    windows: tuple[list[Window], list[Window]],
    sinks: bool,
    alibi: bool,
) -> None:
    """refs: Pairs, cu_q_lens, kv_lens, pages, scores; q; pools; out; buffers, the largest score, the sum of weights and
    that of values `[K, group * size, ...]`, semaphores."""
    pairs, (starts, lengths, table, of_heads, q, *rest) = Pairs(*refs[:6]), refs[6:]
    count = refs[-1].shape[1]
    pools, out, buffers = rest[:count], rest[count], rest[count + 1 : 2 * count + 1]
    top, total, acc, semaphores = rest[2 * count + 1 :]
    buffer, *scales = buffers
    kv_heads, rows = q.shape[1:3]
    page_size, keys = pools[0].shape[2], buffer.shape[2]
    in_block, group = keys // page_size, rows // size
    p, pairs_there = pl.program_id(0), pairs.size[0]

    def seen_by(pair: jax.Array) -> tuple[jax.Array, ...]:
        """The pair's first and last token (exclusive), what makes positions of them, and the first and last position
        (exclusive) that they see."""
        row, block = pairs.row[pair], pairs.block[pair]
        first = jnp.maximum(starts[row], block * size)
        last = jnp.minimum(starts[row + 1], (block + 1) * size)
        shift = lengths[row] - starts[row + 1]
        lowest = jnp.int32(0) if spec.window is None else jnp.maximum(first + shift - spec.window + 1, 0)
        return first, last, shift, lowest, last + shift

    def copies(pair: jax.Array, step: jax.Array, slot: jax.Array, begins: bool) -> None:
        """Begins to bring the pages of a block of keys that are seen, or waits for them."""
        *_, lowest, highest = seen_by(pair)
        page = step * in_block
        low = jnp.maximum(lowest // page_size - page, 0)
        high = jnp.minimum(pl.cdiv(highest, page_size) - page, in_block)

        def one(i: jax.Array, _: None) -> None:
            number = table[pairs.row[pair], page + i]
            own = pl.ds(pl.multiple_of(i * page_size, page_size), page_size)
            places = buffer.at[slot, :, own], *(b.at[slot, i] for b in scales)
            for n, (pool, place) in enumerate(zip(pools, places, strict=True)):
                copy = pltpu.make_async_copy(pool.at[number], place, semaphores.at[slot, n])
                if begins:
                    copy.start()
                else:
                    copy.wait()

        lax.fori_loop(low, high, one, None)

    @pl.when((p == 0) & (pairs_there > 0))
    def first_keys() -> None:
        copies(p, pairs.begin[p], jnp.int32(0), True)

    block = pairs.block[p]
    is_first = (p == 0) | (pairs.block[jnp.maximum(p - 1, 0)] != block)
    is_last = (p == pairs_there - 1) | (pairs.block[jnp.minimum(p + 1, pl.num_programs(0) - 1)] != block)

    @pl.when(is_first & (p < pairs_there))
    def cleared() -> None:
        top[...] = jnp.full(top.shape, NEGATIVE, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    first, last, shift, lowest, highest = seen_by(p)
    begin, end, done = pairs.begin[p], pairs.end[p], pairs.done[p]
    line = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    token = block * size + (line & (size - 1))
    own = (token >= first) & (token < last)

    def of_lines(which: int, head: int) -> jax.Array:
        """A number of each query head, `[rows, 1]`."""
        column = jnp.full((rows, 1), of_heads[which, head * group])
        for g in range(1, group):
            column = jnp.where(line >= g * size, of_heads[which, head * group + g], column)
        return column

    def body(step: jax.Array, _: None) -> None:
        slot = (done + step - begin) % 2

        @pl.when(step + 1 < end)
        def next_keys() -> None:
            copies(p, step + 1, 1 - slot, True)

        @pl.when((step + 1 == end) & (p + 1 < pairs_there))
        def next_pair() -> None:
            copies(p + 1, pairs.begin[p + 1], 1 - slot, True)

        copies(p, step, slot, False)
        position = step * keys
        if not jnp.issubdtype(buffer.dtype, jnp.integer):

            @pl.when((position < lowest) | (position + keys > highest))
            def zeros_elsewhere() -> None:
                # It is what nobody brought, or somebody else left: 0 * NaN would be NaN.
                here = position + lax.broadcasted_iota(jnp.int32, (1, keys, 1), 1)
                kept = buffer[slot]
                buffer[slot] = jnp.where((here >= lowest) & (here < highest), kept, jnp.zeros((), kept.dtype))

        distance = token + shift - (position + lax.broadcasted_iota(jnp.int32, (1, keys), 1))
        seen = own & (distance >= 0)
        if spec.window is not None:
            seen &= distance < spec.window
        for head, (key, value) in enumerate(zip(*windows, strict=True)):
            k, v = (
                jnp.concatenate([buffer[slot, c].astype(q.dtype) for c in range(window.first, window.last)], axis=1)
                for window in (key, value)
            )
            points = _dot(q[0, head, :, : key.width], k, 1) * spec.scale
            if scales:
                points *= _scales(scales[0], slot, 2 * head, page_size)
            points = capped(points, spec)
            if alibi:
                points -= of_lines(1, head) * distance.astype(jnp.float32)
            points = jnp.where(seen, points, NEGATIVE)
            before = top[head]
            after = jnp.maximum(before, jnp.max(points, axis=1, keepdims=True))
            keep = jnp.exp(before - after)
            weights = jnp.where(seen, jnp.exp(points - after), 0.0)
            top[head] = after
            total[head] = total[head] * keep + jnp.sum(weights, axis=1, keepdims=True)
            if scales:
                weights = jnp.where(seen, weights * _scales(scales[0], slot, 2 * head + 1, page_size), 0.0)
            more = acc[head, :, : value.width] * keep + _dot(weights.astype(v.dtype), v, 0)
            # A NaN of one row must not reach another row's queries.
            acc[head, :, : value.width] = jnp.where(own, more, acc[head, :, : value.width])

    lax.fori_loop(begin, end, body, None)

    @pl.when(is_last & (p < pairs_there))
    def written() -> None:
        for head in range(kv_heads):
            weight = total[head]
            if sinks:
                weight += jnp.exp(of_lines(0, head) - top[head])
            out[0, head] = (acc[head] / jnp.maximum(weight, 1e-30)).astype(out.dtype)


def _scales(buffer: Any, slot: jax.Array, index: int, page_size: int) -> jax.Array:
    """Of the index-th key or value of each token in a buffer, `[1, keys]`."""
    width, pieces = min(page_size, LANES), []
    for page in range(buffer.shape[1]):
        for begin in range(index * page_size, (index + 1) * page_size, width):
            line, lane = divmod(begin, LANES)
            pieces.append(buffer[slot, page, line : line + 1, lane : lane + width])
    return jnp.concatenate(pieces, axis=1)


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Accumulated in float32; of float32 at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
