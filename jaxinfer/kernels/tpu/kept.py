"""Weights of experts as kernels for TPUs take them: as they are kept, to become numbers in fast memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # the last axis of an array comes in multiples of this
BLOCK = 128  # outputs that are dequantized at a time


@dataclass(frozen=True)
class Form:
    """How a weight is kept, as `Scheme` says.

    rows, columns: of a block with a scale; columns 0: each output has one.
    packed: values in a byte; of two the even input's is in the low four bits.
    read: makes float32 numbers of such values, int32; None: they are two's complement.
    zeros, biases: blocks have zero points, biases.
    activations: those that it is multiplied with become int8, too.
    """

    rows: int = 1
    columns: int = 0
    packed: int = 1
    read: Callable[[jax.Array], jax.Array] | None = None
    zeros: bool = False
    biases: bool = False
    activations: bool = False


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Kept:
    """A weight `[E, out, in]`.

    values: `[E, out, in / packed]`.
    blocks: its scales, zero points and biases `[E, out / rows, in / columns]`; none of a weight in floats.
    form: of weights that are not in floats.
    """

    values: jax.Array
    blocks: tuple[jax.Array, ...] = ()
    form: Form | None = field(default=None, metadata={"static": True})

    @property
    def outs(self) -> int:
        return self.values.shape[1]

    @property
    def ins(self) -> int:
        return self.values.shape[2] * (self.form.packed if self.form else 1)

    def suits(self, dtype: Any) -> bool:
        """Whether kernels multiply activations of this dtype with it."""
        whole = LANES * (self.form.packed if self.form else 1)
        known = dtype in (jnp.bfloat16, jnp.float32) and (self.form is not None or self.values.dtype == dtype)
        return known and self.outs % LANES == 0 and self.ins % whole == 0

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """As the kernel reads them, each the size of its tiles in the last two axes."""
        if self.form is None:
            return (self.values,)
        scales, *others = self.blocks
        if scales.dtype == jnp.float8_e8m0fnu:
            scales = lax.bitcast_convert_type(scales, jnp.uint8)
        if not self.form.columns:
            return self.values, scales.reshape(len(scales), 1, -1)
        if self.form.rows > 1:
            return self.values, scales[:, :, None]
        return self.values, scales, *others

    def blocks_of(self, outs: int, ins: int) -> list[tuple[tuple[int, ...], Callable[..., tuple[Any, ...]]]]:
        """Shapes of blocks of the arrays for so many outputs and inputs, and their places by expert, block of outputs
        and block of inputs. Of a weight with blocks of columns inputs are not cut."""
        if self.form is None:
            return [((1, outs, ins), lambda e, n, k: (e, n, k))]
        found: list[Any] = [((1, outs, ins // self.form.packed), lambda e, n, k: (e, n, k))]
        groups = self.blocks[0].shape[2]
        if not self.form.columns:
            found.append(((1, 1, outs), lambda e, n, k: (e, 0, n)))
        elif self.form.rows > 1:
            found.append(((1, outs // self.form.rows, 1, groups), lambda e, n, k: (e, n, 0, 0)))
        else:
            found += [((1, outs, groups), lambda e, n, k: (e, n, 0)) for _ in self.blocks]
        return found


def floats_of(form: Form | None, dtype: Any) -> Any:
    """The dtype that values become before they are multiplied; None: they are as they are kept."""
    return None if form is None or form.activations else dtype


def arrays_of(form: Form | None) -> int:
    """How many there are of such a weight."""
    return 1 if form is None else 2 + form.zeros + form.biases


def bytes_of(kept: Kept, outs: int, ins: int) -> int:
    """Of a block in fast memory, where tiles are whole."""
    return sum(
        math.prod(shape[:-2]) * -(-shape[-2] // 8) * 8 * -(-shape[-1] // LANES) * LANES * array.dtype.itemsize
        for (shape, _), array in zip(kept.blocks_of(outs, ins), kept.arrays, strict=True)
    )


def dequantize(refs: list[Any], form: Form, out: Any) -> None:
    """Of a block of a weight, the first of `refs [1, ...]`, `out [outs, ins]`: without the scales of whole outputs, and
    of packed values those of even inputs before all of odd ones."""
    values, *blocks = refs
    half = values.shape[2]

    def some(i: jax.Array, _: None) -> None:
        lines = pl_ds(i * BLOCK)
        own = values[0, lines]
        if form.packed == 1:
            parts = [own.astype(jnp.float32)]
        elif form.read is not None:
            whole = own.astype(jnp.int32)
            parts = [form.read(whole & 15), form.read(whole >> 4)]
        else:
            whole = own.astype(jnp.int32)
            parts = [((whole << shift) >> 28).astype(jnp.float32) for shift in (28, 24)]
        if form.columns:
            of_blocks = [_floats(b[0, i] if form.rows > 1 else b[0, lines]) for b in blocks]
            of_blocks = [_spread(b, half, form.columns // form.packed) for b in of_blocks]
            scales, *others = of_blocks
            if form.zeros:
                parts = [part - others[0] for part in parts]
            parts = [part * scales for part in parts]
            if form.biases:
                parts = [part + others[-1] for part in parts]
        for n, part in enumerate(parts):
            out[lines, n * half : (n + 1) * half] = part.astype(out.dtype)

    lax.fori_loop(0, values.shape[1] // BLOCK, some, None)


def pl_ds(start: Any) -> Any:
    """BLOCK lines from there on."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(start, BLOCK), BLOCK)


def _floats(blocks: jax.Array) -> jax.Array:
    if blocks.dtype == jnp.uint8:  # exponents, of powers of two
        return lax.bitcast_convert_type(blocks.astype(jnp.int32) << 23, jnp.float32)
    return blocks.astype(jnp.float32)


def _spread(blocks: jax.Array, count: int, width: int) -> jax.Array:
    """`[n, G]`, each of them as often as it has values: `[n, count]`. Of a tile's lanes, as one vector has them."""
    lines, groups = max(len(blocks), 8), blocks.shape[1]
    whole = jnp.broadcast_to(blocks, (lines, groups))
    whole = jnp.pad(whole, ((0, 0), (0, -groups % LANES)))
    pieces = []
    for begin in range(0, count, LANES):
        first = begin // width // LANES * LANES
        lane = (begin + lax.broadcasted_iota(jnp.int32, (lines, LANES), 1)) // width - first
        pieces.append(jnp.take_along_axis(whole[:, first : first + LANES], lane, axis=1, mode="promise_in_bounds"))
    return jnp.concatenate(pieces, axis=1)[: len(blocks)]


def prepared(x: jax.Array, form: Form | None, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Activations `[m, K]` as they meet a weight's values, and what the product is multiplied with, `[m, 1]`."""
    if form is None:
        return x.astype(dtype), None
    if form.activations:
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        factors = jnp.maximum(largest, float(jnp.finfo(jnp.float32).tiny) * 127) / 127
        return jnp.round(x / factors).astype(jnp.int32).astype(jnp.int8), factors
    x = x.astype(dtype)
    return (_parted(x) if form.packed == 2 else x), None


def _parted(x: jax.Array) -> jax.Array:
    """Even columns, then odd ones: by products with ones and zeros, which are exact, as the matrix unit is much faster
    than shuffling lanes."""
    line, column = (lax.broadcasted_iota(jnp.int32, (2 * LANES, 2 * LANES), axis) for axis in (0, 1))
    chosen = (line == 2 * (column % LANES) + column // LANES).astype(jnp.float32).astype(x.dtype)
    pieces = [x[:, i : i + 2 * LANES] for i in range(0, x.shape[1], 2 * LANES)]
    pieces = [dot(piece, chosen, 0).astype(x.dtype) for piece in pieces]
    return jnp.concatenate([piece[:, i : i + LANES] for i in (0, LANES) for piece in pieces], axis=1)


def product(x: tuple[jax.Array, jax.Array | None], values: jax.Array, refs: list[Any], form: Form | None) -> jax.Array:
    """Of prepared activations and a block's values `[n, K]`: float32 `[m, n]`."""
    rows, factors = x
    out = dot(rows, values, 1)
    if form is not None and not form.columns:
        out = out * refs[1][0]
    return out if factors is None else out * factors


def dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """Summed in float32, of integers in int32; of float32 at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    out = lax.dot_general(a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=kind)
    return out.astype(jnp.float32)


def for_tpu() -> bool:
    """Whether what is traced may be for a TPU: elsewhere nobody needs to wait for Pallas to be imported."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def has_little_memory() -> bool:
    """Whether it is for a TPU before v5, which has 16 MiB of fast memory and multiplies no int8."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
