"""What every kind of weight is to those who multiply with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import jax
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]


class Weight(ABC):
    """A weight `[..., out, in]`, a pytree; of more than two axes the first ones are of weights that are alike, experts.

    axes: its logical axes, from which kernels know what a mesh splits; None where nobody knows them.
    """

    axes: Axes | None

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

    @classmethod
    @abstractmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: str | None) -> list[jax.Array]:
        """See `dots`: of weights of one group, summed in float32 and not yet in the dtype that is wanted."""

    @abstractmethod
    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `take`."""

    @abstractmethod
    def __getitem__(self, index: int | slice) -> Self:
        """One of those along the first axis, or some."""


def dots(
    x: jax.Array, weights: Sequence[Weight], out_dtype: DTypeLike | None = None, *, split_over: str | None = None
) -> list[jax.Array]:
    """`x [T, in]` times each `weight [out, in]` transposed: `[T, out]`, accumulated in float32; x's dtype or another.

    float32 operands are multiplied at full precision: the default on TPU and GPU would round them to bfloat16 or tf32.
    split_over: the mesh axis over which `in` is split, inside of a shard_map over it; activations are then quantized as
    if they were not, and the result is the part's.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((type(weight), weight.group), []).append(i)
    outs: dict[int, jax.Array] = {}
    for members in groups.values():
        some = [weights[i] for i in members]
        outs |= zip(members, type(some[0]).dots(x, some, split_over), strict=True)
    return [outs[i].astype(x.dtype if out_dtype is None else out_dtype) for i in range(len(weights))]


def dot(
    x: jax.Array, weight: Weight, out_dtype: DTypeLike | None = None, *, split_over: str | None = None
) -> jax.Array:
    """See dots; of one weight."""
    return dots(x, [weight], out_dtype, split_over=split_over)[0]


def take(weight: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of a table `[rows, D]`: `[T, D]` in this dtype. ids beyond it give its last row."""
    return weight.take(ids, dtype)
