"""Products of arrays: by a CPU kernel where there is one, else by XLA; each device its own part."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.kernels.cpu import alone, multiplies
from jaxinfer.kernels.cpu import products as products_by_kernel
from jaxinfer.sharding import TENSOR, axes_of, on_axes, on_tensor
from jaxinfer.weights.weight import Axes, Weight, dot


def products(
    x: jax.Array, weights: tuple[jax.Array, ...], axes: Sequence[Axes | None], rounds: bool = False
) -> list[jax.Array]:
    """`x [T, in]` times each `weight [out, in]` transposed: float32, or int32 of two that are int8. rounds: activations
    in float32 may be rounded to bfloat16 where that is faster."""
    known = [own for own in axes if own is not None]
    split = None if len(known) < len(axes) or on_each_already() else functools.partial(on_each, axes=known)
    if x.ndim != 2 or not multiplies(x.dtype.name, weights[0].dtype.name) or not alone(TENSOR if split else ()):
        return by_xla(x, weights)
    return products_by_kernel(x, weights, by_xla, rounds, split)


def by_xla(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """The reference."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return [
        lax.dot_general(x, weight.astype(x.dtype), dimensions, precision=precision, preferred_element_type=kind)
        for weight in weights
    ]


def on_each_already() -> bool:
    """Whether this is what each device of `tensor` does, or there is no such axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not set(TENSOR) <= set(mesh.axis_names) or bool(set(TENSOR) & set(mesh.manual_axes))


def on_each(call: Any, axes: Sequence[Axes]) -> Any:
    """A call that multiplies x with weights, as one that each device of `tensor` does with its parts of them."""
    specs = tuple(on_axes(own, TENSOR) for own in axes)
    over = axes_of(specs[0], 1)

    def part(x: jax.Array, weights: Any) -> list[jax.Array]:
        outs = call(x, weights)
        return [lax.psum(out, over) for out in outs] if over else list(outs)

    out_specs = [PartitionSpec(None, spec[0]) for spec in specs]
    return on_tensor(part, (PartitionSpec(None, specs[0][1]), specs), out_specs)


def dot_parts(x: jax.Array, weight: Weight) -> jax.Array:
    """`dot` of `x [T, in]` with a weight whose inputs `tensor` splits, before its sum, for somebody who sums it with
    others: float32 `[parts, T, out]`, of which each device has its own."""
    if on_each_already():
        return dot(x, weight, "float32")[None]

    def part(x: jax.Array, weight: Weight) -> jax.Array:
        return dot(x, weight, "float32", split_over=TENSOR)[None]

    return on_tensor(part, (PartitionSpec(None, TENSOR), _specs(weight)), PartitionSpec(TENSOR))(x, weight)


def scattered_dot(x: jax.Array, weight: Weight) -> jax.Array:
    """`dot` of `x [T, in]` with a weight whose inputs `tensor` splits: `[T, out]`, of which each device has some
    tokens. They are sent in x's dtype; XLA would send them in float32."""

    def part(x: jax.Array, weight: Weight) -> jax.Array:
        return lax.psum_scatter(dot(x, weight, split_over=TENSOR), TENSOR, tiled=True)

    return on_tensor(part, (PartitionSpec(None, TENSOR), _specs(weight)), PartitionSpec(TENSOR))(x, weight)


def _specs(weight: Weight) -> Any:
    """How `tensor` splits each of its arrays."""
    return jax.tree.unflatten(jax.tree.structure(weight), [on_axes(axes, TENSOR) for axes in weight.array_axes])
