"""Checkpoints that are quantized already: what the `quantization_config` of their config.json says of each linear.

Formats: compressed-tensors (https://github.com/vllm-project/compressed-tensors), GPTQ (Frantar et al.,
arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ (Lin et al., arXiv:2306.00978) as AutoAWQ does in its version
"gemm", and fp8 as DeepSeek and transformers' FineGrainedFP8Config do. How their tensors are laid out is in
checkpoint/quantized.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any

from jaxinfer.quantization.patterns import compile_pattern
from jaxinfer.quantization.schemes import METHODS, SCHEMES, Quantization, Scheme, check_quantization

Config = Mapping[str, Any]
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
OURS = "jaxinfer"  # the method of converted checkpoints
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers")
_ONLY = ("modules_in_block_to_quantize", "inside_layer_modules")


@dataclass(frozen=True)
class Format:
    """How a linear `[out, in]` is stored.

    layout: "plain", values as they are, or how several of them are packed into an int32: "packed", "gptq", "awq".
    bits: of a value.
    floats: e4m3, not integers.
    rows, columns: of a block with one scale; 0: all.
    zeros: blocks have a zero point, too.
    offset: what is added to zero points that are stored.
    ordered: input i is in group i // columns; else there is a tensor that says it.
    activations: they are quantized to int8 for each token.
    scale: what its scales are called.
    inputs: a scale of activations is there, too, which is not used.
    """

    layout: str
    bits: int
    floats: bool = False
    rows: int = 1
    columns: int = 0
    zeros: bool = False
    offset: int = 0
    ordered: bool = True
    activations: bool = False
    scale: str = "weight_scale"
    inputs: bool = False

    def scheme(self, rows: int, columns: int) -> Scheme | None:
        """What holds such a weight as it is; None: it is converted to floats."""
        scheme: Scheme | None = None
        if not self.ordered or (self.zeros and not self.columns):
            return None
        if self.floats:
            scheme = SCHEMES["fp8-block" if (self.rows, self.columns) == (128, 128) else "fp8"]
            return scheme if self.columns == scheme.columns else None
        if not self.columns:
            return SCHEMES["int8-w8a8" if self.activations else "int8"] if self.bits == 8 else None
        base = SCHEMES["int4" if self.bits == 4 else "int8"]
        name = f"{base.name}-g{self.columns}"
        scheme = SCHEMES.get(name) or dataclasses.replace(base, name=name, columns=self.columns)
        scheme = base if scheme.columns == base.columns else scheme
        scheme = dataclasses.replace(scheme, name=f"{scheme.name}-zeros", zeros=True) if self.zeros else scheme
        try:
            scheme.arrays(rows, columns)
        except ValueError:
            return None
        return scheme


@dataclass(frozen=True)
class Stored:
    """How a checkpoint is quantized.

    method: its `quant_method`.
    format_of: of a module's name and class ("Linear" or "Conv1D"), its Format, None if it is not quantized.
    """

    method: str
    format_of: Callable[[str, str], Format | None]


def converted_quantization_config(quantization: Quantization | None) -> Config:
    """What `jaxinfer convert` adds to config.json, and converted_quantization reads."""
    return {} if quantization is None else {"quantization_config": {"quant_method": OURS, "quantization": quantization}}


def converted_quantization(config: Config) -> Quantization | None:
    """The quantization of a converted checkpoint, by its config.json. Raises ValueError if it is none."""
    fields = config.get("quantization_config")
    if not isinstance(fields, Mapping) or fields.get("quant_method") != OURS:
        return None
    quantization = fields.get("quantization")
    try:
        check_quantization(quantization)
    except ValueError as error:
        raise ValueError(f"config.json: quantization_config: {error}") from None
    return quantization


def asked_for(quantization: Quantization | None, config: Config) -> Quantization | None:
    """What weights are to be quantized by, of which vLLM also has the checkpoint's own method: that changes nothing.
    Raises ValueError for the method of another checkpoint."""
    if not isinstance(quantization, str) or quantization not in METHODS:
        return quantization
    fields = next((config[n] for n in QUANTIZATION_FIELDS if isinstance(config.get(n), Mapping)), None)
    method = fields.get("quant_method") if fields else None
    if method == METHODS[quantization]:
        return None
    if quantization in SCHEMES:
        return quantization
    raise ValueError(
        f"quantization is {quantization!r}: the checkpoint's own is {method!r}: leave it out, or take one of "
        f"{', '.join(SCHEMES)} for weights that are in floats"
    )


def stored_quantization(config: Config) -> Stored | None:
    """Of a config.json's content; None if the checkpoint is not quantized. Raises ValueError naming a field that is not
    supported, and its value."""
    fields = next((config[n] for n in QUANTIZATION_FIELDS if config.get(n) is not None), None)
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise _unsupported("", fields, "an object is needed")
    method = _one_of(fields, "quant_method", *_READERS)
    return Stored(method, _READERS[method](fields))


def check_stored(config: Config) -> None:
    """Raises what reading a config.json's content raises, of converted checkpoints and of those that are quantized."""
    if converted_quantization(config) is None:
        stored_quantization(config)


def leaving(config: Config, modules: Sequence[str]) -> dict[str, Any]:
    """The config.json's content of a checkpoint that is quantized but for just these modules, whatever it said."""
    field = next(n for n in QUANTIZATION_FIELDS if config.get(n) is not None)
    fields = dict(config[field])
    if fields["quant_method"] == "compressed-tensors":
        fields["ignore"] = [*_names(fields, "ignore"), *modules]
    else:
        fields = {name: value for name, value in fields.items() if name not in (*_LEFT_OUT, *_ONLY)}
        fields[_LEFT_OUT[0]] = list(modules)
    return {**config, field: fields}


def _compressed_tensors(fields: Config) -> Callable[[str, str], Format | None]:
    _one_of(fields, "quantization_status", None, "compressed")
    _one_of(fields, "kv_cache_scheme", None, remedy="; kv_cache_dtype quantizes the cache without it: remove the field")
    for name in ("transform_config", "sparsity_config"):
        part = fields.get(name) or {}
        if part and (name == "transform_config" or part.get("format", "dense") != "dense"):
            raise _unsupported(name, part)
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _unsupported("config_groups", groups, "groups by name are needed")
    formats = [
        (_names(group, "targets"), _of_group(group, fields.get("format"), f"config_groups.{name}."))
        for name, group in groups.items()
    ]
    ignored = _names(fields, "ignore")

    def format_of(module: str, kind: str) -> Format | None:
        if any(_matches(target, module, kind) for target in ignored):
            return None
        # Names come before classes.
        for wanted in (module, kind):
            for targets, form in formats:
                if any(_matches(target, module, wanted) for target in targets if (target == kind) == (wanted == kind)):
                    return form
        return None

    return format_of


def _of_group(group: Config, default: Any, where: str) -> Format:
    layout = {"format": group.get("format") or default}
    named = _one_of(
        layout, "format", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", where=where
    )
    _one_of(group, "output_activations", None, where=where)
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise _unsupported(f"{where}weights", weights, "an object is needed")
    of = f"{where}weights."
    floats = _one_of(weights, "type", "int", "float", where=of) == "float"
    packed = named == "pack-quantized"
    bits = _one_of(weights, "num_bits", *((4, 8) if packed else (8,)), where=of)
    _one_of(weights, "dynamic", None, False, where=of)
    if floats and packed:
        raise _unsupported(f"{of}type", "float", "pack-quantized has int")
    strategy = _one_of(weights, "strategy", *("tensor", "channel", "group", *(["block"] if floats else [])), where=of)
    rows, columns = 0 if strategy == "tensor" else 1, 0
    if strategy == "block":
        rows, columns = _block(weights, "block_structure", of)
    elif strategy == "group":
        columns = _group_size(weights, "group_size", of)
    zeros = weights.get("symmetric", True) is False
    activations = False
    if inputs is not None:
        of = f"{where}input_activations."
        if _one_of(inputs, "type", "float" if floats else "int", where=of) == "int":
            _one_of(inputs, "num_bits", 8, where=of)
            _one_of(inputs, "dynamic", True, where=of)
            _one_of(inputs, "symmetric", True, where=of)
            _one_of(inputs, "strategy", "token", where=of)
            if zeros or columns:
                raise _unsupported(
                    f"{of}num_bits", 8, "weights have one scale for each channel then, and no zero point"
                )
            activations = True
    return Format(
        "packed" if packed else "plain",
        bits,
        floats,
        rows,
        columns,
        zeros,
        ordered=weights.get("actorder") not in ("group", True),
        activations=activations,
        inputs=inputs is not None and not inputs.get("dynamic"),
    )


def _gptq(fields: Config) -> Callable[[str, str], Format | None]:
    bits = _one_of(fields, "bits", 4, 8)
    kind = _one_of(fields, "checkpoint_format", None, "gptq", "gptq_v2")
    _one_of(fields, "pack_dtype", None, "int32")
    _one_of(fields, "dynamic", None, {})
    blocks = next((fields[name] for name in _ONLY if fields.get(name)), None)
    only = [str(name) for block in blocks or () for name in ([block] if isinstance(block, str) else block)]
    # The first version stores zero points less one.
    form = Format(
        "gptq",
        bits,
        columns=_group_size(fields, "group_size"),
        zeros=fields.get("sym", True) is False,
        offset=0 if kind == "gptq_v2" else 1,
        ordered=not fields.get("desc_act"),
    )
    plain = [*_left_out(fields), *([] if fields.get("lm_head") else ["lm_head"])]
    return _but(form, plain, lambda module: not only or any(f".{module}".endswith(f".{name}") for name in only))


def _awq(fields: Config) -> Callable[[str, str], Format | None]:
    bits = _one_of(fields, "bits" if "bits" in fields else "w_bit", 4)
    _one_of(fields, "version", None, "gemm", "GEMM")
    size = _group_size(fields, "group_size" if "group_size" in fields else "q_group_size")
    plain = ["lm_head", *_left_out(fields)]
    return _but(
        Format("awq", bits, columns=size, zeros=True), plain, lambda module: not any(n in module for n in plain)
    )


def _fp8(fields: Config) -> Callable[[str, str], Format | None]:
    _one_of(fields, "fmt", None, "e4m3")
    static = _one_of(fields, "activation_scheme", None, "dynamic", "static") == "static"
    if fields.get("weight_block_size") is None:
        form = Format("plain", 8, True, 0, 0, inputs=static)
    else:
        rows, columns = _block(fields, "weight_block_size", "")
        form = Format("plain", 8, True, rows, columns, scale="weight_scale_inv", inputs=static)
    return _but(form, ["lm_head", *_left_out(fields)])


_READERS: dict[str, Callable[[Config], Callable[[str, str], Format | None]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}


def _but(
    form: Format, plain: list[str], wanted: Callable[[str], bool] = lambda _: True
) -> Callable[[str, str], Format | None]:
    """All linears but those that have one of these names, or one of them in their path, or as transformers has it at
    the end of it, or as a regular expression that fits the beginning. vLLM's AWQ takes it anywhere."""
    exact, patterns = frozenset(plain), [_pattern(name) for name in plain]

    def left(module: str) -> bool:
        return module in exact or any(
            f".{name}." in f".{module}." or module.endswith(name) or (pattern and pattern.match(module))
            for name, pattern in zip(plain, patterns, strict=True)
        )

    return lambda module, _: None if left(module) or not wanted(module) else form


def _pattern(name: str) -> Pattern[str] | None:
    """None where it is only a name: what would take for ever to match counts as one, too."""
    try:
        return compile_pattern(name)
    except ValueError:
        return None


def _left_out(fields: Config) -> list[str]:
    """Names of modules that are not quantized."""
    return [name for field in _LEFT_OUT for name in _names(fields, field)]


def _matches(target: str, module: str, kind: str) -> bool:
    if target.startswith("re:"):
        try:
            return compile_pattern(target[3:]).match(module) is not None
        except ValueError as error:
            raise _unsupported("targets or ignore", target, str(error)) from None
    return target in (module, kind)


def _one_of(fields: Config, name: str, *values: Any, where: str = "", remedy: str = "") -> Any:
    value = fields.get(name) if isinstance(fields, Mapping) else fields
    if not any(type(value) is type(option) and value == option for option in values):
        choice = ", ".join("nothing" if option is None else repr(option) for option in values)
        raise _unsupported(f"{where}{name}", value, f"{choice} can be read{remedy}")
    return value


def _group_size(fields: Config, name: str, where: str = "") -> int:
    """0: all of them."""
    size = fields.get(name)
    if type(size) is not int or (size < 1 and size != -1):
        raise _unsupported(f"{where}{name}", size, "a number, or -1, is needed")
    return max(size, 0)


def _block(fields: Config, name: str, where: str) -> tuple[int, int]:
    block = fields.get(name)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise _unsupported(f"{where}{name}", block, "two numbers are needed")
    return block[0], block[1]


def _names(fields: Config, name: str) -> list[str]:
    names = fields.get(name) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise _unsupported(name, names, "a list of names is needed")
    return names


def _unsupported(name: str, value: Any, why: str = "it is not supported") -> ValueError:
    field = f"quantization_config.{name}" if name else "quantization_config"
    return ValueError(
        f"config.json: {field} is {value!r:.100}: {why}; or take the original checkpoint, and `quantization`"
    )
