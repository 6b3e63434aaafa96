"""A weight with low-rank adapters beside it: each row of activations has its own, or none.

Sources: LoRA (Hu et al., arXiv:2106.09685), DoRA (Liu et al., arXiv:2402.09353); that rows of several adapters share a
product: Punica (Chen et al., arXiv:2310.18547).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.kernels.cpu import adapted_products, low_rank
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

    Of experts, `[E, out, in]`, there are a `[E, S, R, in]` and b `[E, S, R, out]` alone.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    shift: jax.Array | None = None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that there are."""
        return tuple(array for array in vars(self).values() if array is not None)

    @staticmethod
    def axes(axes: Axes | None) -> LowRank:
        """The logical axes of each array beside a weight of these, or None: of a table. Shards of rows have all of
        them, but for experts."""
        rows, columns = (axis if axis != "embed" else None for axis in (axes or (None, None))[-2:])
        if axes is not None and len(axes) > 2:
            return LowRank(*[(axes[0], None, None, None)] * 2)  # type: ignore[arg-type]
        of: list[Axes] = [(None, None, columns), (None, None, rows), (None, rows), (None, rows)]
        return LowRank(*of)  # type: ignore[arg-type]


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Adapted(Weight):
    """A weight with adapters.

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
        return type(self.base), self.base.group, self.axes and self.axes[-1], self.beside is None

    @property
    def array_axes(self) -> list[Axes]:
        axes: list[Any] = [*self.base.array_axes, (None,)]
        for beside, own in ((self.beside, self.axes), (self.looked_up, None)):
            axes += LowRank.axes(own).arrays if beside is not None else ()
        return axes

    @classmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        """On a mesh each device of `tensor` adds its part of what adapters make to its part of the product, and both
        are summed as one."""
        axes = [weight.axes for weight in weights if weight.axes is not None]
        if weights[0].beside is None:
            return type(weights[0].base).dots(x, [weight.base for weight in weights], split_over)
        if on_each_already() or len(axes) < len(weights):
            return _dots(x, weights, split_over)
        columns = on_axes(axes[0], TENSOR)[1]
        over = axes_of(on_axes(axes[0], TENSOR), 1)

        def part(x: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
            outs = _dots(x, weights, over or None)
            return [lax.psum(out, over) for out in outs] if over else outs

        specs = [_on_tensor(weight, weight.array_axes) for weight in weights]
        outs = [PartitionSpec(None, on_axes(own, TENSOR)[0]) for own in axes]
        return on_tensor(part, (PartitionSpec(None, columns), specs), outs)(x, list(weights))

    @classmethod
    def grouped_dots(cls, x: jax.Array, sizes: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
        outs = type(weights[0].base).grouped_dots(x, sizes, [weight.base for weight in weights])
        slot, beside = weights[0].slot, [weight.beside for weight in weights if weight.beside is not None]
        experts, slots = beside[0].a.shape[:2]
        owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x), dtype=sizes.dtype), side="right")
        is_adapted = (owner < experts) & (slot >= 0) & (slot < slots)
        place = jnp.where(is_adapted, owner * slots + slot, experts * slots).astype(jnp.int32)
        flat = [tuple(array.reshape(-1, *array.shape[2:]) for array in own.arrays) for own in beside]

        def by_groups() -> list[jax.Array]:
            order = jnp.argsort(place)
            counts = jnp.bincount(place, length=experts * slots + 1)[:-1].astype(sizes.dtype)
            added = []
            for (a, b), out in zip(flat, outs, strict=True):
                (low,) = Dense.grouped_dots(x[order], counts, [Dense(a)])
                (some,) = Dense.grouped_dots(low.astype(x.dtype), counts, [Dense(jnp.swapaxes(b, 1, 2))])
                added.append(out.at[order].add(some))
            return added

        return low_rank(x, place, outs, flat, 1.0, by_groups)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        return self.adapted_rows(ids, self.base.take(ids, dtype))

    def adapted_rows(self, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """Rows `[T, D]` of the table, with what adapters make of them."""
        beside = self.looked_up
        if beside is None:
            return rows
        slots, vocab, rank = beside.a.shape
        known = jnp.clip(self.slot, 0, slots - 1) * vocab + jnp.clip(ids, 0, vocab - 1)
        low = Dense(beside.a.reshape(-1, rank)).take(known, rows.dtype)
        return _expanded(jnp.tile(low, slots), beside, rows.astype(jnp.float32), self.slot, 1.0).astype(rows.dtype)

    def adapted_products(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Products `[T, out]` of `x [T, in]` with the weight, of which `tensor` splits the outputs alone, with what
        adapters make of them."""
        if self.beside is None:
            return out

        def part(x: jax.Array, slot: jax.Array, beside: LowRank, out: jax.Array) -> jax.Array:
            return _added(x, [beside], [out], slot, 1.0)[0]

        if on_each_already() or self.axes is None:
            return part(x, self.slot, self.beside, out)
        whole, columns = PartitionSpec(), PartitionSpec(None, on_axes(self.axes, TENSOR)[0])
        specs = _on_tensor(self.beside, LowRank.axes(self.axes).arrays)  # type: ignore[arg-type]
        product: jax.Array = on_tensor(part, (whole, whole, specs, columns), columns)(x, self.slot, self.beside, out)
        return product

    def __getitem__(self, index: int | slice | jax.Array) -> NoReturn:
        raise TypeError("a weight with adapters has no parts")


def _on_tensor(tree: Any, axes: Sequence[Axes]) -> Any:
    """How `tensor` splits arrays of these axes."""
    return jax.tree.unflatten(jax.tree.structure(tree), [on_axes(own, TENSOR) for own in axes])


def _dots(x: jax.Array, weights: Sequence[Adapted], split_over: SplitOver) -> list[jax.Array]:
    """What one device makes of its parts."""
    bases, beside = [weight.base for weight in weights], [weight.beside for weight in weights if weight.beside]
    slot, share = weights[0].slot, 1.0 if split_over is None else 1.0 / lax.axis_size(split_over)  # of a shift: once

    def apart() -> list[jax.Array]:
        return _added(x, beside, type(bases[0]).dots(x, bases, split_over), slot, share)

    channels = [own for base in bases if (own := base.channels) is not None]
    if len(channels) < len(bases):
        return apart()
    return adapted_products(x, slot, channels, [own.arrays for own in beside], share, bases[0].rounds, apart)


def _added(
    x: jax.Array, beside: Sequence[LowRank], outs: Sequence[jax.Array], slot: jax.Array, share: float
) -> list[jax.Array]:
    """Products with what each row's adapter makes of them."""
    assert len(x) == len(slot), "each row of activations has an adapter, or none"

    def at_once() -> list[jax.Array]:
        flat = [by_xla(x, [own.a.reshape(-1, own.a.shape[-1])])[0].astype(x.dtype) for own in beside]
        return [_expanded(low, own, out, slot, share) for low, own, out in zip(flat, beside, outs, strict=True)]

    return low_rank(x, slot, outs, [own.arrays for own in beside], share, at_once)


def _expanded(low: jax.Array, beside: LowRank, out: jax.Array, slot: jax.Array, share: float) -> jax.Array:
    """Products with what all slots add at once, `low [T, S * R]`, of which each row keeps its own: that makes wide
    products of narrow ones, whatever the mix."""
    slots, rank, columns = beside.b.shape
    assert beside.gain is not None
    assert beside.shift is not None
    mine = (slot[:, None] == jnp.arange(slots, dtype=jnp.int32)).astype(jnp.float32)
    low = low * jnp.repeat(mine, rank, axis=1).astype(low.dtype)
    added = out + _product(low, beside.b.reshape(slots * rank, columns))
    return added + added * _product(mine, beside.gain - 1) + _product(mine, beside.shift * share)


def _product(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low [T, R]` times `b [R, out]`, float32."""
    precision = lax.Precision.HIGHEST if low.dtype == jnp.float32 else None
    return jnp.matmul(low, b.astype(low.dtype), precision=precision, preferred_element_type=jnp.float32)
