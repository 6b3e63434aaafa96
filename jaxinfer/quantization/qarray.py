"""A quantized weight and the products that take one where they take an array."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxinfer.quantization.activations import quantize_last
from jaxinfer.quantization.schemes import Scheme

BLOCK = 2**20  # weights that are quantized at a time: what is needed for that are a few times 4 MB


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class QArray:
    """A weight `[out, in]`, as `values * scales`: values `[out, in]`, scales f32 `[out, 1]`."""

    values: jax.Array
    scales: jax.Array
    scheme: Scheme = field(metadata={"static": True})


Weight = jax.Array | QArray


def dot(
    x: jax.Array, weight: Weight, out_dtype: DTypeLike | None = None, *, split_over: str | None = None
) -> jax.Array:
    """`x [T, in]` times `weight [out, in]` transposed: `[T, out]`, accumulated in float32.

    float32 operands are multiplied at full precision: the default on TPU and GPU would round them to bfloat16 or tf32.
    Scales are applied to the product, so that no weight is ever there in full. split_over: the mesh axis over which
    `in` is split, inside of a shard_map over it; activations are then quantized as if they were not, and the result is
    the part's.
    """
    if not isinstance(weight, QArray):
        out = _product(x, weight)
    elif weight.scheme.activations:
        values, scales = quantize_last(x, jnp.int8, split_over)
        out = _product(values, weight.values).astype(jnp.float32) * scales * weight.scales[:, 0]
    else:
        out = _product(x, weight.values.astype(x.dtype)) * weight.scales[:, 0]
    return out.astype(x.dtype if out_dtype is None else out_dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=kind)


def take(weight: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of a table `[rows, D]`: `[T, D]` in this dtype. ids beyond it give its last row."""
    if not isinstance(weight, QArray):
        return weight.at[ids].get(mode="clip")
    values, scales = (part.at[ids].get(mode="clip").astype(jnp.float32) for part in (weight.values, weight.scales))
    return (values * scales).astype(dtype)


def axes_of_scales(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The logical axes of a quantized weight's scales."""
    return (axes[0], None)


def quantize(weight: np.ndarray[Any, Any], scheme: Scheme) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Values and scales of `weight [out, in]`, on the host: the nearest multiples of each channel's scale. A few rows
    at a time, so that this takes little memory besides. Raises ValueError for weights that are not finite."""
    rows, columns = weight.shape
    values, scales = np.empty(weight.shape, jnp.dtype(scheme.values)), np.ones((rows, 1), np.float32)
    size = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, size):
        some = weight[start : start + size].astype(np.float32)
        largest = np.max(np.abs(some), axis=1, keepdims=True, initial=0)
        if not np.isfinite(largest).all():
            raise ValueError(f"has values that are not finite, which can't be quantized to {scheme.name}")
        scale = np.maximum(largest / np.float32(scheme.largest), np.finfo(np.float32).tiny)
        scales[start : start + size] = scale
        some /= scale
        values[start : start + size] = np.rint(some, out=some) if values.dtype == np.int8 else some
    return values, scales
