"""A weight in fewer bits."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jaxinfer.kernels.cpu import grouped_products, grouped_products_int4, products_int4
from jaxinfer.kernels.tpu import Form, Kept
from jaxinfer.kernels.tpu import grouped_products as grouped_products_on_tpu
from jaxinfer.quantization.activations import quantize_last
from jaxinfer.quantization.schemes import TABLES, Scheme
from jaxinfer.weights.products import by_xla, on_each, on_each_already, products
from jaxinfer.weights.weight import Axes, SplitOver, Weight, by_tiles

PRODUCT = 2**23  # weights that are dequantized at a time, where they have to be


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class QArray(Weight):
    """A weight `[..., out, in]`, as `qvalue * scale`.

    qvalue, scale: arrays as `Scheme.arrays` says.
    scheme: how it is quantized.
    axes: see Weight.
    rounds: activations in float32 that it is multiplied with may be rounded to bfloat16 where that is faster.
    zero_point: of a scheme that has them, and then it is `(qvalue - zero_point) * scale`.
    bias: of a scheme that has them, and then it is `qvalue * scale + bias`.

    Of a scheme with a table it is that table's number at `qvalue` that is scaled.

    Scales of whole channels are applied to the product, and weights with others dequantized to x's dtype some rows at a
    time, so that no weight is ever there in full.
    """

    qvalue: jax.Array
    scale: jax.Array
    scheme: Scheme = field(metadata={"static": True})
    axes: Axes | None = field(default=None, metadata={"static": True})
    rounds: bool = field(default=False, metadata={"static": True})
    zero_point: jax.Array | None = None
    bias: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.qvalue.shape
        return *rows, columns * self.scheme.packed

    @property
    def group(self) -> Hashable:
        return self.scheme

    @property
    def array_axes(self) -> list[Axes]:
        axes = self.axes or (None,) * self.qvalue.ndim
        return [axes, *(axes_of_scales(axes, self.scheme) for _ in self.scheme.companions)]

    @property
    def channels(self) -> tuple[jax.Array, ...] | None:
        return None if self.scheme.columns or self.scheme.activations else (self.qvalue, self.scale[:, 0])

    @property
    def kept(self) -> Kept:
        others = (array for array in (self.zero_point, self.bias) if array is not None)
        return Kept(self.qvalue, (self.scale, *others), _form(self.scheme))

    @classmethod
    def dots(cls, x: jax.Array, weights: Sequence[Self], split_over: SplitOver) -> list[jax.Array]:
        if weights[0].scheme.columns:
            return _of_blocks(x, weights)
        axes, values = [weight.axes for weight in weights], tuple(weight.qvalue for weight in weights)
        if weights[0].scheme.activations:
            x, factors = quantize_last(x, jnp.int8, split_over)
            outs = [out.astype(jnp.float32) * factors for out in products(x, values, axes)]
        else:
            outs = products(x, values, axes, weights[0].rounds)
        return [out * weight.scale[:, 0] for out, weight in zip(outs, weights, strict=True)]

    @classmethod
    def grouped_dots(cls, x: jax.Array, sizes: jax.Array, weights: Sequence[Self]) -> list[jax.Array]:
        scheme = weights[0].scheme

        def by_loop() -> list[jax.Array]:
            return grouped_products_on_tpu(
                x, sizes, [weight.kept for weight in weights], lambda: by_tiles(x, sizes, weights)
            )

        if scheme.biases or (scheme.columns and not _by_int4(scheme)):
            return by_loop()
        if scheme.columns:
            options = weights[0].rounds, TABLES.get(scheme.table, ())
            return grouped_products_int4(x, sizes, _int4_arrays(weights), by_loop, *options)
        values = tuple(weight.qvalue for weight in weights)
        scales = tuple(weight.scale[..., 0] for weight in weights)
        rows, factors = quantize_last(x, jnp.int8) if scheme.activations else (x, None)
        return grouped_products(rows, sizes, values, by_loop, weights[0].rounds, scales, factors)

    def take(self, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
        values = self.qvalue.at[ids].get(mode="clip")
        block = ids // self.scheme.rows
        scales = self.scale.at[block].get(mode="clip")
        zeros, biases = (
            None if array is None else array.at[block].get(mode="clip") for array in (self.zero_point, self.bias)
        )
        parts = _dequantized(values, scales, zeros, biases, self.scheme, dtype)
        return jnp.stack(parts, axis=-1).reshape(len(ids), -1)

    def __getitem__(self, index: int | slice | jax.Array) -> Self:
        qvalue, scale = self.qvalue[index], self.scale[index]
        zero_point, bias = (None if array is None else array[index] for array in (self.zero_point, self.bias))
        axes = self.axes and self.axes[len(self.axes) - qvalue.ndim :]
        return replace(self, qvalue=qvalue, scale=scale, zero_point=zero_point, bias=bias, axes=axes)


@functools.cache
def _form(scheme: Scheme) -> Form:
    """For kernels on TPUs."""
    read = functools.partial(_looked_up, table=TABLES[scheme.table]) if scheme.table else None
    return Form(
        scheme.rows,
        scheme.columns,
        scheme.packed,
        _e2m1 if scheme.table == "e2m1" else read,
        scheme.zeros,
        scheme.biases,
        scheme.activations,
    )


def axes_of_scales(axes: Axes, scheme: Scheme) -> Axes:
    """The logical axes of a quantized weight's scales."""
    return (*axes[:-1], axes[-1] if scheme.columns else None)


def _of_blocks(x: jax.Array, weights: Sequence[QArray]) -> list[jax.Array]:
    """Products with weights whose scales are of blocks. Each device of `tensor` loops over its own rows: XLA can't cut
    a loop in parts."""
    known = [weight.axes for weight in weights if weight.axes is not None]
    if on_each_already() or len(known) < len(weights):
        return _rows_in_turn(x, weights)
    outs: list[jax.Array] = on_each(_rows_in_turn, known)(x, tuple(weights))
    return outs


def _rows_in_turn(x: jax.Array, weights: Sequence[QArray]) -> list[jax.Array]:
    def by_loop() -> list[jax.Array]:
        return [_by_loop(x, weight) for weight in weights]

    scheme = weights[0].scheme
    if _by_int4(scheme):
        options = weights[0].rounds, TABLES.get(scheme.table, ())
        outs = products_int4(x, _int4_arrays(weights), by_loop, *options)
    else:
        outs = by_loop()
    if not scheme.biases:
        return outs
    # A block's bias is multiplied with the sum of its inputs: a small product beside the other.
    sums = jnp.sum(x.astype(jnp.float32).reshape(x.shape[0], -1, scheme.columns), axis=2)
    biases = [weight.bias for weight in weights if weight.bias is not None]
    return [out + more for out, more in zip(outs, by_xla(sums, biases), strict=True)]


def _by_int4(scheme: Scheme) -> bool:
    """Whether the CPU kernel for four bits is for weights of this scheme."""
    return scheme.packed == 2 and scheme.rows == 1


def _int4_arrays(weights: Sequence[QArray]) -> list[tuple[jax.Array, ...]]:
    zeros = ((weight.zero_point,) if weight.zero_point is not None else () for weight in weights)
    return [(weight.qvalue, weight.scale, *own) for weight, own in zip(weights, zeros, strict=True)]


def _by_loop(x: jax.Array, weight: QArray) -> jax.Array:
    scheme, count = weight.scheme, weight.qvalue.shape[0]
    most = max(PRODUCT // x.shape[1] // 128, 1) * 128  # whole blocks
    size = next((n for n in range(most, most // 2, -128) if count % n == 0), min(most, count))
    columns = [x[:, i :: scheme.packed] for i in range(scheme.packed)]

    def product(start: jax.Array | int, size: int) -> jax.Array:
        values = _rows(weight.qvalue, start, size)

        def of_rows(array: jax.Array) -> jax.Array:
            blocks = _rows(array, start // scheme.rows, -(-size // scheme.rows))
            return jnp.repeat(blocks, scheme.rows, axis=0)[:size]

        zeros = None if weight.zero_point is None else of_rows(weight.zero_point)
        parts = _dequantized(values, of_rows(weight.scale), zeros, None, scheme, x.dtype)
        outs = (products(x, (part,), [None])[0] for x, part in zip(columns, parts, strict=True))
        return sum(outs, start=jnp.float32(0))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(out, product(i * size, size), i * size, axis=1)

    if size == count:
        return product(0, size)
    whole = count // size
    out = lax.fori_loop(0, whole, step, jnp.zeros((x.shape[0], count), jnp.float32))
    rest = count - whole * size
    return out.at[:, whole * size :].set(product(whole * size, rest)) if rest else out


def _rows(array: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Some rows, which the TPU compiler has to lay out as the array is: it would make a copy of the array otherwise. It
    has those transposed whose rows are no whole tiles, as it would have the slices."""
    rows = lax.dynamic_slice_in_dim(array, start, size)
    return rows if array.shape[1] % 128 else with_layout_constraint(rows, Layout((0, 1)))


def _dequantized(
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    biases: jax.Array | None,
    scheme: Scheme,
    dtype: DTypeLike,
) -> list[jax.Array]:
    """Rows of a weight in this dtype: all columns, or where bytes have two values the even and the odd ones, as putting
    them together costs more on TPU than the rest. scales, zeros, biases: of each row."""
    if scheme.table:
        read = _e2m1 if scheme.table == "e2m1" else functools.partial(_looked_up, table=TABLES[scheme.table])
        parts = [read(half) for half in (values & 15, values >> 4)]
    elif scheme.packed == 2:
        high = lax.bitcast_convert_type(values, jnp.int8)
        parts = [lax.shift_right_arithmetic(half, jnp.int8(4)) for half in (high << 4, high)]
    else:
        parts = [values]
    columns = values.shape[1]

    def of_columns(blocks: jax.Array) -> jax.Array:  # the last one may be cut
        return jnp.repeat(blocks.astype(jnp.float32), (scheme.columns or columns) // scheme.packed, axis=1)[:, :columns]

    parts = [part.astype(jnp.float32) for part in parts]
    parts = parts if zeros is None else [part - of_columns(zeros) for part in parts]
    parts = [part * of_columns(scales) for part in parts]
    parts = parts if biases is None else [part + of_columns(biases) for part in parts]
    return [part.astype(dtype) for part in parts]


def _e2m1(places: jax.Array) -> jax.Array:
    """TABLES' numbers of that name, without looking them up, which takes twice as many instructions: as float32 with
    the same exponent and mantissa. The two below 1 are made as 1 more than they are, as they would be subnormal."""
    size = (places & 7).astype(jnp.int32)
    low = (size < 2).astype(jnp.int32)
    bits = (size << 22) + ((low + 126) << 23)
    magnitude = lax.bitcast_convert_type(bits, jnp.float32) - low.astype(jnp.float32)
    return jnp.where(places & 8 != 0, -magnitude, magnitude)


def _looked_up(places: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """A table's numbers, each place's bits taking one half of what is left: 15 selects in the loop that scales them. Of
    a gather the compiler for TPU makes the same, of more instructions."""
    numbers = [jnp.float32(number) for number in table]
    for bit in range(4):
        odd = places & (1 << bit) != 0
        numbers = [jnp.where(odd, high, low) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]
