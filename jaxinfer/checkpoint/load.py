"""Tensors of a checkpoint into a model's parameters: strict both ways, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.memory import Host, HugePages
from jaxinfer.checkpoint.quantized import Wanted, check_range, decode, wanted_tensors
from jaxinfer.checkpoint.safetensors import aligned
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import Model, Params, scales
from jaxinfer.models.weights import Source
from jaxinfer.quantization.qarray import quantize
from jaxinfer.sharding import Index, parts

FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def load_params(
    model: Model,
    checkpoint: Checkpoint,
    place: jax.Device | Mesh,
    on_tensor: Callable[[int], None] | None = None,
    only: Collection[str] | None = None,
) -> Params:
    """All parameters of `model`, or `only` some of them, in its dtype, on the device, or split over the mesh. Host
    memory: the result plus one tensor. Only what this process's devices hold is read, and once; of weights to be
    quantized, all columns of its rows, as they share a scale, and all of those that the checkpoint has quantized. On a
    mesh MLP width and vocabulary are padded with zeros to what it divides.

    `on_tensor` is told the bytes of each tensor read. Raises one ValueError with every missing, unknown, duplicate,
    misshaped and wrongly typed tensor.
    """
    sources = {name: model.weights.source(name) for name in model.abstract if name not in model.beside}
    located = _locate(model, checkpoint, sources)
    params: Params = {}
    memory = HugePages()
    for name, source in sources.items():
        if only is not None and name not in only:
            continue
        if name in model.stored:
            params |= _stored(model, name, source, place, checkpoint, located, on_tensor, memory)
            continue
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
            params |= _quantized(model, name, place, read, where, memory)
        else:
            whole = model.placed(name, place)
            held = ((i, d, read(i)) for i, d in parts(whole.sharding, whole.shape).items())
            params[name] = _put(whole, held, where, memory)
    return params


def _put(whole: Any, held: Iterable[tuple[Index, list[Any], Host]], where: str, memory: HugePages) -> jax.Array:
    """An array of parts: of each, its place, the devices that hold it, and what is in it."""
    arrays = []
    for index, devices, value in held:
        wanted = tuple(stop - start for start, stop in index)
        if value.dtype != whole.dtype or not value.flags.c_contiguous or value.shape != wanted:
            value = _converted(value, wanted, whole.dtype, where)
        if devices[0].platform == "cpu":
            value = memory.copied(value)
        arrays += [jax.device_put(value, device) for device in devices]
        # One tensor at a time: a queue of pending transfers would hold them all.
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, arrays)


def _quantized(
    model: Model, name: str, place: jax.Device | Mesh, read: Callable[[Index], Host], where: str, memory: HugePages
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
        result[one] = _put(whole, held(whole, which), where, memory)
    return result


def _stored(
    model: Model,
    name: str,
    source: Source,
    place: jax.Device | Mesh,
    checkpoint: Checkpoint,
    located: Mapping[str, str],
    on_tensor: Callable[[int], None] | None,
    memory: HugePages,
) -> dict[str, jax.Array]:
    """The parameters of a weight that the checkpoint has quantized: as it is, or converted."""
    form, (rows, columns) = model.stored[name], model.shape(name)
    base = source.name.removesuffix("weight")
    found = {
        suffix: checkpoint.read(located[base + suffix])
        for suffix in wanted_tensors(form, rows * source.parts, columns)
        if base + suffix in located
    }
    if on_tensor is not None:
        on_tensor(sum(array.nbytes for array in found.values()))
    where = f"{checkpoint.folder}: {base.removesuffix('.')}"
    try:
        decoded = decode(form, found, rows * source.parts, columns)
        if source.parts > 1:
            decoded = decoded.rows(slice(rows * source.part, rows * (source.part + 1)))
        scheme = model.quantized.get(name)
        arrays = {"": decoded.floats(model.abstract[name].dtype)} if scheme is None else decoded.kept(scheme)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    result = {}
    for suffix, array in arrays.items():
        whole = model.placed(name + suffix, place)
        held = parts(whole.sharding, whole.shape).items()
        of = ((index, devices, array[tuple(slice(*part) for part in index)]) for index, devices in held)
        result[name + suffix] = _put(whole, of, where, memory)
    return result


def _wanted(model: Model, sources: Mapping[str, Source]) -> dict[str, Wanted]:
    """The tensors that there should be."""
    found: dict[str, Wanted] = {}
    for name, source in sources.items():
        shape = model.shape(name)
        if name in model.stored:
            tensors = wanted_tensors(model.stored[name], shape[0] * source.parts, shape[1])
            found |= {source.name.removesuffix("weight") + suffix: one for suffix, one in tensors.items()}
        else:
            found[source.name] = Wanted((source.shape(shape),), FLOATS)
    return found


def _locate(model: Model, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> dict[str, str]:
    """The name in the checkpoint of each tensor, with or without the model's prefix; or one ValueError."""
    weights, tied = model.weights, model.config.tie_word_embeddings
    stored = checkpoint.tensors
    located: dict[str, str] = {}
    known: set[str] = set()
    missing, duplicate, shapes, types = [], [], [], []
    for name, wanted in _wanted(model, sources).items():
        names = [n for n in weights.spellings(name) if n in stored]
        if not names and tied and name == weights.embedding and weights.head in stored:
            names = [weights.head]  # saved with the head alone
        if not names:
            if not wanted.optional:
                missing.append(name)
            continue
        known.update(names)
        if len(names) > 1:
            duplicate.append(f"{names[0]} (also as {names[1]})")
        info = stored[names[0]]
        located[name] = names[0]
        if info.shape not in wanted.shapes:
            shapes.append(
                f"{names[0]} {list(info.shape)} instead of {' or '.join(str(list(s)) for s in wanted.shapes)}"
            )
        elif info.dtype not in wanted.dtypes:
            read = "" if wanted.dtypes is FLOATS else f" instead of {' or '.join(map(str, wanted.dtypes))}"
            types.append(f"{names[0]} is {info.dtype}{read}")
    known |= {weights.head} if tied else set()
    unknown = [n for n in stored if n not in known and not weights.is_ignored(n)]
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
        raise CheckpointError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(problems)}")
    return located


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
    check_range(result, f"{where}: ")
    return result
