"""Dense layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.sharding import FSDP, TENSOR, axes_of, axis_size, on_axes, on_tensor, splits_tokens, whole_tokens
from jaxinfer.weights import Adapted, Axes, Dense, Weight, dot, dot_parts, dots, scattered_dot, take


def parameter(
    shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, rngs: nnx.Rngs, is_embedding: bool = False
) -> nnx.Param[Weight]:
    """A weight, declared once: shape `[..., out, in]`, dtype, logical axes, initializer (normal with deviation 0.02, as
    in GPT-2). is_embedding: rows of it are looked up, which quantization leaves alone unless it is told to."""
    values = jax.random.normal(rngs.params(), shape, jnp.dtype(dtype)) * jnp.asarray(0.02, dtype)
    return nnx.Param(Dense(values, axes), axes=axes, is_embedding=is_embedding)


class Linear(nnx.Module):
    """`y = x W^T + b`; `axes` are the logical axes of W, (out, in)."""

    def __init__(
        self, in_features: int, out_features: int, *, axes: Axes, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = parameter((out_features, in_features), axes, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(out_features, dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return linears(x, self)[0]

    def parts(self, x: jax.Array) -> jax.Array:
        """See `dot_parts`; without the bias."""
        self.observe(x)
        return dot_parts(x, self.weight.get_value())

    def observe(self, x: jax.Array) -> None:
        """Is told what it multiplies: for those who want to know."""


def linears(x: jax.Array, *layers: Linear) -> list[jax.Array]:
    """What each of the layers makes of x, at once where that is faster."""
    for layer in layers:
        layer.observe(x)
    outs = _products(x, [layer.weight.get_value() for layer in layers])
    biases = [None if layer.bias is None else layer.bias.get_value() for layer in layers]
    return [out if bias is None else out + bias for out, bias in zip(outs, biases, strict=True)]


def _products(x: jax.Array, weights: list[Weight]) -> list[jax.Array]:
    """Where tokens are split over `tensor` between products, all of them for weights whose outputs it splits, and some
    on each device from those whose inputs it splits."""
    if all(_split(weight, 1) and splits_tokens(x.shape[0], weight.shape[0]) for weight in weights):
        return [scattered_dot(x, weight) for weight in weights]
    return dots(whole_tokens(x) if any(_split(weight, 0) for weight in weights) else x, weights)


def _split(weight: Weight, axis: int) -> bool:
    """Whether `tensor` splits a weight's outputs (0), or its inputs (1)."""
    return weight.axes is not None and bool(axes_of(on_axes(weight.axes, TENSOR), axis))


class Embedding(nnx.Module):
    """A table `[rows, D]` looked up by id."""

    def __init__(self, rows: int, features: int, *, axes: Axes = ("vocab", "embed"), dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = parameter((rows, features), axes, dtype, rngs, is_embedding=True)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, ids: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Where `fsdp` splits the table, each device looks its columns up for all, and they are exchanged: that is far
        less than the table."""
        weight = self.weight.get_value()
        if axis_size(mesh, (FSDP,)) == 1:
            return take(weight, ids, self.dtype)
        table = weight.base if isinstance(weight, Adapted) else weight
        embeddings = take(table, lax.all_gather(ids, FSDP, tiled=True), self.dtype)
        embeddings = lax.all_to_all(embeddings, FSDP, 0, 1, tiled=True)
        return weight.adapted_rows(ids, embeddings) if isinstance(weight, Adapted) else embeddings


def head_logits(x: jax.Array, head: Linear | Embedding, mesh: Mesh | None) -> jax.Array:
    """Logits float32 `[N, V]` of `x [N, D]`. Where `fsdp` splits the head's weights they stay where they are, too: each
    device multiplies its columns with those of all, and the products are summed."""
    weight = head.weight.get_value()
    if isinstance(head, Linear) and head.bias is not None:
        return _without_bias(x, weight, mesh) + head.bias.get_value().astype(jnp.float32)
    return _without_bias(x, weight, mesh)


def _without_bias(x: jax.Array, weight: Weight, mesh: Mesh | None) -> jax.Array:
    if isinstance(weight, Adapted):
        return weight.adapted_products(x, _without_bias(x, weight.base, mesh))
    if axis_size(mesh, (FSDP,)) == 1:
        return dot(whole_tokens(x), weight, "float32")  # or the final norm's tokens go around the chips, part by part
    columns = lax.all_to_all(x, FSDP, 1, 0, tiled=True)

    def logits(columns: jax.Array, weight: Weight) -> jax.Array:
        partial = dot(columns, weight, out_dtype="float32", split_over=FSDP)
        return lax.psum_scatter(partial, FSDP, scatter_dimension=0, tiled=True)

    vocab = PartitionSpec(None, TENSOR)
    return on_tensor(logits, (PartitionSpec(), PartitionSpec(TENSOR)), vocab)(columns, weight)
