"""Rounding what a program computes, while it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def quantize_last(
    x: jax.Array, dtype: DTypeLike, split_over: str | tuple[str, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """`x [..., n]` as values of this dtype, int8 or an 8-bit float, times scales f32 `[..., 1]`.

    split_over: the mesh axis, or axes, over which the last axis is split, inside of a shard_map over them; its parts
    get the scale of the whole.
    """
    integers = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = largest if split_over is None else lax.pmax(largest, split_over)
    scales = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * most) / most
    values = x / scales
    return (jnp.round(values) if integers else values).astype(dtype), scales
