"""Attention in float64 numpy, row by row, and random ragged batches with the cache that they need."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinfer.attention import AttentionBackend, AttentionSpec, ForwardBatch, Table
from jaxinfer.attention.relative import Relative
from jaxinfer.attention.xla import XLA
from jaxinfer.cache import HeadMajorPages


def attend_row(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    spec: AttentionSpec,
    sinks: np.ndarray | None = None,
    relative: Relative | None = None,
) -> np.ndarray:
    """The last len(q) tokens of one sequence: q `[n, H, d]` over k, v `[m, K, d]` -> `[n, H, d]`, in float64. sinks:
    `[H]`, scores of one more key, whose value is zero."""
    if not len(q):
        return np.zeros(q.shape)
    q, k, v = (np.asarray(a, np.float64).swapaxes(0, 1) for a in (q, k, v))
    k, v = (np.repeat(a, len(q) // len(a), axis=0) for a in (k, v))
    query = np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    key = np.arange(k.shape[1])[None, :]
    seen = (key <= query) | (not spec.causal)
    if spec.window is not None:
        seen &= abs(key - query) < spec.window
    if spec.chunk is not None:
        seen &= key // spec.chunk == query // spec.chunk

    def near(by_distance: np.ndarray) -> np.ndarray:
        """`[H, n, m, ...]`."""
        furthest = by_distance.shape[1] // 2
        return np.asarray(by_distance, np.float64)[:, np.clip(key - query, -furthest, furthest) + furthest]

    scores = q @ k.swapaxes(1, 2)
    if relative is not None and relative.keys is not None:
        scores = scores + np.einsum("hnd,hnmd->hnm", q, near(relative.keys))
    if relative is not None and relative.queries is not None:
        scores = scores + np.einsum("hmd,hnmd->hnm", k, near(relative.queries))
    scores = spec.scale * scores
    if spec.soft_cap is not None:
        scores = np.tanh(scores / spec.soft_cap) * spec.soft_cap
    if relative is not None and relative.bias is not None:
        scores = scores + near(relative.bias)
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        more = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (*scores.shape[:2], 1))
        scores, v = np.concatenate([scores, more], axis=2), np.concatenate([v, 0 * v[:, :1]], axis=1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1)


class Shape(NamedTuple):
    """What decides the compiled program: T tokens, R rows, and the layer."""

    page_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: str = "float32"
    tokens: int = 384
    rows: int = 6
    context: int = 768


class Ragged(NamedTuple):
    """A batch of rows (history, new tokens) with random content. `cache` holds the histories and `fill` elsewhere;
    `after` is what the pool must hold when the new tokens are written, page 0 aside. out: the reference."""

    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray
    cache: HeadMajorPages
    batch: ForwardBatch
    out: np.ndarray
    after: HeadMajorPages


def ragged(
    shape: Shape,
    spec: AttentionSpec,
    decode: list[int],
    prefill: list[tuple[int, int]],
    *,
    seed: int = 0,
    fill: float | None = None,
    decode_only: bool = False,
    backend: AttentionBackend = XLA,
    sinks: np.ndarray | None = None,
) -> Ragged:
    """decode: histories of the decode rows (-1: an unused row); prefill: (history, new tokens)."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(shape.dtype)
    size, table = shape.page_size, -(-shape.context // shape.page_size)
    rows = [(h, 1) if h >= 0 else (0, 0) for h in decode] + list(prefill)
    # With decode_only a token is there for unused rows too.
    spans = [1] * len(rows) if decode_only else [n for _, n in rows]
    rows += [(0, 0)] * (shape.rows - len(rows))
    spans += [int(decode_only)] * (shape.rows - len(spans))
    tokens = shape.rows if decode_only else shape.tokens
    total = sum(spans)
    assert total <= tokens

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims).astype(dtype)

    q = normal(tokens, shape.heads, shape.head_dim)
    k, v = (normal(tokens, shape.kv_heads, shape.head_dim) for _ in range(2))
    needed = [-(-(h + n) // size) for h, n in rows]
    num_pages = shape.rows * table + 1  # the same for all cases of a shape: one compiled program
    free = rng.permutation(np.arange(1, num_pages)).tolist()
    pool_shape = (num_pages, shape.kv_heads, size, shape.head_dim)
    pools = [normal(*pool_shape) if fill is None else np.full(pool_shape, fill, dtype) for _ in range(2)]
    pages = np.zeros((shape.rows, table), np.int32)
    positions, row_of = np.zeros(tokens, np.int32), np.full(tokens, shape.rows - 1, np.int32)
    out = np.zeros((tokens, shape.heads, shape.head_dim))
    cu_q_lens = np.concatenate([[0], np.cumsum(spans)]).astype(np.int32)
    after = []
    full: list[list[np.ndarray]] = [[], []]
    for r, (history, new) in enumerate(rows):
        own = [free.pop() for _ in range(needed[r])]
        pages[r, : len(own)] = own
        span = slice(cu_q_lens[r], cu_q_lens[r] + new)
        row_of[cu_q_lens[r] : cu_q_lens[r + 1]] = r
        positions[span] = np.arange(history, history + new)
        for which, (pool, fresh) in enumerate(zip(pools, (k, v), strict=True)):
            past = normal(history, shape.kv_heads, shape.head_dim)
            pool[slots(own, 0, history, size)] = past
            full[which].append(np.concatenate([past, fresh[span]]))
        if new:
            out[span] = attend_row(q[span], full[0][r], full[1][r], spec, sinks)
    for pool, sequences in zip(pools, full, strict=True):
        written = pool.copy()
        for r, (history, new) in enumerate(rows):
            written[slots(pages[r], history, history + new, size)] = sequences[r][history:]
        after.append(written)
    count = len(decode) + len(prefill)
    batch = ForwardBatch(
        tokens=np.zeros(tokens, np.int32),
        positions=positions,
        segment_ids=row_of,
        cu_q_lens=cu_q_lens,
        kv_lens=np.array([h + n for h, n in rows], np.int32),
        tables=(Table(pages),),
        distribution=np.array([shape.rows] * 3 if decode_only else [len(decode), count, count], np.int32),
        decode_only=decode_only,
        backend=backend,
    )
    return Ragged(
        *map(jnp.asarray, (q, k, v)), HeadMajorPages(*map(jnp.asarray, pools)), batch, out, HeadMajorPages(*after)
    )


def live(batch: ForwardBatch) -> np.ndarray:
    """bool[T]: the tokens of used rows."""
    tokens = np.arange(len(batch.tokens))
    return (tokens < batch.cu_q_lens[-1]) & (batch.positions < batch.kv_lens[batch.segment_ids])


def filled_outside(case: Ragged, value: float) -> HeadMajorPages:
    """The cache with `value` in every slot that holds no token of the rows (page 0 included)."""
    size = case.cache.k.shape[2]
    used = np.zeros((case.cache.k.shape[0], size), bool)
    for row, length in zip(case.batch.pages, case.batch.kv_lens, strict=True):
        page, _, slot = slots(row, 0, length, size)
        used[page, slot] = True
    keep = used[:, None, :, None]
    return HeadMajorPages(*(jnp.where(keep, pool, jnp.asarray(value, pool.dtype)) for pool in case.cache))


def slots(pages: np.ndarray | list[int], start: int, stop: int, size: int) -> tuple[np.ndarray, slice, np.ndarray]:
    """The index of the pool `[pages, K, size, d]` at which tokens start:stop of a row lie."""
    tokens = np.arange(start, stop)
    return np.asarray(pages, int)[tokens // size], slice(None), tokens % size


def check_overflow(run, backend, decode_only, part):
    """`run`, with that backend: what is not finite in a query, a key or a value stays in its own row."""
    shape, spec = Shape(), AttentionSpec(0.25)
    rows = ([40, 15, -1, 699, 200], []) if decode_only else ([40, 200], [(0, 300), (100, 7)])
    case = ragged(shape, spec, *rows, decode_only=decode_only, backend=backend)
    expected, _ = run(case.q, case.k, case.v, case.cache, case.batch, spec)
    q, (k, v), page = case.q, case.cache, case.batch.pages[0, 0]
    if part == "query":
        q = q.at[0].set(jnp.nan)
    elif part == "key":
        k = k.at[page].set(jnp.inf)
    else:
        v = v.at[page].set(jnp.nan)
    out, _ = run(q, case.k, case.v, HeadMajorPages(k, v), case.batch, spec)
    others = live(case.batch) & (case.batch.segment_ids != 0)
    assert np.isnan(np.asarray(out)[0]).any()  # and it isn't hidden either
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(expected)[others])
