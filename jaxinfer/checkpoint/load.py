"""Tensors of a checkpoint into a model's parameters: strict both ways, one tensor at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.memory import Host, HugePages
from jaxinfer.checkpoint.quantized import Wanted, check_range, decode, wanted_tensors
from jaxinfer.checkpoint.tensors import aligned
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.models.params import ParamSpec, in_short
from jaxinfer.models.sources import Index, Region, Shape, Source, shape_of, slices, whole
from jaxinfer.models.weights import ParamMapping
from jaxinfer.quantization.quantize import dequantize, quantize
from jaxinfer.quantization.schemes import SCALE, Scheme
from jaxinfer.quantization.stored import Format
from jaxinfer.sharding import parts

log = logging.getLogger("jaxinfer")

# transformers' names of what others have otherwise.
OTHER_SCALES = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}
FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def load_params(
    model: AbstractModel,
    checkpoint: Checkpoint,
    placement: jax.Device | Mesh,
    on_array: Callable[[int], None] | None = None,
    only: Collection[str] | None = None,
) -> Params:
    """All parameters of `model`, or `only` some of them, in its dtype, on the device, or split over the mesh. Host
    memory: the result plus one tensor. Only what this process's devices hold is read, and once; of weights to be
    quantized, all columns of its rows, as they share a scale, and all of those that the checkpoint has quantized. On a
    mesh MLP width and vocabulary are padded with zeros to what it divides.

    `on_array` is told the bytes of each parameter that is there, `model.nbytes` in all. Raises one ValueError with all
    missing, unknown, duplicate, misshaped and wrongly typed tensors.
    """
    specs = [_spelled(spec, model.weights, checkpoint) for spec in model.params.values()]
    tensors = _Tensors(checkpoint, _locate(model, specs, checkpoint))
    _say_converted(model, specs, checkpoint, tensors.located)
    params: Params = {}
    memory = HugePages()
    for spec in specs:
        if only is not None and spec.name not in only:
            continue
        part_of = _part_of(spec, tensors)
        for suffix in spec.arrays:
            array = spec.with_sharding(suffix, placement)
            held = parts(array.sharding, array.shape).items()
            each = ((index, devices, part_of(suffix, index)) for index, devices in held)
            params[spec.name + suffix] = _put(array, each, tensors.where(spec), memory)
            if on_array is not None:
                on_array(spec.arrays[suffix].nbytes)
    return params


class FloatWeights:
    """A model's weights one at a time, on the host: those that the checkpoint has quantized, or that the model is to
    have so, as what they then stand for, in its dtype. Raises what load_params raises."""

    def __init__(self, model: AbstractModel, checkpoint: Checkpoint):
        specs = [_spelled(spec, model.weights, checkpoint) for spec in model.params.values()]
        self._specs = {spec.name: spec for spec in specs}
        self._tensors = _Tensors(checkpoint, _locate(model, specs, checkpoint))

    def tensors(self, name: str) -> list[str]:
        """The checkpoint's that a weight is made of."""
        located = self._tensors.located
        return [located[tensor] for tensor in _wanted([self._specs[name]]) if tensor in located]

    def read(self, name: str) -> Host:
        """One of them."""
        spec, tensors = self._specs[name], self._tensors
        if spec.stored is not None:
            spec = replace(spec, scheme=None)
        part_of, scheme = _part_of(spec, tensors), spec.scheme
        arrays = {suffix: part_of(suffix, whole(array.shape)) for suffix, array in spec.arrays.items()}
        return arrays[""] if scheme is None else dequantize(arrays[""], arrays[SCALE], scheme).astype(spec.dtype)


class _Tensors:
    """Those of a checkpoint, by the names that they should have."""

    def __init__(self, checkpoint: Checkpoint, located: dict[str, str]):
        self._checkpoint, self.located = checkpoint, located

    def where(self, spec: ParamSpec) -> str:
        """A weight's first tensor, for messages."""
        name = next(iter(spec.source.tensors(spec.shape)))
        name = self.located[name] if spec.stored is None else name.removesuffix(".weight")
        return f"{self._checkpoint.folder}: {name}"

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Host:
        return self._checkpoint.read(self.located[name], index)


def _part_of(spec: ParamSpec, tensors: _Tensors) -> Callable[[str, Index], Host]:
    """What gives a part of one of the weight's arrays."""
    if spec.stored is not None:
        return _Stored(spec, tensors, spec.stored)
    return _Plain(spec, tensors) if spec.scheme is None else _Quantizing(spec, tensors, spec.scheme)


class _Plain:
    """Parts of a weight as the checkpoint has it, without padding."""

    def __init__(self, spec: ParamSpec, tensors: _Tensors):
        self._spec, self._tensors = spec, tensors

    def __call__(self, suffix: str, index: Index) -> Host:
        pairs = zip(index, self._spec.shape, strict=True)
        real = tuple((min(start, size), min(stop, size)) for (start, stop), size in pairs)
        return self._spec.source.read(real, self._tensors.read)


class _Quantizing:
    """Parts of a weight that is quantized here, from whole rows: they have one scale, also where columns are split."""

    def __init__(self, spec: ParamSpec, tensors: _Tensors, scheme: Scheme):
        self._spec, self._tensors, self._scheme = spec, tensors, scheme
        self._cache: dict[Index, dict[str, Host]] = {}

    def __call__(self, suffix: str, index: Index) -> Host:
        *first, (start, stop), columns = index
        unit, (*shape, count, _) = self._scheme.rows if suffix else 1, self._spec.shape
        real = ((min(begin, size), min(end, size)) for (begin, end), size in zip(first, shape, strict=True))
        key = (*real, (min(start * unit, count), min(stop * unit, count)))
        if key not in self._cache:
            self._cache[key] = self._quantized((*key, (0, self._spec.shape[-1])))
        return self._cache[key][suffix][..., slice(*columns)]

    def _quantized(self, index: Index) -> dict[str, Host]:
        """One matrix at a time."""
        try:
            if len(index) == 2:
                return dict(zip(("", SCALE), quantize(self._read(index), self._scheme), strict=True))
            arrays = self._scheme.arrays(*shape_of(index))
            buffers = {suffix: np.empty(shape, np.dtype(kind)) for suffix, (shape, kind) in arrays.items()}
            for at in np.ndindex(*shape_of(index[:-2])):
                leading = tuple((start + i, start + i + 1) for (start, _), i in zip(index[:-2], at, strict=True))
                matrix = self._read((*leading, *index[-2:])).reshape(shape_of(index[-2:]))
                buffers[""][at], buffers[SCALE][at] = quantize(matrix, self._scheme)
        except ValueError as error:
            raise ValueError(f"{self._tensors.where(self._spec)}: {error}") from None
        return buffers

    def _read(self, index: Index) -> Host:
        return self._spec.source.read(index, self._tensors.read)


class _Stored:
    """Parts of a weight that the checkpoint has quantized: as it is, or converted."""

    def __init__(self, spec: ParamSpec, tensors: _Tensors, form: Format):
        self._spec, self._tensors, self._form = spec, tensors, form
        self._cache: dict[str, Host] = {}

    def __call__(self, suffix: str, index: Index) -> Host:
        if not self._cache:
            self._cache = self._arrays()
        return self._cache[suffix][tuple(slice(*part) for part in index)]

    def _arrays(self) -> dict[str, Host]:
        arrays: dict[str, Host] = {}
        for region, size, rows in _linears(self._spec):
            made = self._decoded(region, size, rows)
            if rows is None and math.prod(size) == math.prod(self._spec.shape):
                return {suffix: array.reshape(self._spec.arrays[suffix].shape) for suffix, array in made.items()}
            for suffix, array in made.items():
                if suffix not in arrays:
                    arrays[suffix] = np.empty(self._spec.arrays[suffix].shape, array.dtype)
                *first, of_rows, _ = region.index
                assert isinstance(of_rows, slice)
                unit = self._spec.scheme.rows if suffix and self._spec.scheme is not None else 1
                place = arrays[suffix][(*first, slice(of_rows.start // unit, -(-of_rows.stop // unit)))]
                place[...] = array.reshape(place.shape)
        return arrays

    def _decoded(self, region: Region, size: Shape, rows: Host | None) -> dict[str, Host]:
        base, tensors, form = region.tensor.removesuffix("weight"), self._tensors, self._form
        wanted = [suffix for suffix in wanted_tensors(form, *size) if base + suffix in tensors.located]
        try:
            stored = {suffix: tensors.read(base + suffix) for suffix in wanted}
            decoded = decode(form, stored, math.prod(size[:-1]), size[-1])
            decoded = decoded if rows is None else decoded.rows(rows)
            scheme = self._spec.scheme
            return {"": decoded.floats(self._spec.dtype)} if scheme is None else decoded.kept(scheme)
        except ValueError as error:
            raise ValueError(f"{tensors.where(self._spec)}: {error}") from None


def _linears(spec: ParamSpec) -> Iterator[tuple[Region, Shape, Host | None]]:
    """The quantized linears that a weight is made of: `[..., out, in]` of each, and which rows of it are wanted, those
    of the first in a tensor before those of the second; None: all."""
    shapes = spec.source.tensors(spec.shape)
    for region in spec.source.regions(whole(spec.shape)):
        size = _turned(shapes[region.tensor], region)
        rows = np.arange(math.prod(size[:-1])).reshape(size[:-1])[slices(_turned(region.stored, region)[:-1])]
        yield region, size, None if rows.size == math.prod(size[:-1]) else rows.reshape(-1)


def _turned(axes: tuple[Any, ...], region: Region) -> tuple[Any, ...]:
    """Those of a tensor as the weight has them."""
    return (*axes[:-2], *axes[-2:][::-1]) if region.transposed else axes


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


def _wanted(specs: Iterable[ParamSpec]) -> dict[str, Wanted]:
    """The tensors that there should be."""
    wanted: dict[str, Wanted] = {}
    for spec in specs:
        if spec.stored is None:
            wanted |= {name: Wanted((shape,), FLOATS) for name, shape in spec.source.tensors(spec.shape).items()}
            continue
        for region, size, _ in _linears(spec):
            base = region.tensor.removesuffix("weight")
            wanted |= {base + suffix: tensor for suffix, tensor in wanted_tensors(spec.stored, *size).items()}
    return wanted


def _spelled(spec: ParamSpec, weights: ParamMapping, checkpoint: Checkpoint) -> ParamSpec:
    """With the place that the checkpoint has it in, or most of it; of several such, the one whose shapes it has."""
    if not spec.elsewhere:
        return spec

    def there(place: tuple[Source, Format | None]) -> tuple[float, int]:
        wanted, tensors = _wanted([replace(spec, source=place[0], stored=place[1])]), checkpoint.tensors
        names = ((next((n for n in _spellings(weights, name) if n in tensors), None), wanted[name]) for name in wanted)
        fits = [tensor.fits(tensors[name].shape) for name, tensor in names if name is not None]
        return len(fits) / len(wanted), sum(fits)

    source, form = max([(spec.source, spec.stored), *spec.elsewhere], key=there)
    return replace(spec, source=source, stored=form, elsewhere=())


def _say_converted(
    model: AbstractModel, specs: Iterable[ParamSpec], checkpoint: Checkpoint, located: Mapping[str, str]
) -> None:
    """What becomes floats, in one line for all."""
    converted = {spec.name: spec for spec in specs if spec.stored is not None and spec.scheme is None}
    if converted:
        names = {located[name] for name in _wanted(converted.values()) if name in located}
        log.warning(
            "%s: %s can't be kept packed as stored: converted to %s, %s bytes instead of %s",
            checkpoint.folder,
            in_short(converted),
            model.weight_dtype,
            f"{sum(array.nbytes for spec in converted.values() for array in spec.arrays.values()):,}",
            f"{sum(checkpoint.tensors[name].nbytes for name in names):,}",
        )


def _locate(model: AbstractModel, specs: Iterable[ParamSpec], checkpoint: Checkpoint) -> dict[str, str]:
    """The name in the checkpoint of each tensor, with or without the model's prefix; or one ValueError."""
    weights, tied = model.weights, model.config.tie_word_embeddings
    stored = checkpoint.tensors
    located: dict[str, str] = {}
    known: set[str] = set()
    missing, duplicate, shapes, types = [], [], [], []
    for name, wanted in _wanted(specs).items():
        names = [n for n in _spellings(weights, name) if n in stored]
        if not names and tied and name == weights.embedding:
            names = [n for n in weights.spellings(weights.head) if n in stored]  # saved with the head alone
        if not names:
            if not wanted.optional:
                missing.append(name)
            continue
        known.update(names)
        if len(names) > 1:
            duplicate.append(f"{names[0]} (also as {names[1]})")
        info = stored[names[0]]
        located[name] = names[0]
        if not wanted.fits(info.shape):
            shapes.append(f"{names[0]} {list(info.shape)} instead of {wanted.wanted}")
        elif info.dtype not in wanted.dtypes:
            read = "" if wanted.dtypes is FLOATS else f" instead of {' or '.join(map(str, wanted.dtypes))}"
            types.append(f"{names[0]} is {info.dtype}{read}")
    known |= set(weights.spellings(weights.head)) if tied else set()
    unknown = [n for n in stored if n not in known and not weights.is_ignored(n)]
    problems = [
        f"{label}: {some(dict.fromkeys(names))}"
        for label, names in (
            ("missing tensors", missing),
            ("unknown tensors", unknown),
            ("tensors stored twice", duplicate),
            ("wrong shapes", shapes),
            ("wrong dtypes (bfloat16, float16, float32 and float64 are read)", types),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(problems)}")
    return located


def _spellings(weights: ParamMapping, name: str) -> list[str]:
    """The names that a tensor may have."""
    base, _, kind = name.rpartition(".")
    names = [name, *([f"{base}.{OTHER_SCALES[kind]}"] if kind in OTHER_SCALES else [])]
    return [spelling for name in names for spelling in weights.spellings(name)]


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
