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
class Adapted(Weight):
    """A weight `[out, in]` with adapters.

    base: the weight. beside: those.
    slot: i32[T], whose each row of what it is multiplied with is; S for nobody's.
    """

    base: Weight
    beside: LowRank
    slot: jax.Array

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
        return [*self.base.array_axes, *vars(beside).values(), (None,)]

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
    bases, slot = [weight.base for weight in weights], weights[0].slot
    assert len(x) == len(slot), "each row of activations has an adapter, or none"
    outs = type(bases[0]).dots(x, bases, split_over)
    share = 1.0 if split_over is None else 1.0 / lax.axis_size(split_over)  # of a shift, which is added once

    def at_once() -> list[jax.Array]:
        return [_at_once(x, weight.beside, out, slot, share) for weight, out in zip(weights, outs, strict=True)]

    adapters = [tuple(vars(weight.beside).values()) for weight in weights]
    return low_rank(x, slot, outs, adapters, share, at_once)


def _at_once(x: jax.Array, beside: LowRank, out: jax.Array, slot: jax.Array, share: float) -> jax.Array:
    """With what all slots add, of which each row keeps its own: wide products, whatever the mix."""
    slots, rank, _ = beside.a.shape
    mine = (slot[:, None] == jnp.arange(slots, dtype=jnp.int32)).astype(jnp.float32)
    (low,) = by_xla(x, [beside.a.reshape(slots * rank, -1)])
    low = (low * jnp.repeat(mine, rank, axis=1)).astype(x.dtype)
    added = out + _expanded(low, beside.b.reshape(slots * rank, -1))
    return added + added * _expanded(mine, beside.gain - 1) + _expanded(mine, beside.shift * share)


def _expanded(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low [T, R]` times `b [R, out]`, float32."""
    precision = lax.Precision.HIGHEST if low.dtype == jnp.float32 else None
    return jnp.matmul(low, b.astype(low.dtype), precision=precision, preferred_element_type=jnp.float32)
