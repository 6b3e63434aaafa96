"""Linears in bitsandbytes' four bits, as its QuantState is written.

Of a linear `X [out, in]`, its weights in a row, of which each `blocksize` have one scale, their largest:

- `X.weight`, two values a byte, the first in the high four bits, as `[n, 1]` of uint8 or of floats with these bytes.
- `X.weight.absmax`, the scales, float32; or as uint8 the places of them, less their mean, in
  `X.weight.nested_quant_map [256]`, scaled by `X.weight.nested_absmax`, of which each 256 have one.
- `X.weight.quant_map [16]`, what values stand for, which follows from the kind.
- `X.weight.quant_state.bitsandbytes__nf4` (or fp4), JSON in uint8: kind, blocksize, shape and that mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.quantization.schemes import TABLES
from jaxinfer.quantization.stored import BLOCK_SIZES, Format

Host = np.ndarray[Any, Any]
STATE = "weight.quant_state.bitsandbytes__"  # and the kind
STATE_BYTES = 2**12  # some 170 are usual
NESTED = 256  # of scales, a block
STORAGE = tuple(np.dtype(kind) for kind in (np.uint8, np.float16, ml_dtypes.bfloat16, np.float32))


def blocks(form: Format, rows: int, columns: int) -> int:
    """How many a linear has; the last may be cut."""
    return -(-rows * columns // form.columns)


def values_and_scales(form: Format, stored: Mapping[str, Host], rows: int, columns: int) -> tuple[Host, Host]:
    """uint8 `[out, in]` and f32 `[out, G]`, of groups that end with their row: a block that does not is as many as it
    takes. Raises ValueError where tensors contradict each other."""
    state = read_state(stored[STATE + form.table])
    for name, value in (("quant_type", form.table), ("blocksize", form.columns), ("shape", [rows, columns])):
        if state.get(name) != value:
            raise ValueError(f"has {name} {state.get(name)!r:.100} in its quant_state instead of {value!r}")
    if not np.allclose(stored["weight.quant_map"], TABLES[form.table], rtol=0, atol=1e-6):
        raise ValueError(f"has a quant_map that is not that of {form.table}")
    packed = np.ascontiguousarray(stored["weight"]).reshape(-1).view(np.uint8)
    if not 0 <= packed.size - (size := -(-rows * columns // 2)) < stored["weight"].itemsize:
        raise ValueError(f"has {packed.size} bytes of values instead of {size}")
    values = np.empty((packed.size, 2), np.uint8)
    values[:, 0], values[:, 1] = packed >> 4, packed & 15
    size = math.gcd(form.columns, columns)
    scales = np.repeat(_scales(stored, state), form.columns // size)[: rows * columns // size]
    return values.reshape(-1)[: rows * columns].reshape(rows, columns), scales.reshape(rows, -1)


def read_state(tensor: Host) -> dict[str, Any]:
    """What a quant_state says. Raises ValueError if it is no JSON object with a block size that there is."""
    try:
        state = json.loads(tensor.tobytes().decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError("has a quant_state that is no JSON object")
    size = state.get("blocksize")
    if type(size) is not int or size not in BLOCK_SIZES:
        raise ValueError(
            f"has blocksize {size!r:.100} in its quant_state: {', '.join(map(str, BLOCK_SIZES))} can be read"
        )
    return state


def _scales(stored: Mapping[str, Host], state: Mapping[str, Any]) -> Host:
    """Of each block."""
    scales = stored["weight.absmax"]
    nested = [stored.get(f"weight.nested_{name}") for name in ("absmax", "quant_map")]
    if scales.dtype != np.uint8:
        if any(tensor is not None for tensor in nested):
            raise ValueError("has scales of scales, and an absmax in float32, which needs none")
    else:
        of_scales, table = nested
        if of_scales is None or table is None:
            raise ValueError("has an absmax in uint8, and no nested_absmax or no nested_quant_map")
        mean, size = state.get("nested_offset"), state.get("nested_blocksize")
        if not isinstance(mean, float) or size != NESTED:
            raise ValueError(
                f"has nested_offset {mean!r:.100} and nested_blocksize {size!r:.100} in its quant_state: a float, and "
                f"{NESTED}, are needed"
            )
        scales = table[scales] * np.repeat(of_scales, NESTED)[: len(scales)] + np.float32(mean)
    if not np.isfinite(scales).all():
        raise ValueError("has an absmax that is not finite")
    return scales
