"""A weight with low-rank adapters beside it, each row of activations with its own, or with none.

Sources: LoRA (Hu et al., arXiv:2106.09685), DoRA (Liu et al., arXiv:2402.09353); that rows of several adapters share a
product: Punica (Chen et al., arXiv:2310.18547).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.kernels.cpu import low_rank
from jaxinfer.sharding import TENSOR, axes_of, on_axes, on_tensor
from jaxinfer.weights.dense import Dense
from jaxinfer.weights.products import by_xla, on_each_already
from jaxinfer.weights.weight import Axes, SplitOver, Weight


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class LowRank:
    """What S adapters make of a weight's products: `gain * (W x + b a x) + shift`; or of rows that are looked up in a
    table `[V, D]`: `gain * (row + a b) + shift`.

    a: `[S, R, in]`, of which adapters of lower rank leave some zeros; of a table `[S, V, R]`.
    b: `[S, R, out]`, with the adapter's scale.
    gain: f32 `[S, out]`, DoRA's lengths over those that rows have, 1 without.
    shift: f32 `[S, out]`, what is added to the bias.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array
    shift: jax.Array

    @staticmethod
    def axes(axes: Axes | None) -> LowRank:
        """The logical axes of each array beside a weight of these, or None: of a table. Nothing is split over rows."""
        axes = axes or (None, None)
        rows, columns = ((axis if axis not in (None, "embed") else None) for axis in axes)
        of: list[Axes] = [(None, None, columns), (None, None, rows), (None, rows), (None, rows)]
        return LowRank(*of)  # type: ignore[arg-type]


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Adapted(Weight):
    """A weight `[out, in]` with adapters.

    base: the weight.
    slot: i32[T], whose each row is of what it is multiplied with, or is looked up; S for nobody's.
    beside: what they make of products; None: nothing.
    looked_up: what they make of rows; None: nothing.
    """

    base: Weight
    slot: jax.Array
    beside: LowRank | None = None
    looked_up: LowRank | None = None

    @property
    def axes(self) -> Axes | None:  # type: ignore[override]
        return self.base.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def group(self) -> Hashable:
        return type(self.base), self.base.group, self.axes and self.axes[1], self.beside is None

    @property
    def array_axes(self) -> list[Axes]:
        axes = [*self.base.array_axes, (None,)]
        for beside, own in ((self.beside, self.axes), (self.looked_up, None)):
            axes += vars(LowRank.axes(own)).values() if beside is not None else ()
        return axes

    @classmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        """On a mesh each device of `tensor` adds its part of what adapters make to its part of the product, and both
        are summed as one."""
        if weights[0].beside is None:
            return type(weights[0].base).dots(x, [weight.base for weight in weights], split_over)
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
        return self.adapted_rows(ids, self.base.take(ids, dtype))

    def adapted_rows(self, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """Rows `[T, D]` of the table, of which each is its slot's."""
        beside = self.looked_up
        if beside is None:
            return rows
        slots, vocab, rank = beside.a.shape
        known = jnp.clip(self.slot, 0, slots - 1) * vocab + jnp.clip(ids, 0, vocab - 1)
        low = Dense(beside.a.reshape(-1, rank)).take(known, rows.dtype)
        return _expanded_by_slot(low, beside, rows.astype(jnp.float32), self.slot, 1.0).astype(rows.dtype)

    def adapted_products(self, x: jax.Array, outs: jax.Array) -> jax.Array:
        """Products `[T, out]` with the weight, of whole `x [T, in]`, of which each row is its slot's."""
        if self.beside is None:
            return outs
        columns = PartitionSpec(None, on_axes(self.axes, TENSOR)[0] if self.axes else None)
        specs = jax.tree.unflatten(
            jax.tree.structure(self.beside), [on_axes(own, TENSOR) for own in vars(LowRank.axes(self.axes)).values()]
        )

        def part(x: jax.Array, slot: jax.Array, beside: LowRank, out: jax.Array) -> jax.Array:
            return _added(x, [beside], [out], slot, 1.0)[0]

        whole = PartitionSpec()
        call = part if on_each_already() else on_tensor(part, (whole, whole, specs, columns), columns)
        return call(x, self.slot, self.beside, outs)

    def __getitem__(self, index: int | slice | jax.Array) -> NoReturn:
        raise TypeError("a matrix with adapters has no parts")


def _dots(x: jax.Array, weights: Sequence[Adapted], split_over: SplitOver) -> list[jax.Array]:
    """What one device makes of its parts."""
    outs = type(weights[0].base).dots(x, [weight.base for weight in weights], split_over)
    share = 1.0 if split_over is None else 1.0 / lax.axis_size(split_over)  # of a shift, which is added once
    return _added(x, [weight.beside for weight in weights if weight.beside], outs, weights[0].slot, share)


def _added(
    x: jax.Array, beside: Sequence[LowRank], outs: Sequence[jax.Array], slot: jax.Array, share: float
) -> list[jax.Array]:
    """Products with what each row's adapter makes of them."""
    assert len(x) == len(slot), "each row of activations has an adapter, or none"

    def at_once() -> list[jax.Array]:
        added = []
        for own, out in zip(beside, outs, strict=True):
            slots, rank, _ = own.a.shape
            (low,) = by_xla(x, [own.a.reshape(slots * rank, -1)])
            added.append(_expanded_by_slot(low.astype(x.dtype), own, out, slot, share))
        return added

    return low_rank(x, slot, outs, [tuple(vars(own).values()) for own in beside], share, at_once)


def _expanded_by_slot(low: jax.Array, beside: LowRank, out: jax.Array, slot: jax.Array, share: float) -> jax.Array:
    """With what slots add to products, or to rows: at once of all, wide products whatever the mix, of which each row
    keeps its own. low: `[T, S * R]`, or `[T, R]` of each row's own slot."""
    slots, rank, columns = beside.b.shape
    mine = (slot[:, None] == jnp.arange(slots, dtype=jnp.int32)).astype(jnp.float32)
    low = low if low.shape[1] == slots * rank else jnp.tile(low, slots)
    low = low * jnp.repeat(mine, rank, axis=1).astype(low.dtype)
    added = out + _product(low, beside.b.reshape(slots * rank, columns))
    return added + added * _product(mine, beside.gain - 1) + _product(mine, beside.shift * share)


def _product(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low [T, R]` times `b [R, out]`, float32."""
    precision = lax.Precision.HIGHEST if low.dtype == jnp.float32 else None
    return jnp.matmul(low, b.astype(low.dtype), precision=precision, preferred_element_type=jnp.float32)
