"""Weights to values and scales, and back, on the host."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  numpy's names of fewer bits
import numpy as np

from jaxinfer.quantization.schemes import SCALE, TABLES, Scheme

BLOCK = 2**20  # weights that are quantized at a time: what is needed for that are a few times 4 MB
Host = np.ndarray[Any, Any]


def quantize(weight: Host, scheme: Scheme) -> tuple[Host, Host]:
    """Values and scales of `weight [..., out, in]`: the nearest multiples of each block's scale. A few rows at a time,
    so that this takes little memory besides. Raises ValueError for weights that are not finite."""
    arrays = {suffix: np.empty(shape, np.dtype(kind)) for suffix, (shape, kind) in scheme.arrays(*weight.shape).items()}
    values, scales = arrays[""], arrays[SCALE]
    for index in np.ndindex(weight.shape[:-2]):
        _quantize(weight[index], scheme, values[index], scales[index])
    return values, scales


def dequantize(values: Host, scales: Host, scheme: Scheme) -> Host:
    """The weight f32 `[..., out, in]` that they stand for."""
    if scheme.packed == 2:
        values = unpack(values)
        values = values if scheme.table else (values ^ 8).astype(np.int8) - np.int8(8)
    rows, columns = values.shape[-2:]
    weight = np.asarray(TABLES[scheme.table], np.float32)[values] if scheme.table else values.astype(np.float32)
    scales = np.repeat(scales.astype(np.float32), scheme.rows, axis=-2)[..., :rows, :]
    weight *= np.repeat(scales, scheme.columns or columns, axis=-1)[..., :columns]
    return weight


def _quantize(weight: Host, scheme: Scheme, values: Host, scales: Host) -> None:
    count, columns = weight.shape
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
        scale = scale if scheme.scales == "float32" else _power_of_two(blocks, scale, scheme)
        blocks /= scale
        if scheme.table:
            some = _places(some, TABLES[scheme.table])
        elif scheme.values != "float8_e4m3fn":
            np.rint(some, out=some)
        scales[start // high : -(-(start + rows) // high)] = scale[:, 0, :, 0]
        values[start : start + rows] = pack(some) if scheme.packed == 2 else some[:rows, :columns]


def _power_of_two(blocks: Host, scale: Host, scheme: Scheme) -> Host:
    """Of the two powers of two around each block's scale the one that leaves the smaller error: with the lower one the
    largest weights are cut off."""
    _, exponent = np.frexp(scale)
    table = np.asarray(TABLES[scheme.table], np.float32)
    lower, upper = (np.ldexp(np.float32(1), np.maximum(exponent - less, -126)) for less in (1, 0))

    def error(power: Host) -> Host:
        rounded = table[_places(blocks / power, TABLES[scheme.table])] * power
        return np.sum(np.square(rounded - blocks), axis=(1, 3), keepdims=True)

    return np.where(error(lower) <= error(upper), lower, upper)


def pack(values: Host) -> Host:
    """Integers of four bits, signed or not, `[..., in]`, as uint8 `[..., in / 2]`: that of the even column in the low
    four bits."""
    low = values.astype(np.int8).view(np.uint8) & 15
    return low[..., ::2] | low[..., 1::2] << 4


def unpack(values: Host) -> Host:
    """It again, unsigned."""
    return np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def _places(scaled: Host, table: tuple[float, ...]) -> Host:
    """Where in a table each one's nearest number is."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    numbers = np.asarray(table)[order]
    places = np.zeros(scaled.shape, np.uint8)
    for middle in ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32):
        places += scaled > middle
    return order[places]
