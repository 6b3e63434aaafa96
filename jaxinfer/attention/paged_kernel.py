"""Attention on TPUs that reads pages in place: a kernel in Pallas, for decoding, chunks and drafts in any mixture.

A token's keys and values of all heads are one row, each head's key followed by its value, which is cut into columns
of 128 lanes: no head size is padded by itself, and a column of a page is whole tiles, one after the other, whatever the
dtype. A head's key is then some lanes of one or more columns: queries are laid into as many, with zeros beside them,
and of what weights make of them only the value's lanes are kept. So nothing is cut out of a row or shifted. Where rows
have one token each XLA lays queries out so; of blocks of several the kernel does, in fast memory, and takes and gives
heads as projections have them, one beside the other.

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
from jaxinfer.attention.pairs import Cut, Pairs, Span, pairs_of
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
        decoded, out = out, call(q, size, live & (rows >= decoding))
        decodes = (index < decoding)[: decoded.shape[0], None]
        out = lax.dynamic_update_slice(out, jnp.where(decodes, decoded, out[: decoded.shape[0]]), (0, 0))
    used = (index < batch.cu_q_lens[-1]) & live[batch.segment_ids]
    return jnp.where(used[:, None], out, jnp.zeros((), q.dtype)).reshape(q.shape), cache


def write_rows(k: jax.Array, v: jax.Array, cache: Pages, batch: ForwardBatch) -> Pages:
    """The cache with this call's keys and values."""
    tokens, kv_heads, head_dim = k.shape
    _, width, page_size, _ = cache.kv.shape
    page, slot = batch.slot_mapping(page_size)
    scales = None
    if isinstance(cache, QuantizedRowPages):
        (k, of_keys), (v, of_values) = (quantize_last(x, cache.kv.dtype) for x in (k, v))
        new = jnp.stack([of_keys[..., 0], of_values[..., 0]], axis=2).reshape(tokens, -1)
        at = slot[:, None] + jnp.arange(2 * kv_heads, dtype=jnp.int32) * page_size
        scales = cache.scales.at[page[:, None], at // LANES, at % LANES].set(new)
    rows = jnp.concatenate([k, v], axis=2).reshape(tokens, -1).astype(cache.kv.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, width * LANES - 2 * kv_heads * head_dim)))
    # Column by column: of other shapes the compiler makes a copy of the pool in each call.
    rows = rows.reshape(tokens, width, LANES).swapaxes(0, 1)
    at = (page * width + jnp.arange(width, dtype=jnp.int32)[:, None]) * page_size + slot
    kv = cache.kv.reshape(-1, LANES).at[at].set(rows).reshape(cache.kv.shape)
    return RowPages(kv) if scales is None else QuantizedRowPages(kv, scales)


def _queries(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Tokens of a block: a power of 2."""
    width = max(Window.of(i, head_dim).width for i in range(2 * kv_heads))
    each = heads * (width * (5 * itemsize + 4) + 2 * LANES * 4)
    most = min(QUERIES, QUERY_BYTES // each, tokens)
    return max(1 << most.bit_length() - 1, 16) if most else 16


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
    """Of queries of the wanted rows, in blocks of `size` tokens, `[T, H * d]`; of others anything. scores: f32[2, H],
    sinks and slopes."""
    tokens, heads, head_dim = q.shape
    group, blocks = heads // kv_heads, -(-tokens // size)
    width, page_size = cache.kv.shape[1:3]
    keys_in, values_in = ([Window.of(2 * h + i, head_dim) for h in range(kv_heads)] for i in range(2))
    wide, high = (max(w.width for w in windows) for windows in (keys_in, values_in))
    if size == 1:
        q = q.reshape(tokens, kv_heads, group, head_dim)
        q = _by_head(q, [w.offset for w in keys_in], lambda x, at: _padded(x, at, wide - at - head_dim))
    else:
        q = jnp.pad(q.reshape(tokens, -1), ((0, blocks * size - tokens), (0, 0)))

    room = KEY_BYTES // (2 * width * LANES * cache.kv.dtype.itemsize)
    in_block = max(min(KEYS, room, batch.pages.shape[1] * page_size) // page_size, 1)
    in_block = min(in_block, SCALED_PAGES) if isinstance(cache, QuantizedRowPages) else in_block
    keys, rows = in_block * page_size, group * size
    cut = Cut(
        size=size,
        steps=min(blocks * size, blocks + batch.kv_lens.shape[0]),
        keys=keys,
        page_size=page_size,
        page_bytes=sum(math.prod(pool.shape[1:]) * pool.dtype.itemsize for pool in cache),
        # Fewer than a tile of rows can't be loaded and stored.
        blanked=0 if jnp.issubdtype(cache.kv.dtype, jnp.integer) else (page_size if page_size >= 32 else keys),
        window=spec.window or 0,
    )
    pairs = pairs_of(batch.cu_q_lens, batch.kv_lens, wanted, blocks, cut)
    scratch = [pltpu.VMEM((2, width, keys, LANES), cache.kv.dtype)]
    if isinstance(cache, QuantizedRowPages):
        scratch.append(pltpu.VMEM((2, in_block, *cache.scales.shape[1:]), cache.scales.dtype))

    # Twice what the grid brings, queries laid out, sums, of which two have a lane each that takes a tile, and what the
    # compiler adds.
    each = (3 * wide + 2 * high) * q.dtype.itemsize + (high + 2 * LANES) * 4
    held = kv_heads * -(-rows // 16) * 16 * each + sum(math.prod(s.shape) * s.dtype.itemsize for s in scratch)

    def of_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda p, row, block, *_: (block[p], *(0 for _ in shape[1:])))

    shape = (tokens, kv_heads, group, high) if size == 1 else q.shape
    body = functools.partial(
        _kernel,
        spec=spec,
        cut=cut,
        windows=(keys_in, values_in),
        head_dim=head_dim,
        sinks=sinks,
        alibi=alibi,
    )
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs) + 4,
            grid=(cut.steps,),
            in_specs=[of_block(size, *q.shape[1:]), *(pl.BlockSpec(memory_space=pl.ANY) for _ in cache)],
            out_specs=of_block(size, *shape[1:]),
            scratch_shapes=[
                *scratch,
                *(pltpu.VMEM((kv_heads, rows, lanes), jnp.float32) for lanes in (1, 1, high)),
                *([] if size == 1 else [pltpu.VMEM((kv_heads, rows, wide), q.dtype)]),
                pltpu.SemaphoreType.DMA((2, len(cache))),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=max(LEAST_MEMORY, held + held // 2),
            disable_bounds_checks=True,  # of copies: pages are those of the table
        ),
        name="ragged_paged_attention",
        metadata=cut.metadata,
    )(*pairs, batch.cu_q_lens, batch.kv_lens, batch.pages, scores, q, *cache)
    if size == 1:
        out = _by_head(out, [w.offset for w in values_in], lambda x, at: x[..., at : at + head_dim])
        return out.reshape(tokens, -1)
    return out[:tokens]


def _by_head(x: jax.Array, offsets: list[int], change: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    """Of `[T, K, ...]` each head changed by its offset, and all at once where they have the same."""
    if len(set(offsets)) == 1:
        return change(x, offsets[0])
    return jnp.stack([change(x[:, head], offset) for head, offset in enumerate(offsets)], axis=1)


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (before, after)))


def _kernel(
    *refs: Any,
    spec: AttentionSpec,
    cut: Cut,
    windows: tuple[list[Window], list[Window]],
    head_dim: int,
    sinks: bool,
    alibi: bool,
) -> None:
    """refs: Pairs, cu_q_lens, kv_lens, pages, scores; q; pools; out; buffers, the largest score, the sum of weights and
    that of values `[K, group * size, ...]`, queries laid out as these are if q is not, semaphores."""
    pairs, (starts, lengths, table, of_heads, q, *rest) = Pairs(*refs[:6]), refs[6:]
    count = refs[-1].shape[1]
    pools, out, buffers = rest[:count], rest[count], rest[count + 1 : 2 * count + 1]
    top, total, acc, *laid, semaphores = rest[2 * count + 1 :]
    buffer, *scales = buffers
    rows = acc.shape[1]
    size, page_size, keys = cut.size, cut.page_size, cut.keys
    in_block, group = keys // page_size, rows // size
    p, pairs_there = pl.program_id(0), pairs.size[0]

    def seen_by(pair: jax.Array) -> Span:
        return Span.of(pairs.row[pair], pairs.block[pair], starts, lengths, cut)

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
        for queries in laid:
            for head, window in enumerate(windows[0]):
                for g in range(group):
                    own = _lanes(q, (head * group + g) * head_dim, head_dim)
                    queries[head, g * size : (g + 1) * size] = _widened(own, window.offset, queries.shape[2])

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

        ahead = step + 1 < end
        following = jnp.where(ahead, p, jnp.minimum(p + 1, pl.num_programs(0) - 1))

        @pl.when(ahead | (p + 1 < pairs_there))
        def next_keys() -> None:
            copies(following, jnp.where(ahead, step + 1, pairs.begin[following]), 1 - slot, True)

        copies(p, step, slot, False)
        position = step * keys
        if cut.blanked:
            # It is what nobody brought, or somebody else left: 0 * NaN would be NaN. That of a key is no matter.
            parts = keys // cut.blanked
            low = jnp.clip(pl.cdiv(lowest - position, cut.blanked), 0, parts)
            high = jnp.clip((highest - position) // cut.blanked, 0, parts)

            def blanked(i: jax.Array, _: None) -> None:
                begin = pl.multiple_of(jnp.where(i < low, i, high + i - low) * cut.blanked, cut.blanked)
                here = position + begin + lax.broadcasted_iota(jnp.int32, (cut.blanked, 1), 0)
                here = (here >= lowest) & (here < highest)
                for column in sorted({c for window in windows[1] for c in range(window.first, window.last)}):
                    kept = buffer[slot, column, pl.ds(begin, cut.blanked)]
                    buffer[slot, column, pl.ds(begin, cut.blanked)] = jnp.where(here, kept, jnp.zeros((), kept.dtype))

            lax.fori_loop(0, low + parts - high, blanked, None)

        distance = token + shift - (position + lax.broadcasted_iota(jnp.int32, (1, keys), 1))
        seen = own & (distance >= 0)
        if spec.window is not None:
            seen &= distance < spec.window
        for head, (key, value) in enumerate(zip(*windows, strict=True)):
            k, v = (
                jnp.concatenate([buffer[slot, c].astype(q.dtype) for c in range(window.first, window.last)], axis=1)
                for window in (key, value)
            )
            own_queries = laid[0][head, :, : key.width] if laid else q[0, head, :, : key.width]
            points = _dot(own_queries, k, 1) * spec.scale
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
        pieces = []  # of each query head
        for head, window in enumerate(windows[1]):
            weight = total[head]
            if sinks:
                weight += jnp.exp(of_lines(0, head) - top[head])
            made = acc[head] / jnp.maximum(weight, 1e-30)
            if laid:
                made = made[:, window.offset : window.offset + head_dim]
                pieces += [made[g * size : (g + 1) * size] for g in range(group)]
            else:
                out[0, head] = made.astype(out.dtype)
        together = LANES // math.gcd(LANES, head_dim)  # what fills whole columns
        for i in range(0, len(pieces), together):
            some = jnp.concatenate(pieces[i : i + together], axis=1).astype(out.dtype)
            out[:, i * head_dim : i * head_dim + some.shape[1]] = some


def _lanes(block: Any, begin: int, count: int) -> jax.Array:
    """So many lanes of `[tokens, lanes]` from there on."""
    first, last = begin // LANES * LANES, min(-(-(begin + count) // LANES) * LANES, block.shape[1])
    return block[:, first:last][:, begin - first : begin - first + count]


def _widened(x: jax.Array, before: int, width: int) -> jax.Array:
    """With so many lanes before, and as many in all, of zeros."""
    after = width - before - x.shape[1]
    pieces = [jnp.zeros((x.shape[0], lanes), x.dtype) for lanes in (before, after)]
    return jnp.concatenate([piece for piece in (pieces[0], x, pieces[1]) if piece.shape[1]], axis=1)


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
