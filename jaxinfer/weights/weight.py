"""What every kind of weight is to those who multiply with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxinfer.kernels.tpu import Kept

Axes = tuple[str | None, ...]
SplitOver = str | tuple[str, ...] | None


class Weight(ABC):
    """A weight `[..., out, in]`, a pytree; of more than two axes the first ones are of weights that are alike, experts.

    axes: its logical axes, from which kernels know what a mesh splits; None where nobody knows them.
    rounds: activations in float32 that it is multiplied with may be rounded to bfloat16 where that is faster.
    """

    axes: Axes | None
    rounds: bool

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """In full, however the values are packed."""

    @property
    @abstractmethod
    def group(self) -> Hashable:
        """Weights of one kind that have the same can be multiplied with in one call."""

    @property
    @abstractmethod
    def array_axes(self) -> list[Axes]:
        """The logical axes of each of its arrays."""

    @property
    def channels(self) -> tuple[jax.Array, ...] | None:
        """Values `[out, in]`, and the scales `[out]` of products with them if there are any; None: products are made in
        another way."""
        return None

    @property
    def kept(self) -> Kept | None:
        """As kernels for TPUs take experts; None: they take none of this kind."""
        return None

    @classmethod
    @abstractmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        """See `dots`: of weights of one group, summed in float32 and not yet in the dtype that is wanted."""

    @classmethod
    def grouped_dots(cls, x: jax.Array, sizes: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
        """See `grouped_dots`: of weights of one group, summed in float32."""
        return by_tiles(x, sizes, weights)

    @abstractmethod
    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `take`."""

    @abstractmethod
    def __getitem__(self, index: int | slice | jax.Array) -> Self:
        """One of those along the first axis, or some."""


def dots(
    x: jax.Array, weights: Sequence[Weight], out_dtype: DTypeLike | None = None, *, split_over: SplitOver = None
) -> list[jax.Array]:
    """`x [T, in]` times each `weight [out, in]` transposed: `[T, out]`, accumulated in float32; x's dtype or another.

    float32 operands are multiplied at full precision: the default on TPU and GPU would round them to bfloat16 or tf32.
    split_over: the mesh axis, or axes, over which `in` is split, inside of a shard_map over them; activations are then
    quantized as if they were not, and the result is the part's.
    """
    outs = _by_group(weights, lambda kind, some: kind.dots(x, some, split_over))
    return [out.astype(x.dtype if out_dtype is None else out_dtype) for out in outs]


def _by_group(
    weights: Sequence[Weight], call: Callable[[type[Weight], list[Weight]], list[jax.Array]]
) -> list[jax.Array]:
    """What a call makes of the weights of each group, in their order."""
    groups: dict[Hashable, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((type(weight), weight.group), []).append(i)
    outs: dict[int, jax.Array] = {}
    for members in groups.values():
        some = [weights[i] for i in members]
        outs |= zip(members, call(type(some[0]), some), strict=True)
    return [outs[i] for i in range(len(weights))]


def dot(x: jax.Array, weight: Weight, out_dtype: DTypeLike | None = None, *, split_over: SplitOver = None) -> jax.Array:
    """See dots; of one weight."""
    return dots(x, [weight], out_dtype, split_over=split_over)[0]


def take(weight: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of a table `[rows, D]`: `[T, D]` in this dtype. ids beyond it give its last row."""
    return weight.take(ids, dtype)


def grouped_dots(
    x: jax.Array, sizes: jax.Array, weights: Sequence[Weight], out_dtype: DTypeLike | None = None
) -> list[jax.Array]:
    """`x [M, in]`, whose rows are those of the first expert, then those of the second and so on, times each expert's
    part of each `weight [E, out, in]` transposed: `[M, out]`, accumulated in float32; x's dtype or another. sizes:
    i32[E], how many rows each expert has; the rest is nobody's, and zeros. Only experts with rows are read. On one
    device, or inside of a shard_map over `tensor`.
    """
    outs = _by_group(weights, lambda kind, some: kind.grouped_dots(x, sizes, some))
    return [out.astype(x.dtype if out_dtype is None else out_dtype) for out in outs]


def by_tiles(x: jax.Array, sizes: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """The reference of `grouped_dots`: a loop over the experts that have rows, some rows at a time. A tile that several
    experts share is multiplied for each, and each writes its own rows."""
    count = sizes.shape[0]
    rows = tile_rows(x.shape[0], count)
    padded = jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))
    ends = jnp.cumsum(sizes)
    first = (ends - sizes) // rows
    visits = jnp.where(sizes > 0, (ends - 1) // rows + 1 - first, 0)
    done = jnp.cumsum(visits)
    # All is looked up beforehand: a number that a turn works out for itself costs as much as a tenth of its product.
    owners = _place_in(ends, padded.shape[0])
    experts = _place_in(done, padded.shape[0] // rows + count)
    turns = jnp.arange(len(experts), dtype=sizes.dtype)
    tiles = (first + visits - done).at[experts].get(mode="clip") + turns

    def visit(i: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
        expert, at = experts[i], tiles[i] * rows
        tile = lax.dynamic_slice_in_dim(padded, at, rows)
        products = dots(tile, [weight[expert] for weight in weights], "float32")
        own = (lax.dynamic_slice_in_dim(owners, at, rows) == expert)[:, None]
        before = (lax.dynamic_slice_in_dim(out, at, rows) for out in outs)
        after = [jnp.where(own, new, old) for new, old in zip(products, before, strict=True)]
        return [lax.dynamic_update_slice_in_dim(out, tile, at, 0) for out, tile in zip(outs, after, strict=True)]

    outs = [jnp.zeros((padded.shape[0], weight.shape[1]), jnp.float32) for weight in weights]
    return [out[: x.shape[0]] for out in lax.fori_loop(0, done[-1], visit, outs)]


def _place_in(ends: jax.Array, count: int) -> jax.Array:
    """Of each number below count the first part that ends after it."""
    return jnp.searchsorted(ends, jnp.arange(count, dtype=ends.dtype), side="right", method="compare_all")


def tile_rows(rows: int, experts: int) -> int:
    """Of a tile: about as many as an expert has, if all have the same."""
    return min(max(8, 1 << (max(rows // experts, 1) - 1).bit_length()), 128)
