"""A quantized weight and the products that take one where they take an array."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.kernels.cpu import alone, multiplies, products, products_int4
from jaxinfer.kernels.cpu import take as take_by_kernel
from jaxinfer.quantization.activations import quantize_last
from jaxinfer.quantization.schemes import Scheme
from jaxinfer.sharding import TENSOR, axes_of, on_axes, on_tensor

BLOCK = 2**20  # weights that are quantized at a time: what is needed for that are a few times 4 MB
PRODUCT = 2**22  # weights that are dequantized at a time, where they have to be


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class QArray:
    """A weight `[out, in]`, as `values * scales`, which are arrays as `Scheme.arrays` says. axes: its logical axes.
    rounds: activations in float32 that it is multiplied with may be rounded to bfloat16 where that is faster. zeros: of
    a scheme that has them, and then it is `(values - zeros) * scales`."""

    values: jax.Array
    scales: jax.Array
    scheme: Scheme = field(metadata={"static": True})
    axes: tuple[str | None, ...] = field(default=(None, None), metadata={"static": True})
    rounds: bool = field(default=False, metadata={"static": True})
    zeros: jax.Array | None = None


Weight = jax.Array | QArray
Axes = tuple[str | None, ...]


def dot(
    x: jax.Array,
    weight: Weight,
    out_dtype: DTypeLike | None = None,
    *,
    axes: Axes | None = None,
    split_over: str | None = None,
) -> jax.Array:
    """See dots; of one weight."""
    return dots(x, [weight], out_dtype, axes=None if axes is None else [axes], split_over=split_over)[0]


def dots(
    x: jax.Array,
    weights: Sequence[Weight],
    out_dtype: DTypeLike | None = None,
    *,
    axes: Sequence[Axes] | None = None,
    split_over: str | None = None,
) -> list[jax.Array]:
    """`x [T, in]` times each `weight [out, in]` transposed: `[T, out]`, accumulated in float32.

    float32 operands are multiplied at full precision: the default on TPU and GPU would round them to bfloat16 or tf32.
    Scales of whole channels are applied to the product, and weights with others dequantized to x's dtype some rows at
    a time, so that no weight is ever there in full. axes: the weights' logical axes, from which CPU kernels know what a
    mesh splits. split_over: the mesh axis over which `in` is split, inside of a shard_map over it; activations are then
    quantized as if they were not, and the result is the part's.
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    if len({_kind(weight) for weight in weights}) > 1:
        each = [None] * len(weights) if axes is None else axes
        pairs = zip(weights, each, strict=True)
        return [dot(x, weight, dtype, axes=own, split_over=split_over) for weight, own in pairs]
    quantized = [weight for weight in weights if isinstance(weight, QArray)]
    if not quantized:
        plain = tuple(weight for weight in weights if not isinstance(weight, QArray))
        outs = _products(x, plain, axes, rounds=plain[0].dtype == jnp.bfloat16)
    elif quantized[0].scheme.columns:
        outs = _of_blocks(x, quantized)
    else:
        axes, values = [weight.axes for weight in quantized], tuple(weight.values for weight in quantized)
        if quantized[0].scheme.activations:
            x, factors = quantize_last(x, jnp.int8, split_over)
            outs = [out.astype(jnp.float32) * factors for out in _products(x, values, axes)]
        else:
            outs = _products(x, values, axes, quantized[0].rounds)
        outs = [out * weight.scales[:, 0] for out, weight in zip(outs, quantized, strict=True)]
    return [out.astype(dtype) for out in outs]


def _kind(weight: Weight) -> object:
    return weight.scheme if isinstance(weight, QArray) else weight.dtype


def _products(
    x: jax.Array, weights: tuple[jax.Array, ...], axes: Sequence[Axes] | None, rounds: bool = False
) -> list[jax.Array]:
    """By a CPU kernel if there is one for these types."""
    split = None if axes is None or _on_each_already() else functools.partial(_on_each, axes=axes)
    if x.ndim != 2 or not multiplies(x.dtype.name, weights[0].dtype.name) or not alone(TENSOR if split else ()):
        return _by_xla(x, weights)
    return products(x, weights, _by_xla, rounds, split)


def _by_xla(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return [
        lax.dot_general(x, weight.astype(x.dtype), dimensions, precision=precision, preferred_element_type=kind)
        for weight in weights
    ]


def _on_each_already() -> bool:
    """Whether this is what each device of `tensor` does, or there is no such axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not set(TENSOR) <= set(mesh.axis_names) or bool(set(TENSOR) & set(mesh.manual_axes))


def _on_each(call: Any, axes: Sequence[Axes]) -> Any:
    """A call that multiplies x with weights, as one that each device of `tensor` does with its parts of them."""
    specs = tuple(on_axes(own, TENSOR) for own in axes)
    over = axes_of(specs[0], 1)

    def part(x: jax.Array, weights: Any) -> list[jax.Array]:
        outs = call(x, weights)
        return [lax.psum(out, over) for out in outs] if over else list(outs)

    out_specs = [PartitionSpec(None, spec[0]) for spec in specs]
    return on_tensor(part, (PartitionSpec(None, specs[0][1]), specs), out_specs)


def _of_blocks(x: jax.Array, weights: Sequence[QArray]) -> list[jax.Array]:
    """Products with weights whose scales are of blocks. Each device of `tensor` loops over its own rows: XLA can't cut
    a loop in parts."""
    if _on_each_already():
        return _rows_in_turn(x, weights)
    outs: list[jax.Array] = _on_each(_rows_in_turn, [weight.axes for weight in weights])(x, tuple(weights))
    return outs


def _rows_in_turn(x: jax.Array, weights: Sequence[QArray]) -> list[jax.Array]:
    def by_loop() -> list[jax.Array]:
        return [_by_loop(x, weight) for weight in weights]

    if weights[0].scheme.packed == 1 or weights[0].scheme.rows > 1:
        return by_loop()
    zeros = ((weight.zeros,) if weight.zeros is not None else () for weight in weights)
    given = [(weight.values, weight.scales, *own) for weight, own in zip(weights, zeros, strict=True)]
    return products_int4(x, given, by_loop, weights[0].rounds)


def _by_loop(x: jax.Array, weight: QArray) -> jax.Array:
    scheme, count = weight.scheme, weight.values.shape[0]
    most = max(PRODUCT // x.shape[1] // 128, 1) * 128  # whole blocks
    size = next((n for n in range(most, most // 2, -128) if count % n == 0), min(most, count))
    columns = [x[:, i :: scheme.packed] for i in range(scheme.packed)]

    def product(start: jax.Array | int, size: int) -> jax.Array:
        values = _rows(weight.values, start, size)

        def of_rows(array: jax.Array) -> jax.Array:
            blocks = _rows(array, start // scheme.rows, -(-size // scheme.rows))
            return jnp.repeat(blocks, scheme.rows, axis=0)[:size]

        zeros = None if weight.zeros is None else of_rows(weight.zeros)
        parts = _dequantized(values, of_rows(weight.scales), zeros, scheme, x.dtype)
        outs = (dot(x, part, out_dtype=jnp.float32) for x, part in zip(columns, parts, strict=True))
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
    values: jax.Array, scales: jax.Array, zeros: jax.Array | None, scheme: Scheme, dtype: DTypeLike
) -> list[jax.Array]:
    """Rows of a weight in this dtype: all columns, or where bytes have two values the even and the odd ones, as putting
    them together costs more on TPU than the rest. scales, zeros: of each row."""
    if scheme.packed == 2:
        high = lax.bitcast_convert_type(values, jnp.int8)
        parts = [lax.shift_right_arithmetic(half, jnp.int8(4)) for half in (high << 4, high)]
    else:
        parts = [values]
    columns = values.shape[1]

    def of_columns(blocks: jax.Array) -> jax.Array:  # the last one may be cut
        return jnp.repeat(blocks.astype(jnp.float32), (scheme.columns or columns) // scheme.packed, axis=1)[:, :columns]

    parts = [part.astype(jnp.float32) for part in parts]
    parts = parts if zeros is None else [part - of_columns(zeros) for part in parts]
    return [(part * of_columns(scales)).astype(dtype) for part in parts]


def take(weight: Weight, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of a table `[rows, D]`: `[T, D]` in this dtype. ids beyond it give its last row."""
    if not isinstance(weight, QArray):
        # XLA:CPU gathers no 16-bit floats: it would make a float32 copy of the table each time. Integers it does.
        by_bits = weight.dtype.itemsize == 2
        found = (
            lax.platform_dependent(weight, ids, cpu=_taken_on_cpu, default=_taken) if by_bits else _taken(weight, ids)
        )
        return found.astype(dtype)
    values = weight.values.at[ids].get(mode="clip")
    block = ids // weight.scheme.rows
    scales = weight.scales.at[block].get(mode="clip")
    zeros = None if weight.zeros is None else weight.zeros.at[block].get(mode="clip")
    parts = _dequantized(values, scales, zeros, weight.scheme, dtype)
    return jnp.stack(parts, axis=-1).reshape(len(ids), -1)


def _taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].get(mode="clip")


def _taken_on_cpu(table: jax.Array, ids: jax.Array) -> jax.Array:
    return take_by_kernel(table, ids, _taken_by_bits)


def _taken_by_bits(table: jax.Array, ids: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_taken(lax.bitcast_convert_type(table, jnp.uint16), ids), table.dtype)


def axes_of_scales(axes: Sequence[str | None], scheme: Scheme) -> tuple[str | None, ...]:
    """The logical axes of a quantized weight's scales."""
    return (axes[0], axes[1] if scheme.columns else None)


def quantize(weight: np.ndarray[Any, Any], scheme: Scheme) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Values and scales of `weight [out, in]`, on the host: the nearest multiples of each block's scale. A few rows
    at a time, so that this takes little memory besides. Raises ValueError for weights that are not finite."""
    count, columns = weight.shape
    values, scales = (np.empty(shape, jnp.dtype(kind)) for shape, kind in scheme.arrays(count, columns).values())
    high, wide = scheme.rows, scheme.columns or columns
    size = max(1, BLOCK // max(columns * high, 1)) * high
    for start in range(0, count, size):
        some = weight[start : start + size].astype(np.float32, order="C")
        rows = len(some)
        some = np.pad(some, [(0, -rows % high), (0, -columns % wide)]) if rows % high or columns % wide else some
        blocks = some.reshape(-1, high, some.shape[1] // wide, wide)
        largest = np.max(np.abs(blocks), axis=(1, 3), keepdims=True, initial=0)
        if not np.isfinite(largest).all():
            raise ValueError(f"has values that are not finite, which can't be quantized to {scheme.name}")
        scale = np.maximum(largest / np.float32(scheme.largest), np.finfo(np.float32).tiny)
        blocks /= scale
        if scheme.values != "float8_e4m3fn":
            np.rint(some, out=some)
        scales[start // high : -(-(start + rows) // high)] = scale[:, 0, :, 0]
        values[start : start + rows] = pack(some) if scheme.packed == 2 else some[:rows, :columns]
    return values, scales


def pack(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers from -8 to 7, `[out, in]`, as uint8 `[out, in / 2]`: that of the even column in the low four bits."""
    low = values.astype(np.int8).view(np.uint8) & 15
    return low[:, ::2] | low[:, 1::2] << 4
