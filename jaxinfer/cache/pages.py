"""The pool of key/value pages: one pair of arrays a layer, donated to every step.

Page 0 is never allocated to a sequence: padding tokens and finished rows write there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `[pages, K, page_size, d]`.

    Heads before positions, because a block of keys is then one batched dot without a transposition; on CPU
    that was a quarter faster than `[pages, page_size, K, d]`.
    """

    k: jax.Array
    v: jax.Array


Cache = tuple[LayerCache, ...]


def cache_shapes(
    num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> Cache:
    """The pool as abstract arrays (`jax.ShapeDtypeStruct`), one `LayerCache` a layer."""
    shape = jax.ShapeDtypeStruct((num_pages, num_kv_heads, page_size, head_dim), jnp.dtype(dtype))
    return tuple(LayerCache(shape, shape) for _ in range(num_layers))  # type: ignore[arg-type]


def cache_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of cache that one token of context takes in all layers together."""
    return 2 * num_layers * num_kv_heads * head_dim * jnp.dtype(dtype).itemsize
