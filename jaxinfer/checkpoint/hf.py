"""Parameters back into a Hugging Face directory: plain, or quantized in the format of compressed-tensors.

Format: https://github.com/vllm-project/compressed-tensors. A quantized linear `X` has `X.weight` in eight bits
(int-quantized, float-quantized), or `X.weight_packed`, int32 with as many values as fit, the first in the lowest bits,
each plus half its range, and `X.weight_shape` (pack-quantized); and `X.weight_scale`, one a row or a group of columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.checkpoint.write import Layout, SafetensorsWriter
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.params import ParamSpec
from jaxinfer.models.sources import Region, Shape, shape_of, slices, whole
from jaxinfer.quantization.schemes import SCALE, ZERO, Scheme
from jaxinfer.quantization.stored import QUANTIZATION_FIELDS

Host = np.ndarray[Any, Any]
FLOAT, INT, PACKED = "float-quantized", "int-quantized", "pack-quantized"


def check_hf(model: AbstractModel) -> None:
    """Raises ValueError if the model's quantization has no form in compressed-tensors."""
    schemes: dict[str, Scheme | None] = {}  # of each tensor
    for name, spec in model.params.items():
        shapes = spec.source.tensors(spec.shape)
        for region in spec.source.regions(whole(spec.shape)):
            if schemes.setdefault(region.tensor, spec.scheme) != spec.scheme:
                raise ValueError(
                    f"format hf: {name} is a part of {region.tensor}, of which others are quantized in another way: "
                    "use format orbax, or one scheme for all of them"
                )
            if spec.scheme is not None and len(region.stored) > 2:
                raise ValueError(
                    f"format hf: {name} is of experts that are stacked in {region.tensor}, and compressed-tensors "
                    "quantizes linears: use format orbax, or no quantization"
                )
            if spec.scheme is not None and not _has_rows_of(region, shapes[region.tensor], spec.scheme):
                raise ValueError(
                    f"format hf: {name} lies the other way round in {region.tensor}, or is a part of it that shares "
                    "scales with others, which compressed-tensors has no form for: use format orbax, or no quantization"
                )
    for name in model.quantized:
        spec = model.params[name]
        if spec.scheme is not None and (spec.scheme.table or spec.scheme.biases):
            raise ValueError(
                f"format hf: {name} is in {spec.scheme.name}, which compressed-tensors has no form for: use format "
                "orbax"
            )
        if spec.is_embedding:
            raise ValueError(
                f"format hf: {name} is a table, and compressed-tensors quantizes linears: use format orbax, or "
                "leave it out of the quantization"
            )


def config_of(model: AbstractModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, with the model's quantization."""
    plain = {name: value for name, value in config.items() if name not in QUANTIZATION_FIELDS}
    return plain if not model.quantized else plain | {"quantization_config": _quantization_config(model)}


class HfWriter:
    """Writes the weights of a model into a folder, as parameters come, a few at a time."""

    def __init__(self, model: AbstractModel, folder: str) -> None:
        check_hf(model)
        self.model = model
        # Tensors that are not complete, as arrays by suffix, and how many numbers are missing.
        self._waiting: dict[str, tuple[dict[str, Host], int]] = {}
        layouts: dict[str, Layout] = {}
        for spec in model.params.values():
            for tensor, shape in spec.source.tensors(spec.shape).items():
                plain = {tensor: Layout(shape, np.dtype(spec.dtype))}
                layouts |= plain if spec.scheme is None else _layouts(tensor, shape, spec.scheme)
        self.file = SafetensorsWriter(folder, layouts)

    def add(self, params: Mapping[str, Any]) -> None:
        """Writes these, without padding; a quantized weight's scales come with it."""
        for name in params:
            spec = self.model.params.get(name)
            if spec is not None:
                arrays = {suffix: _host(array.shape, params[name + suffix]) for suffix, array in spec.arrays.items()}
                self._add(spec, arrays)

    def __enter__(self) -> HfWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def _add(self, spec: ParamSpec, arrays: dict[str, Host]) -> None:
        """Tensors are written when they are complete."""
        shapes, scheme = spec.source.tensors(spec.shape), spec.scheme
        for region in spec.source.regions(whole(spec.shape)):
            shape = shapes[region.tensor]
            full = {"": shape} if scheme is None else {suffix: s for suffix, (s, _) in scheme.arrays(*shape).items()}
            pieces = {suffix: _piece(region, suffix, arrays[suffix], scheme) for suffix in full}
            if shape_of(region.stored) != shape:
                held, missing = self._waiting.pop(region.tensor, ({}, math.prod(shape)))
                for suffix, piece in pieces.items():
                    if suffix not in held:
                        held[suffix] = np.empty(full[suffix], piece.dtype)
                    held[suffix][_place(region, suffix, scheme)] = piece
                if missing := missing - math.prod(shape_of(region.stored)):
                    self._waiting[region.tensor] = held, missing
                    continue
                pieces = held
            tensors = {region.tensor: pieces[""]} if scheme is None else _tensors(region.tensor, pieces, scheme)
            for tensor, value in tensors.items():
                self.file.write(tensor, value)


def _has_rows_of(region: Region, shape: Shape, scheme: Scheme) -> bool:
    """Whether it is whole rows of a tensor, and all that have one scale."""
    start, stop, *step = region.stored[-2]
    cut = step or start % scheme.rows or (stop % scheme.rows and stop != shape[-2])
    return not (region.transposed or cut or region.stored[-1] != (0, shape[-1]))


def _piece(region: Region, suffix: str, array: Host, scheme: Scheme | None) -> Host:
    """Of one of a weight's arrays."""
    if scheme is None:
        return region.turned(array[region.index])
    *leading, rows, _ = region.index
    assert isinstance(rows, slice)
    return array[(*leading, _blocks(rows.start, rows.stop, suffix, scheme))]


def _place(region: Region, suffix: str, scheme: Scheme | None) -> tuple[slice, ...]:
    """Where that is in the tensor's."""
    if scheme is None:
        return slices(region.stored)
    start, stop = region.stored[-2]
    return (_blocks(start, stop, suffix, scheme),)


def _blocks(start: int, stop: int, suffix: str, scheme: Scheme) -> slice:
    """Rows of an array, by rows of the weight: of scales there may be one for several."""
    unit = scheme.rows if suffix else 1
    return slice(start // unit, -(-stop // unit))


def _layouts(tensor: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Layout]:
    """The tensors of a quantized weight."""
    arrays = scheme.arrays(*shape)
    (values, kind), (blocks, of_scales) = arrays[""], arrays[SCALE]
    layouts = {f"{tensor}_scale": Layout(blocks, np.dtype(of_scales))}
    if scheme.zeros:  # packed along out, also where the values are not
        size = -(-blocks[0] * (8 // scheme.packed) // 32), blocks[1]
        layouts[f"{tensor}_zero_point"] = Layout(size, np.dtype(np.int32))
    if _format(scheme) != PACKED:
        return layouts | {tensor: Layout(values, np.dtype(kind))}
    return layouts | {
        f"{tensor}_packed": Layout((values[0], -(-values[1] // 4)), np.dtype(np.int32)),
        f"{tensor}_shape": Layout((2,), np.dtype(np.int64)),
    }


def _tensors(tensor: str, arrays: Mapping[str, Host], scheme: Scheme) -> dict[str, Host]:
    """What is in them."""
    values = arrays[""]
    tensors = {f"{tensor}_scale": arrays[SCALE]}
    if scheme.zeros:
        tensors[f"{tensor}_zero_point"] = np.ascontiguousarray(packed(arrays[ZERO].T, 8 // scheme.packed).T)
    if _format(scheme) != PACKED:
        return tensors | {tensor: values}
    # Our bytes of two four-bit values are in that order, too, and differ only in the values' highest bits.
    words = (values ^ 0x88).view(np.int32) if scheme.packed == 2 else packed(values, 8)
    columns = values.shape[1] * scheme.packed
    return tensors | {f"{tensor}_packed": words, f"{tensor}_shape": np.array([values.shape[0], columns], np.int64)}


def packed(values: Host, bits: int) -> Host:
    """Integers `[out, in]` as int32 `[out, in * bits / 32]`, rounded up: see above."""
    fit = 32 // bits
    filled = np.zeros((values.shape[0], -(-values.shape[1] // fit) * fit), np.uint32)
    filled[:, : values.shape[1]] = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    words = np.zeros((filled.shape[0], filled.shape[1] // fit), np.uint32)
    for i in range(fit):
        words |= filled[:, i::fit] << np.uint32(i * bits)
    return words.view(np.int32)


def _host(shape: tuple[int, ...], array: Any) -> Host:
    return np.asarray(array)[tuple(slice(size) for size in shape)]


def _format(scheme: Scheme) -> str:
    if scheme.values.startswith("float8"):
        return FLOAT
    return INT if scheme.activations else PACKED


def _quantization_config(model: AbstractModel) -> dict[str, Any]:
    by_scheme: dict[str, list[str]] = {}
    plain: list[str] = []
    seen: set[str] = set()
    for spec in model.params.values():
        tensors = [tensor for tensor in spec.source.tensors(spec.shape) if tensor not in seen]
        seen.update(tensors)  # several weights may be parts of one
        linears = [tensor.removesuffix(".weight") for tensor in tensors]
        if spec.scheme is not None:
            by_scheme.setdefault(spec.scheme.name, []).extend(linears)
        elif spec.is_embedding is False:
            plain += linears
    if model.config.tie_word_embeddings:
        plain.append("lm_head")  # which others have as a linear, too
    plain += [f"re:{pattern}" for pattern in model.weights.beside]  # parts that others make, with values of their own
    schemes = {scheme.name: scheme for scheme in model.quantized.values()}
    groups = {
        f"group_{i}": _group(schemes[name], targets if len(by_scheme) > 1 else ["Linear"])
        for i, (name, targets) in enumerate(by_scheme.items())
    }
    formats = {_format(scheme) for scheme in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": plain,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    kind = "float" if scheme.values.startswith("float8") else "int"
    strategy = "block" if scheme.rows > 1 else "group" if scheme.columns else "channel"
    weights = {
        "num_bits": 8 // scheme.packed,
        "type": kind,
        "symmetric": not scheme.zeros,
        "strategy": strategy,
        "dynamic": False,
    }
    weights["group_size"] = scheme.columns if strategy == "group" else None
    if strategy == "block":
        weights["block_structure"] = [scheme.rows, scheme.columns]
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if scheme.activations else None,
        "output_activations": None,
        "format": _format(scheme),
    }
