"""Tensors of a checkpoint into a model's parameters: strict both ways, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.safetensors import aligned
from jaxinfer.models.model import Model, Params
from jaxinfer.models.weights import Source

FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def load_params(
    model: Model, checkpoint: Checkpoint, device: jax.Device, on_tensor: Callable[[int], None] | None = None
) -> Params:
    """All parameters of `model`, in its dtype, on the device. Host memory: the result plus one tensor.

    `on_tensor` is told the bytes of each tensor read. Raises one ValueError with every missing, unknown, duplicate,
    misshaped and wrongly typed tensor.
    """
    sources = {name: model.weights.source(name) for name in model.abstract}
    located = _locate(model, checkpoint, sources)
    params: Params = {}
    for name, shape in model.abstract.items():
        source = sources[name]
        value = checkpoint.read(located[source.name], _part(checkpoint.tensors[located[source.name]].shape, source))
        if on_tensor is not None:
            on_tensor(value.nbytes)
        value = value.T if source.transpose else value
        if value.dtype != shape.dtype or source.transpose:
            value = _converted(value, shape.dtype, f"{checkpoint.folder}: {located[source.name]}")
        params[name] = jax.device_put(value, device)
        # One tensor at a time: a queue of pending transfers would hold them all.
        params[name].block_until_ready()
    return params


def _locate(model: Model, checkpoint: Checkpoint, sources: dict[str, Source]) -> dict[str, str]:
    """The name in the checkpoint of each source tensor, with or without the model's prefix; or one ValueError."""
    prefix = model.weights.prefix
    stored = checkpoint.tensors
    located: dict[str, str] = {}
    known: set[str] = set()
    missing, duplicate, shapes, types = [], [], [], []
    for name, source in sources.items():
        names = [n for n in dict.fromkeys((source.name, source.name.removeprefix(prefix))) if n in stored]
        if not names:
            missing.append(source.name)
            continue
        known.update(names)
        if len(names) > 1:
            duplicate.append(f"{names[0]} (also as {names[1]})")
        info = stored[names[0]]
        located[source.name] = names[0]
        wanted = _stored_shape(model.abstract[name].shape, source)
        if info.shape != wanted:
            shapes.append(f"{names[0]} {list(info.shape)} instead of {list(wanted)}")
        elif info.dtype not in FLOATS:
            types.append(f"{names[0]} is {info.dtype}")
    unknown = [n for n in stored if n not in known and not model.weights.is_ignored(n)]
    problems = [
        f"{label}: {some(dict.fromkeys(names))}"
        for label, names in (
            ("missing tensors", missing),
            ("unknown tensors", unknown),
            ("tensors stored twice", duplicate),
            ("wrong shapes", shapes),
            ("wrong dtypes (bfloat16, float16 and float32 are read)", types),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(problems)}")
    return located


def _stored_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    whole = (shape[0] * source.parts, *shape[1:])
    return whole[::-1] if source.transpose else whole


def _part(stored: tuple[int, ...], source: Source) -> tuple[slice, ...] | None:
    """The slice of the stored tensor that holds this part of the out axis."""
    if source.parts == 1:
        return None
    axis = len(stored) - 1 if source.transpose else 0
    size = stored[axis] // source.parts
    return tuple(
        slice(source.part * size, (source.part + 1) * size) if i == axis else slice(0, n) for i, n in enumerate(stored)
    )


def _converted(
    value: np.ndarray[Any, np.dtype[Any]], dtype: np.dtype[Any], where: str
) -> np.ndarray[Any, np.dtype[Any]]:
    """A copy in C order and in another dtype, aligned so that XLA:CPU makes no third one."""
    result = aligned(value.size * dtype.itemsize).view(dtype).reshape(value.shape)
    with np.errstate(over="ignore"):
        np.copyto(result, value, casting="unsafe")
    # Only float16 has less range than what it is cast from.
    if dtype == np.float16 and np.isinf(result).any():
        raise ValueError(f"{where}: has values beyond float16's 65504; use dtype bfloat16 or float32")
    return result
