"""Tensors of a checkpoint into a model's parameters: strict both ways, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.safetensors import aligned
from jaxinfer.models.model import Model, Params, scales
from jaxinfer.models.weights import Source
from jaxinfer.quantization.qarray import quantize
from jaxinfer.sharding import Index, parts

Host = np.ndarray[Any, np.dtype[Any]]
FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def load_params(
    model: Model, checkpoint: Checkpoint, place: jax.Device | Mesh, on_tensor: Callable[[int], None] | None = None
) -> Params:
    """All parameters of `model`, in its dtype, on the device, or split over the mesh. Host memory: the result plus one
    tensor. Only what this process's devices hold is read, and once; of weights to be quantized, all columns of its
    rows, as they share a scale. On a mesh MLP width and vocabulary are padded with zeros to what it divides.

    `on_tensor` is told the bytes of each tensor read. Raises one ValueError with every missing, unknown, duplicate,
    misshaped and wrongly typed tensor.
    """
    made = {scales(name) for name in model.quantized}
    sources = {name: model.weights.source(name) for name in model.abstract if name not in made}
    located = _locate(model, checkpoint, sources)
    params: Params = {}
    for name, source in sources.items():
        shape, stored = model.shape(name), located[source.name]

        def read(index: Index, shape: tuple[int, ...] = shape, source: Source = source, stored: str = stored) -> Host:
            """The part of the weight that is not padding."""
            real = tuple((min(start, n), min(stop, n)) for (start, stop), n in zip(index, shape, strict=True))
            value = checkpoint.read(stored, _stored_index(real, shape, source))
            if on_tensor is not None:
                on_tensor(value.nbytes)
            return value.T if source.transpose else value

        where = f"{checkpoint.folder}: {stored}"
        if name in model.quantized:
            params |= _quantized(model, name, place, read, where)
        else:
            whole = model.placed(name, place)
            params[name] = _put(whole, ((i, d, read(i)) for i, d in parts(whole.sharding, whole.shape).items()), where)
    return params


def _put(whole: Any, held: Iterable[tuple[Index, list[Any], Host]], where: str) -> jax.Array:
    """An array of parts: of each, its place, the devices that hold it, and what is in it."""
    arrays = []
    for index, devices, value in held:
        wanted = tuple(stop - start for start, stop in index)
        if value.dtype != whole.dtype or not value.flags.c_contiguous or value.shape != wanted:
            value = _converted(value, wanted, whole.dtype, where)
        arrays += [jax.device_put(value, device) for device in devices]
        # One tensor at a time: a queue of pending transfers would hold them all.
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, arrays)


def _quantized(
    model: Model, name: str, place: jax.Device | Mesh, read: Callable[[Index], Host], where: str
) -> dict[str, jax.Array]:
    """A weight's values and scales, from rows in full: they have one scale, also where columns are split."""
    scheme, count = model.quantized[name], model.abstract[name].shape[0]
    columns = (0, model.abstract[name].shape[1] * scheme.packed)
    found: dict[tuple[int, int], tuple[Host, Host]] = {}

    def held(whole: Any, which: int) -> Iterator[tuple[Index, list[Any], Host]]:
        for index, devices in parts(whole.sharding, whole.shape).items():
            (first, last), (start, stop) = index
            rows = scheme.rows if which else 1
            key = min(first * rows, count), min(last * rows, count)
            if key not in found:
                try:
                    found[key] = quantize(read((key, columns)), scheme)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
            yield index, devices, found[key][which][:, start:stop]

    result = {}
    for which, one in enumerate((name, scales(name))):
        whole = model.placed(one, place)
        result[one] = _put(whole, held(whole, which), where)
    return result


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
        wanted = _stored_shape(model.shape(name), source)
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


def _stored_index(index: Index, shape: tuple[int, ...], source: Source) -> tuple[slice, ...]:
    """Where a part of a weight lies in the stored tensor, which may have others before it on the out axis."""
    first = source.part * shape[0] if shape else 0
    slices = tuple(slice(start + first * (i == 0), stop + first * (i == 0)) for i, (start, stop) in enumerate(index))
    return slices[::-1] if source.transpose else slices


def _converted(
    value: np.ndarray[Any, np.dtype[Any]], shape: tuple[int, ...], dtype: np.dtype[Any], where: str
) -> np.ndarray[Any, np.dtype[Any]]:
    """A copy in C order, in another dtype and with zeros up to a larger shape, aligned so that XLA:CPU makes no third
    one."""
    result = aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    if value.shape != shape:
        result[...] = 0
    with np.errstate(over="ignore"):
        np.copyto(result[tuple(map(slice, value.shape))], value, casting="unsafe")
    # Only float16 has less range than what it is cast from.
    if dtype == np.float16 and np.isinf(result).any():
        raise ValueError(f"{where}: has values beyond float16's 65504; use dtype bfloat16 or float32")
    return result
