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
from jaxinfer.models.sources import Index, shape_of, slices, whole
from jaxinfer.quantization.schemes import SCALE, ZERO, Scheme
from jaxinfer.quantization.stored import QUANTIZATION_FIELDS

Host = np.ndarray[Any, Any]
FLOAT, INT, PACKED = "float-quantized", "int-quantized", "pack-quantized"


def check_hf(model: AbstractModel) -> None:
    """Raises ValueError if the model's quantization has no form in compressed-tensors."""
    for name in model.quantized:
        spec = model.params[name]
        if spec.scheme is not None and (spec.scheme.table or spec.scheme.biases):
            raise ValueError(
                f"format hf: {name} is in {spec.scheme.name}, which compressed-tensors has no form for: use format "
                "orbax"
            )
        shapes = spec.source.tensors(spec.shape)
        regions = spec.source.regions(whole(spec.shape))
        cut = next((r for r in regions if r.transposed or r.stored != whole(shapes[r.tensor])), None)
        if cut is not None:
            raise ValueError(
                f"format hf: {name} is a part of {cut.tensor}, or lies the other way round in it, which "
                "compressed-tensors has no form for: use format orbax, or no quantization"
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
        self._waiting: dict[str, tuple[Host, int]] = {}  # tensors that are not complete, and what of them is missing
        self._layouts: dict[str, Layout] = {}
        for spec in model.params.values():
            if spec.scheme is not None:
                for tensor, shape in spec.source.tensors(spec.shape).items():
                    self._layouts |= _layouts(tensor, shape, spec.scheme)
            else:
                shapes = spec.source.tensors(spec.shape).items()
                self._layouts |= {tensor: Layout(shape, np.dtype(spec.dtype)) for tensor, shape in shapes}
        self.file = SafetensorsWriter(folder, self._layouts)

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
        for region in spec.source.regions(whole(spec.shape)):
            if spec.scheme is None:
                self._piece(region.tensor, region.stored, region.turned(arrays[""][region.index]))
            else:  # whole tensors alone: see check_hf
                slices = {suffix: array[region.index[:-2]] for suffix, array in arrays.items()}
                for tensor, value in _tensors(region.tensor, slices, spec.scheme).items():
                    self.file.write(tensor, value)

    def _piece(self, tensor: str, index: Index, value: Host) -> None:
        """Tensors are written when they are complete."""
        layout = self._layouts[tensor]
        if shape_of(index) == layout.shape:
            self.file.write(tensor, value)
            return
        held, missing = self._waiting.pop(tensor, (np.empty(0), math.prod(layout.shape)))
        held = held if held.shape == layout.shape else np.empty(layout.shape, layout.dtype)
        held[slices(index)] = value
        if missing > value.size:
            self._waiting[tensor] = held, missing - value.size
        else:
            self.file.write(tensor, held)


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
    for spec in model.params.values():
        linears = [tensor.removesuffix(".weight") for tensor in spec.source.tensors(spec.shape)]
        if spec.scheme is not None:
            by_scheme.setdefault(spec.scheme.name, []).extend(linears)
        elif spec.is_embedding is False:
            plain += [linear for linear in linears if linear not in plain[-1:]]  # several may be parts of one
    if model.config.tie_word_embeddings:
        plain.append("lm_head")  # which others have as a linear, too
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
