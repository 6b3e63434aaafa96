"""A weight with low-rank adapters beside it, each row of activations with its own, or with none.

Sources: LoRA (Hu et al., arXiv:2106.09685), DoRA (Liu et al., arXiv:2402.09353); that rows of several adapters share a
product: Punica (Chen et al., arXiv:2310.18547).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.sharding import TENSOR, axes_of, on_axes, on_tensor
from jaxinfer.weights.products import by_xla, on_each_already
from jaxinfer.weights.weight import Axes, SplitOver, Weight


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class LowRank:
    """What S adapters make of a weight's products: `gain * (W x + b a x) + shift`.

    a: `[S, R, in]`, of which adapters of lower rank leave some zeros.
    b: `[S, R, out]`, with the adapter's scale.
    gain: f32 `[S, out]`, DoRA's lengths over those that rows have, 1 without.
    shift: f32 `[S, out]`, what is added to the bias.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array
    shift: jax.Array

    @staticmethod
    def axes(axes: Axes) -> LowRank:
        """The logical axes of each array beside a weight of these. Nothing is split over rows."""
        rows, columns = ((axis if axis not in (None, "embed") else None) for axis in axes)
        of: list[Axes] = [(None, None, columns), (None, None, rows), (None, rows), (None, rows)]
        return LowRank(*of)  # type: ignore[arg-type]


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class AdapterRows:
    """Which adapter each row of activations has.

    slot: i32[T]; S for none.
    used: i32[S], the slots that some row has, first.
    count: i32[], how many those are.
    one_by_one: products are made of those alone, one after the other, where reading is what takes time; else at once of
        all, which makes wide products of narrow ones.
    """

    slot: jax.Array
    used: jax.Array
    count: jax.Array
    one_by_one: bool = field(metadata={"static": True})

    @classmethod
    def of(cls, slot: jax.Array, slots: int, one_by_one: bool) -> AdapterRows:
        """slots: how many there are."""
        there = jnp.zeros(slots, jnp.int32).at[slot].set(1, mode="drop")
        used = jnp.argsort(1 - there).astype(jnp.int32)
        return cls(slot, used, jnp.sum(there, dtype=jnp.int32), one_by_one)


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Adapted(Weight):
    """A weight `[out, in]` with adapters.

    base: the weight. beside: those. rows: who has which, of the activations that it is multiplied with.
    """

    base: Weight
    beside: LowRank
    rows: AdapterRows

    @property
    def axes(self) -> Axes | None:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def group(self) -> Hashable:
        return type(self.base), self.base.group, self.axes and self.axes[1]

    @property
    def array_axes(self) -> list[Axes]:
        beside = LowRank.axes(self.axes or (None, None))
        rows: list[Axes] = [(None,), (None,), ()]
        return [*self.base.array_axes, *vars(beside).values(), *rows]

    @classmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        """On a mesh each device of `tensor` adds its part of what adapters make to its part of the product, and both
        are summed as one."""
        axes = [weight.axes for weight in weights if weight.axes is not None]
        if on_each_already() or len(axes) < len(weights):
            return _dots(x, weights, split_over)
        columns = on_axes(axes[0], TENSOR)[1]
        over = axes_of(on_axes(axes[0], TENSOR), 1)

        def part(x: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
            outs = _dots(x, weights, over or None)
            return [lax.psum(out, over) for out in outs] if over else outs

        specs = [
            jax.tree.unflatten(jax.tree.structure(weight), [on_axes(own, TENSOR) for own in weight.array_axes])
            for weight in weights
        ]
        outs = [PartitionSpec(None, on_axes(own, TENSOR)[0]) for own in axes]
        return on_tensor(part, (PartitionSpec(None, columns), specs), outs)(x, list(weights))

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        return self.base.take(ids, dtype)

    def __getitem__(self, index: int | slice | jax.Array) -> NoReturn:
        raise TypeError("a matrix with adapters has no parts")


def _dots(x: jax.Array, weights: Sequence[Adapted], split_over: SplitOver) -> list[jax.Array]:
    """What one device makes of its parts."""
    bases, rows = [weight.base for weight in weights], weights[0].rows
    assert len(x) == len(rows.slot), "each row of activations has an adapter, or none"
    outs = type(bases[0]).dots(x, bases, split_over)
    share = 1.0 if split_over is None else 1.0 / lax.axis_size(split_over)  # of a shift, which is added once
    if not rows.one_by_one:
        return [_at_once(x, weight.beside, out, rows, share) for weight, out in zip(weights, outs, strict=True)]

    def add(i: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
        slot = rows.used[i]
        mine = (rows.slot == slot)[:, None]
        after = []
        for weight, out in zip(weights, outs, strict=True):
            own = jax.tree.map(lambda array, slot=slot: array[slot], weight.beside)
            (low,) = by_xla(x, [own.a])
            added = out + _expanded(low.astype(x.dtype), own.b)
            after.append(jnp.where(mine, own.gain * added + own.shift * share, out))
        return after

    return lax.fori_loop(0, rows.count, add, outs)


def _at_once(x: jax.Array, beside: LowRank, out: jax.Array, rows: AdapterRows, share: float) -> jax.Array:
    """With what all slots add: of each row its own is left."""
    slots, rank, _ = beside.a.shape
    mine = (rows.slot[:, None] == jnp.arange(slots, dtype=jnp.int32)).astype(jnp.float32)
    (low,) = by_xla(x, [beside.a.reshape(slots * rank, -1)])
    low = (low * jnp.repeat(mine, rank, axis=1)).astype(x.dtype)
    added = out + _expanded(low, beside.b.reshape(slots * rank, -1))
    return added + added * _expanded(mine, beside.gain - 1) + _expanded(mine, beside.shift * share)


def _expanded(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low [T, R]` times `b [R, out]`, float32."""
    precision = lax.Precision.HIGHEST if low.dtype == jnp.float32 else None
    return jnp.matmul(low, b.astype(low.dtype), precision=precision, preferred_element_type=jnp.float32)
