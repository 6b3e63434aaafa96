"""Tensors of checkpoints that are quantized already: which there are, and what is in them.

Of a linear `X [out, in]`, with G groups of inputs and n = 32 / bits:

- plain: `X.weight [out, in]`, int8 or e4m3, and its scales: one, one a row `[out, 1]`, one a group `[out, G]`, one a
  block `[out / rows, in / columns]`, rounded up (weight_scale_inv is DeepSeek's name, and is multiplied with, too).
- packed: `X.weight_packed` int32 `[out, in / n]`, the first of n values in the lowest bits, each plus half its range;
  scales; zero points `X.weight_zero_point` packed likewise along out; `X.weight_g_idx [in]`, the group of each input.
- gptq: `X.qweight` int32 `[in / n, out]`, packed along in; `X.qzeros` int32 `[G, out / n]`, packed along out, of which
  the first version has stored one less, unless writers were wrong about it, which shows where all are in the middle;
  `X.scales [G, out]`, `X.g_idx [in]`. A weight is (value - zero) * scale.
- awq: `X.qweight` int32 `[in, out / 8]` and `X.qzeros` int32 `[G, out / 8]`, packed along out in the order 0, 2, 4, 6,
  1, 3, 5, 7; `X.scales [G, out]`.
- mlx: `X.weight` uint32 `[out, in / n]`, the bits of a row's values one after the other, from the lowest on, also where
  32 bits are no whole number of them; `X.scales [out, G]` and `X.biases [out, G]`. A weight is value * scale + bias.
- mxfp4: `X_blocks` uint8 `[out, G, 16]`, places in the table of e2m1, the even column's in the low four bits, and
  `X_scales` uint8 `[out, G]`, powers of two, plus 127. MLX has the same bytes as `X.weight` uint32 `[out, in / 8]` and
  `X.scales`.
- bitsandbytes: see bitsandbytes.py. In eight bits it is as plain, with scales `X.SCB [out]` of 127.

Of several linears in one tensor (mlx, mxfp4) the shapes begin with how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.bitsandbytes import NESTED, STATE, STATE_BYTES, STORAGE, blocks, values_and_scales
from jaxinfer.quantization.quantize import BLOCK, pack, unpack
from jaxinfer.quantization.schemes import BIAS, SCALE, TABLES, ZERO, Scheme
from jaxinfer.quantization.stored import Format

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]
INTEGERS = tuple(np.dtype(kind) for kind in (np.int32, np.int64))
SCALES = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))
AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclass(frozen=True)
class Wanted:
    """A tensor that there should be.

    shapes, dtypes: those that it may have.
    optional: whether it may be missing.
    most: how many bytes it may have instead, along one axis.
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[np.dtype[Any], ...]
    optional: bool = False
    most: int = 0

    def fits(self, shape: Shape) -> bool:
        return shape in self.shapes or (len(shape) == 1 and shape[0] <= self.most)

    @property
    def wanted(self) -> str:
        """The shapes, for a message."""
        return " or ".join(str(list(shape)) for shape in self.shapes) or f"at most [{self.most}]"


def wanted_tensors(form: Format, *size: int) -> dict[str, Wanted]:
    """The tensors of a linear `[..., out, in]`, by what is added to its name."""
    stack, rows, columns = size[:-2], size[-2], size[-1]
    words, bytes_, singles = ((np.dtype(kind),) for kind in (np.int32, np.uint8, np.float32))
    if form.layout == "bitsandbytes":
        count, half = blocks(form, rows, columns), -(-rows * columns // 2)
        return {
            "weight": Wanted(tuple((-(-half // n), 1) for n in (1, 2, 4)), STORAGE),
            "weight.absmax": Wanted(((count,),), singles + bytes_),
            "weight.quant_map": Wanted(((16,),), singles),
            STATE + form.table: Wanted((), bytes_, most=STATE_BYTES),
            "weight.nested_absmax": Wanted(((-(-count // NESTED),),), singles, optional=True),
            "weight.nested_quant_map": Wanted(((256,),), singles, optional=True),
        }
    if form.layout == "mlx":
        values = Wanted(((*stack, rows, columns * form.bits // 32),), (np.dtype(np.uint32),))
        return {"weight": values} | dict.fromkeys(
            ("scales", "biases"), Wanted(((*stack, rows, columns // form.columns),), SCALES)
        )
    if form.layout == "mxfp4":
        of_scales = *stack, rows, -(-columns // form.columns)
        scales = {form.scale: Wanted((of_scales,), bytes_)}
        if form.scale == "scales":  # MLX's
            return scales | {"weight": Wanted(((*stack, rows, columns // 8),), (np.dtype(np.uint32),))}
        return scales | {"_blocks": Wanted(((*of_scales, form.columns // 2),), bytes_)}
    assert not stack
    fit = 32 // form.bits
    groups = -(-columns // form.columns) if form.columns else 1
    order = Wanted(((columns,),), INTEGERS, optional=form.ordered)
    if form.layout in ("gptq", "awq"):
        shape = (-(-columns // fit), rows) if form.layout == "gptq" else (columns, -(-rows // fit))
        return {
            "qweight": Wanted((shape,), words),
            "qzeros": Wanted(((groups, -(-rows // fit)),), words),
            "scales": Wanted(((groups, rows),), SCALES),
        } | ({"g_idx": order} if form.layout == "gptq" else {})
    high = -(-rows // form.rows) if form.rows else 1
    shapes: tuple[Shape, ...] = ((high, groups),)
    if groups == 1:
        shapes += ((high,), *([()] if high == 1 else []))
    tensors = {form.scale: Wanted(shapes, SCALES)}
    if form.inputs:
        tensors["input_scale"] = Wanted(((), (1,), (1, 1)), SCALES)
    if form.scale == "SCB":
        tensors["weight_format"] = Wanted(((), (1,)), bytes_, optional=True)
    if form.layout == "plain":
        kind = np.dtype(ml_dtypes.float8_e4m3fn if form.floats else np.int8)
        zero = {"weight_zero_point": Wanted(shapes, (np.dtype(np.int8),))} if form.zeros else {}
        return tensors | {"weight": Wanted(((rows, columns),), (kind,))} | zero
    zero = {"weight_zero_point": Wanted(((-(-rows // fit), groups),), words)} if form.zeros else {}
    return (
        tensors
        | {
            "weight_packed": Wanted(((rows, -(-columns // fit)),), words),
            "weight_shape": Wanted(((2,),), INTEGERS, optional=True),
            "weight_g_idx": order,
        }
        | zero
    )


@dataclass(frozen=True)
class Decoded:
    """A linear: `(values - zeros) * scales + biases`.

    form: how it was stored.
    values: `[out, in]`, as they are, or unsigned, or places in the format's table, of mxfp4 two in a byte.
    zeros: integers `[out, G]`; None: zero.
    scales: f32 `[out, G]`, or for blocks of rows `[out / rows, G]`; of mxfp4 e8m0.
    order: i64 `[in]`, the group of each input; None: they are in order.
    biases: f32 `[out, G]`; None: zero.
    """

    form: Format
    values: Host
    zeros: Host | None
    scales: Host
    order: Host | None = None
    biases: Host | None = None

    def rows(self, part: slice | Host) -> Decoded:
        """Some rows; only of formats that have scales for each, or one for all."""
        assert self.form.rows <= 1
        own = part if self.form.rows else slice(None)
        zeros, biases = (None if array is None else array[own] for array in (self.zeros, self.biases))
        return Decoded(self.form, self.values[part], zeros, self.scales[own], self.order, biases)

    def kept(self, scheme: Scheme) -> dict[str, Host]:
        """The arrays of `Scheme.arrays`, with the same values to the bit; but a bias in float32 may be rounded, when
        what is taken off the values to make them signed is added to it."""
        values, zeros, biases, half = self.values, self.zeros, self.biases, 2 ** (self.form.bits - 1)
        if self.form.layout != "plain" and not scheme.table:
            values = values - np.uint8(half)
            zeros = None if zeros is None else (zeros.astype(np.int16) - half).astype(np.int8)
            biases = None if biases is None else biases + np.float32(half) * self.scales
        if self.form.layout != "mxfp4":
            values = pack(values) if scheme.packed == 2 else values.view(scheme.values)
        rows = len(self.values) if self.form.rows == 0 else len(self.scales)
        arrays = {"": values, SCALE: np.broadcast_to(self.scales, (rows, self.scales.shape[1]))}
        more = {ZERO: zeros, BIAS: biases}
        return arrays | {
            suffix: array for suffix, array in more.items() if suffix in scheme.companions and array is not None
        }

    def floats(self, dtype: np.dtype[Any]) -> Host:
        """The weight in this dtype, computed in float32 a few rows at a time."""
        count, columns = len(self.values), self.values.shape[1] * (2 if self.form.layout == "mxfp4" else 1)
        order = self.order
        if order is None:
            order = np.arange(columns) // (
                columns // self.scales.shape[1] if self.form.table else self.form.columns or columns
            )
        result = np.empty((count, columns), dtype)
        for start in range(0, count, size := max(BLOCK // columns, 1)):
            rows = np.arange(start, min(start + size, count))
            some = self.values[rows]
            some = unpack(some) if self.form.layout == "mxfp4" else some
            some = np.asarray(TABLES[self.form.table], np.float32)[some] if self.form.table else some.astype(np.float32)
            if self.zeros is not None:
                some -= self.zeros[rows].astype(np.float32)[:, order]
            scales = self.scales[rows // self.form.rows if self.form.rows else rows * 0]
            some *= scales.astype(np.float32)[:, order]
            if self.biases is not None:
                some += self.biases[rows][:, order]
            with np.errstate(over="ignore"):
                result[rows] = some
        check_range(result)
        return result


def check_range(cast: Host, where: str = "") -> None:
    """Raises ValueError for values that a cast has made infinite: only float16 has less range than what it is from."""
    if cast.dtype == np.float16 and np.isinf(cast).any():
        raise ValueError(f"{where}has values beyond float16's 65504; use dtype bfloat16 or float32")


def decode(form: Format, stored: Mapping[str, Host], rows: int, columns: int) -> Decoded:
    """What is in the tensors of a linear, by what is added to its name, of several in one as if one were below the
    other; those that are optional may be missing. Raises ValueError where they contradict each other."""
    if form.layout == "bitsandbytes":
        values, scales = values_and_scales(form, stored, rows, columns)
        return Decoded(form, values, None, scales)
    if form.layout == "mlx":
        scales, biases = (stored[name].astype(np.float32).reshape(rows, -1) for name in ("scales", "biases"))
        if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
            raise ValueError("has scales or biases that are not finite")
        return Decoded(form, _unpacked(stored["weight"].reshape(rows, -1), form.bits), None, scales, biases=biases)
    if form.layout == "mxfp4":
        exponents, values = stored[form.scale].reshape(rows, -1), stored["_blocks" if "_blocks" in stored else "weight"]
        if exponents.max(initial=0) == 255:
            raise ValueError("has scales of 255, which is no number")
        # 2**-127 is no normal number, which processors take for zero: it becomes the least that is one.
        scales = np.maximum(exponents, 1).view(ml_dtypes.float8_e8m0fnu)
        return Decoded(form, values.reshape(rows, -1).view(np.uint8), None, scales)
    order = stored.get("g_idx", stored.get("weight_g_idx"))
    groups = -(-columns // form.columns) if form.columns else 1
    if order is not None and (order.min() < 0 or order.max() >= groups):
        raise ValueError(f"has groups from {order.min()} to {order.max()} in g_idx, of {groups}")
    if form.ordered and order is not None:
        if np.any(order != np.arange(columns) // (form.columns or columns)):
            raise ValueError("has inputs that are not in the order of their groups, and config.json says that they are")
        order = None
    if form.layout in ("gptq", "awq"):
        values, zeros = stored["qweight"], _unpacked(stored["qzeros"], form.bits)
        values = _unpacked(np.ascontiguousarray(values.T), form.bits) if form.layout == "gptq" else _unpacked(values, 4)
        if form.layout == "awq":
            values, zeros = (array.reshape(len(array), -1, 8)[..., np.argsort(AWQ_ORDER)] for array in (values, zeros))
            values, zeros = values.reshape(columns, -1).T, zeros.reshape(groups, -1)
        zeros = zeros.T[:rows]
        zeros = (zeros + np.uint8(form.offset)) & np.uint8(2**form.bits - 1) if form.zeros else _middle(form, zeros)
        scales = stored["scales"].astype(np.float32).T
        return Decoded(form, values[:rows, :columns], zeros, scales, order)
    scales = stored[form.scale].astype(np.float32)
    scales = scales.reshape(-(-rows // form.rows) if form.rows else 1, groups)
    if form.scale == "SCB":
        scales /= np.float32(127)
        if (kind := stored.get("weight_format")) is not None and kind != 0:
            raise ValueError(f"has weight_format {kind}: 0, rows one after the other, can be read")
    point = stored.get("weight_zero_point")
    if form.layout == "plain":
        return Decoded(form, stored["weight"], None if point is None else point.reshape(scales.shape), scales, order)
    shape = stored.get("weight_shape")
    if shape is not None and shape.tolist() != [rows, columns]:
        raise ValueError(f"has {shape.tolist()} in weight_shape instead of {[rows, columns]}")
    values = _unpacked(stored["weight_packed"], form.bits)[:, :columns]
    if point is None:
        zeros = np.full(scales.shape, 2 ** (form.bits - 1), np.uint8)
    else:
        zeros = _unpacked(np.ascontiguousarray(point.T), form.bits).T[:rows]
    return Decoded(form, values, zeros, scales, order)


def _middle(form: Format, stored: Host) -> Host:
    """The zero points of a symmetric linear: half the range. Whether that or one less is stored is not always what
    config.json's version says. Raises ValueError for any other."""
    half = np.uint8(2 ** (form.bits - 1))
    if not np.all(stored == half) and not np.all(stored == half - 1):
        raise ValueError(f"has zero points other than {half}, and config.json says that it is symmetric")
    return np.full_like(stored, half)


def _unpacked(words: Host, bits: int) -> Host:
    """int32 or uint32 `[n, m]` as the uint8 `[n, 32 m / bits]` that are in them, those in the lowest bits first."""
    whole = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return whole
    count = 8 // math.gcd(bits, 8)  # values, in whole bytes
    whole = whole.reshape(len(whole), -1, bits * count // 8)
    values = np.empty((*whole.shape[:2], count), np.uint8)
    for i in range(count):
        at, shift = divmod(i * bits, 8)
        values[..., i] = whole[..., at] >> shift
        if shift + bits > 8:
            values[..., i] |= whole[..., at + 1] << (8 - shift)
    values &= 2**bits - 1
    return values.reshape(len(whole), -1)
