"""Dense layers and the product that all of them use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.sharding import FSDP, TENSOR, axis_size, on_tensor

Axes = tuple[str | None, ...]  # logical axis names of a weight, one a dimension


def dot(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`x [T, in]` times `weight [out, in]` transposed: `[T, out]`, accumulated in float32.

    float32 operands are multiplied at full precision: the default on TPU and GPU would round them to bfloat16 or tf32.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype if out_dtype is None else out_dtype)


def parameter(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """A weight, declared once: shape, dtype, logical axes, initializer (normal with deviation 0.02, as in GPT-2)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.dtype(dtype)) * jnp.asarray(0.02, dtype), axes=axes)


class Linear(nnx.Module):
    """`y = x W^T + b`; `axes` are the logical axes of W, (out, in)."""

    def __init__(
        self, in_features: int, out_features: int, *, axes: Axes, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = parameter((out_features, in_features), axes, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(out_features, dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = dot(x, self.weight.get_value())
        return y if self.bias is None else y + self.bias.get_value()


class Embedding(nnx.Module):
    """A table `[rows, D]` looked up by id."""

    def __init__(self, rows: int, features: int, *, axes: Axes = ("vocab", "embed"), dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = parameter((rows, features), axes, dtype, rngs)

    def __call__(self, ids: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Where `fsdp` splits the table, each device looks its columns up for all, and they are exchanged: that is far
        less than the table."""
        split = axis_size(mesh, (FSDP,)) > 1
        ids = lax.all_gather(ids, FSDP, tiled=True) if split else ids
        found = self.weight.get_value().at[ids].get(mode="clip")
        return lax.all_to_all(found, FSDP, 0, 1, tiled=True) if split else found


def head_logits(x: jax.Array, head: Linear | Embedding, mesh: Mesh | None) -> jax.Array:
    """Logits float32 `[N, V]` of `x [N, D]`. Where `fsdp` splits the head's weights they stay where they are, too: each
    device multiplies its columns with those of all, and the products are summed."""
    weight = head.weight.get_value()
    if axis_size(mesh, (FSDP,)) == 1:
        return dot(x, weight, out_dtype="float32")
    columns = lax.all_to_all(x, FSDP, 1, 0, tiled=True)

    def logits(columns: jax.Array, weight: jax.Array) -> jax.Array:
        partial = dot(columns, weight, out_dtype="float32")
        return lax.psum_scatter(partial, FSDP, scatter_dimension=0, tiled=True)

    vocab = PartitionSpec(None, TENSOR)
    return on_tensor(logits, (PartitionSpec(), PartitionSpec(TENSOR)), vocab)(columns, weight)
