"""Parameters back into a Hugging Face directory: plain, or quantized in the format of compressed-tensors.

Format: https://github.com/vllm-project/compressed-tensors. A quantized linear `X` has `X.weight` in eight bits
(int-quantized, float-quantized), or `X.weight_packed`, int32 with as many values as fit, the first in the lowest bits,
each plus half its range, and `X.weight_shape` (pack-quantized); and `X.weight_scale`, one a row or a group of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.checkpoint.write import Layout, SafetensorsWriter
from jaxinfer.models.model import Model, scales
from jaxinfer.models.weights import Source
from jaxinfer.quantization.schemes import ZERO, Scheme

Host = np.ndarray[Any, Any]
FLOAT, INT, PACKED = "float-quantized", "int-quantized", "pack-quantized"


def check_hf(model: Model) -> None:
    """Raises ValueError if the model's quantization has no form in compressed-tensors."""
    for name in model.quantized:
        source = model.weights.source(name)
        if source != Source(name):
            raise ValueError(
                f"format hf: {name} is a part of {source.name}, or lies the other way round in it, which "
                "compressed-tensors has no form for: use format orbax, or no quantization"
            )
        if name in model.tables:
            raise ValueError(
                f"format hf: {name} is a table, and compressed-tensors quantizes linears: use format orbax, or "
                "leave it out of the quantization"
            )


def config_of(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, with the model's quantization."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    return plain if not model.quantized else plain | {"quantization_config": _quantization_config(model)}


class HfWriter:
    """Writes the weights of a model into a folder, as parameters come, a few at a time."""

    def __init__(self, model: Model, folder: str) -> None:
        check_hf(model)
        self.model = model
        self._waiting: dict[str, dict[int, Host]] = {}  # parts of tensors that are not complete
        layouts: dict[str, Layout] = {}
        for name, abstract in model.abstract.items():
            if name in model.beside:
                continue
            if name in model.quantized:
                layouts |= self._layouts(name)
                continue
            source = model.weights.source(name)
            layouts[source.name] = Layout(source.shape(abstract.shape), np.dtype(abstract.dtype))
        self.file = SafetensorsWriter(folder, layouts)

    def add(self, params: Mapping[str, Any]) -> None:
        """Writes these, without padding; a quantized weight's scales come with it."""
        for name in params:
            if name in self.model.quantized:
                for key, tensor in self._quantized(name, params).items():
                    self.file.write(key, tensor)
            elif name not in self.model.beside:
                self._plain(name, _host(self.model, name, params))

    def __enter__(self) -> HfWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def _plain(self, name: str, value: Host) -> None:
        source = self.model.weights.source(name)
        parts = self._waiting.setdefault(source.name, {})
        parts[source.part] = value
        if len(parts) == source.parts:
            del self._waiting[source.name]
            whole = np.concatenate([parts[i] for i in range(source.parts)]) if source.parts > 1 else value
            self.file.write(source.name, whole.T if source.transpose else whole)

    def _layouts(self, name: str) -> dict[str, Layout]:
        """The tensors of a quantized weight."""
        values, scale = self.model.abstract[name], self.model.abstract[scales(name)]
        found = {f"{name}_scale": Layout(scale.shape, np.dtype(scale.dtype))}
        scheme = self.model.quantized[name]
        if scheme.zeros:  # packed along out, also where the values are not
            size = -(-scale.shape[0] * (8 // scheme.packed) // 32), scale.shape[1]
            found[f"{name}_zero_point"] = Layout(size, np.dtype(np.int32))
        if _format(self.model.quantized[name]) != PACKED:
            return found | {name: Layout(values.shape, np.dtype(values.dtype))}
        shape = (values.shape[0], -(-values.shape[1] // 4))
        return found | {
            f"{name}_packed": Layout(shape, np.dtype(np.int32)),
            f"{name}_shape": Layout((2,), np.dtype(np.int64)),
        }

    def _quantized(self, name: str, params: Mapping[str, Any]) -> dict[str, Host]:
        """What is in them."""
        values = _host(self.model, name, params)
        found = {f"{name}_scale": _host(self.model, scales(name), params)}
        scheme = self.model.quantized[name]
        if scheme.zeros:
            zeros = _host(self.model, name + ZERO, params)
            found[f"{name}_zero_point"] = np.ascontiguousarray(packed(zeros.T, 8 // scheme.packed).T)
        if _format(self.model.quantized[name]) != PACKED:
            return found | {name: values}
        # Our bytes of two four-bit values are in that order, too, and differ only in the values' highest bits.
        words = (values ^ 0x88).view(np.int32) if self.model.quantized[name].packed == 2 else packed(values, 8)
        return found | {f"{name}_packed": words, f"{name}_shape": np.array(self.model.shape(name))}


def packed(values: Host, bits: int) -> Host:
    """Integers `[out, in]` as int32 `[out, in * bits / 32]`, rounded up: see above."""
    fit = 32 // bits
    whole = np.zeros((values.shape[0], -(-values.shape[1] // fit) * fit), np.uint32)
    whole[:, : values.shape[1]] = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    words = np.zeros((whole.shape[0], whole.shape[1] // fit), np.uint32)
    for i in range(fit):
        words |= whole[:, i::fit] << np.uint32(i * bits)
    return words.view(np.int32)


def _host(model: Model, name: str, params: Mapping[str, Any]) -> Host:
    shape = model.abstract[name].shape
    return np.asarray(params[name])[tuple(slice(size) for size in shape)]


def _format(scheme: Scheme) -> str:
    if scheme.values.startswith("float8"):
        return FLOAT
    return INT if scheme.activations else PACKED


def _quantization_config(model: Model) -> dict[str, Any]:
    by_scheme: dict[str, list[str]] = {}
    for name, scheme in model.quantized.items():
        by_scheme.setdefault(scheme.name, []).append(name.removesuffix(".weight"))
    linears = [n for n, a in model.abstract.items() if len(a.shape) == 2 and n not in model.beside]
    plain = [n.removesuffix(".weight") for n in linears if n not in model.quantized and n not in model.tables]
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
