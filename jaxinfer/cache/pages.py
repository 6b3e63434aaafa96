"""The pool of key/value pages: arrays of each layer, donated to every step.

Page 0 is never allocated to a sequence: padding tokens and finished rows write there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class HeadMajorPages(NamedTuple):
    """Keys and values of one layer, for attention in plain XLA.

    k, v: `[pages, K, page_size, d]`.

    Heads before positions, because a block of keys is then one batched dot without a transposition; on CPU that was a
    quarter faster than `[pages, page_size, K, d]`.
    """

    k: jax.Array
    v: jax.Array


class QuantizedPages(NamedTuple):
    """The same in 8 bits.

    k, v: `[pages, K, page_size, d]`.
    k_scales, v_scales: f32 `[pages, K, page_size]`, of each token and head.
    """

    k: jax.Array
    v: jax.Array
    k_scales: jax.Array
    v_scales: jax.Array


class InterleavedPages(NamedTuple):
    """Keys and values of one layer, for the ragged paged attention kernel of TPUs: a page is one piece of memory, and a
    token one row of it.

    kv: `[pages, page_size, 2K, d]`, each head's key followed by its value; d is padded to 128, and so is K, to what
        fills tiles.
    """

    kv: jax.Array


class FusedPages(NamedTuple):
    """The same for the kernel of tokamax, which writes keys and values itself.

    kv: `[pages, page_size, K, 2, d]`.
    """

    kv: jax.Array


class RowPages(NamedTuple):
    """Keys and values of one layer, for a kernel of TPUs: each token has one row, in columns of 128 features.

    kv: `[pages, columns, page_size, 128]`; on each device a row is each head's key followed by its value, d features
        each, and zeros up to a multiple of 128.
    """

    kv: jax.Array


class QuantizedRowPages(NamedTuple):
    """The same in 8 bits.

    kv: `[pages, columns, page_size, 128]`.
    scales: f32 `[pages, n, 128]`, of each token and head: a page's are those of `[2K, page_size]`, in rows of 128.
    """

    kv: jax.Array
    scales: jax.Array


LayerCache = jax.Array | tuple[jax.Array, ...]  # of one layer: what made it (a backend, or the layer's spec) knows more
Cache = tuple[LayerCache, ...]
KV_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(jnp.float8_e4m3fn),
}
# XLA:CPU, as of JAX 0.10, can't write such floats: it would convert the whole pool there and back for each token.
BITS = {np.dtype(jnp.bfloat16): np.dtype(np.uint16), np.dtype(jnp.float8_e4m3fn): np.dtype(np.uint8)}
SCALE = np.dtype(np.float32)


def values_dtype(pool: jax.Array) -> np.dtype[Any]:
    """What a pool's values are, which may be kept as BITS."""
    return next((dtype for dtype, bits in BITS.items() if bits == pool.dtype), pool.dtype)
