"""Attention by the CPU kernels: to keys and values in pages, and within rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.cpu import ATTEND, ATTEND_ROWS, alone, kernels, or_none

MOST_QUERIES = 128  # of a token that have one key
CACHES = ("float32", "bfloat16", "int8")


def attention_problem(activations: str, head_dim: int, queries: int, cache: str) -> str | None:
    """Why there is no kernel for attention of these dtypes here, `queries` of a token that have one key; or None."""
    level, why = kernels()
    if level is None:
        return why
    if activations != "float32":
        return f"the kernel is for activations in float32, and these are in {activations}"
    if head_dim % 16:
        return f"the kernel is for head sizes that are multiples of 16, and the model has {head_dim}"
    if queries > MOST_QUERIES:
        return f"the kernel is for at most {MOST_QUERIES} query heads a key head, and the model has {queries}"
    return None if cache in CACHES else f"the kernel reads a cache in {', '.join(CACHES)}, and this is kept as {cache}"


def attend(
    q: jax.Array,
    pools: Sequence[jax.Array],
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    pages: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of `q [T, K, G, d]` to keys and values in pages, where they are: `[T, K, G, d]`, zeros for
    tokens of no row. In programs for a CPU, where there is no `attention_problem`.

    Row r has tokens cu_q_lens[r]:cu_q_lens[r + 1], the last of the kv_lens[r] that are in the cache; none if that is 0.
    pools: keys and values `[P, K, page_size, d]`, in 8 bits their scales `[P, K, page_size]` too. pages: i32[R, ...].
    window: that many positions are seen; None is all. soft_cap: scores stay below it, by a tanh. sinks: f32[K * G], a
    score more of each query head, which has no value.
    """
    call = jax.ffi.ffi_call(ATTEND, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    options = _options(scale, window, soft_cap)
    return call(q, or_none(sinks), cu_q_lens, kv_lens, pages, *pools, **options)


def _options(scale: float, window: int | None, soft_cap: float | None) -> dict[str, Any]:
    return {"scale": np.float32(scale), "soft_cap": np.float32(soft_cap or 0), "window": np.int64(window or 0)}


def attends_rows(activations: str, queries: int) -> bool:
    """Whether there is a kernel for attention within rows here, `queries` of a token that have one key."""
    fits = activations in ("float32", "bfloat16") and queries <= MOST_QUERIES
    return fits and kernels().level is not None and alone()


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_q_lens: jax.Array,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of `q [T, K, G, d]` to keys and values `[T, K, d]` of its own row: `[T, K, G, d]`, zeros for tokens of
    no row. In programs for a CPU, where `attends_rows` says so.

    Row r has tokens cu_q_lens[r]:cu_q_lens[r + 1]. bias: f32[K * G, 2D - 1], added to scores, of keys that are so far
    from the query, -(D - 1) to D - 1; those further away have what is at the ends. The rest as in `attend`; a window
    without causality goes in both directions.
    """
    dim, more = q.shape[-1], -q.shape[-1] % 16  # which a vector must divide
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x for x in (q, k, v))
    call = jax.ffi.ffi_call(ATTEND_ROWS, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    options = _options(scale, window, soft_cap) | {"causal": causal}
    out = call(q, or_none(sinks), or_none(bias), cu_q_lens, k, v, **options)
    return out[..., :dim] if more else out
