"""The dtypes that a model is kept and computed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.load import FLOATS
from jaxinfer.checkpoint.open import Weights, dtypes_of
from jaxinfer.kernels.cpu import multiplies
from jaxinfer.models.wrapped import with_text
from jaxinfer.sharding import compute_capability, devices_of


def choose_dtype(
    wanted: str, config: Mapping[str, Any], checkpoint: Weights | None, placement: jax.Device | Mesh
) -> np.dtype[Any]:
    """The dtype of weights: see EngineConfig. Without a checkpoint, what it stores is taken for bfloat16."""
    names = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if wanted != "auto":
        return np.dtype(names[wanted])
    fields = with_text(config)
    name = str(fields.get("dtype", fields.get("torch_dtype"))).removeprefix("torch.")
    if name in names:
        dtype = np.dtype(names[name])
    elif checkpoint is None:
        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        stored = dtypes_of(config, checkpoint).values()
        dtype = next((dtype for dtype in stored if dtype in FLOATS), np.dtype(np.float32))
    device = devices_of(placement)[0]
    if device.platform == "cpu" and computes_in(dtype, placement) == dtype:
        return np.dtype(np.float32)
    if (compute_capability(device) or 8.0) < 8.0 and dtype != np.float32:
        return np.dtype(np.float16)
    return dtype


def computes_in(dtype: np.dtype[Any], placement: jax.Device | Mesh) -> np.dtype[Any]:
    """The dtype of activations where weights have this one: the same, but float32 for bfloat16 where a kernel
    multiplies the two, which is as fast and more exact."""
    on_cpu = devices_of(placement)[0].platform == "cpu"
    wide = on_cpu and dtype == ml_dtypes.bfloat16 and multiplies("float32", "bfloat16")
    return np.dtype(np.float32) if wide else dtype
