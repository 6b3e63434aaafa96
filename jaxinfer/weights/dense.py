"""A weight in floats."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxinfer.kernels.cpu import grouped_products
from jaxinfer.kernels.cpu import take as take_by_kernel
from jaxinfer.kernels.tpu import Kept
from jaxinfer.kernels.tpu import grouped_products as grouped_products_on_tpu
from jaxinfer.weights.products import products
from jaxinfer.weights.weight import Axes, SplitOver, Weight, by_tiles


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Dense(Weight):
    """A weight as one array.

    array: `[..., out, in]`.
    axes: see Weight.
    """

    array: jax.Array
    axes: Axes | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def group(self) -> Hashable:
        return self.array.dtype

    @property
    def array_axes(self) -> list[Axes]:
        return [self.axes or (None,) * self.array.ndim]

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        return self.array.dtype == jnp.bfloat16

    @property
    def channels(self) -> tuple[jax.Array, ...]:
        return (self.array,)

    @property
    def kept(self) -> Kept:
        return Kept(self.array)

    @classmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        arrays = tuple(weight.array for weight in weights)
        return products(x, arrays, [weight.axes for weight in weights], weights[0].rounds)

    @classmethod
    def grouped_dots(cls, x: jax.Array, sizes: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
        arrays = tuple(weight.array for weight in weights)

        def elsewhere() -> list[jax.Array]:
            return grouped_products_on_tpu(
                x, sizes, [weight.kept for weight in weights], lambda: by_tiles(x, sizes, weights)
            )

        return grouped_products(x, sizes, arrays, elsewhere, weights[0].rounds)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        # XLA:CPU gathers no 16-bit floats: it would make a float32 copy of the table each time. Integers it does.
        if self.array.dtype.itemsize == 2:
            return lax.platform_dependent(self.array, ids, cpu=_taken_on_cpu, default=_taken).astype(dtype)
        return _taken(self.array, ids).astype(dtype)

    def __getitem__(self, index: int | slice | jax.Array) -> Self:
        array = self.array[index]
        return replace(self, array=array, axes=self.axes and self.axes[len(self.axes) - array.ndim :])


def _taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].get(mode="clip")


def _taken_on_cpu(table: jax.Array, ids: jax.Array) -> jax.Array:
    return take_by_kernel(table, ids, _taken_by_bits)


def _taken_by_bits(table: jax.Array, ids: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_taken(lax.bitcast_convert_type(table, jnp.uint16), ids), table.dtype)
