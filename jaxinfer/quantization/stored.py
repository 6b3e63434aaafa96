"""Checkpoints that are quantized already: what the `quantization_config` of their config.json says of each linear.

Formats: compressed-tensors (https://github.com/vllm-project/compressed-tensors), GPTQ (Frantar et al.,
arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ (Lin et al., arXiv:2306.00978) as AutoAWQ does in its version
"gemm", fp8 as DeepSeek and transformers' FineGrainedFP8Config do, bitsandbytes (Dettmers et al., arXiv:2305.14314) as
transformers writes it, MLX's modes affine and mxfp4 (https://ml-explore.github.io/mlx, `mlx.core.quantize`) as mlx-lm
does, and mxfp4 (OCP Microscaling Formats 1.0) as gpt-oss has its experts. How their tensors are laid out is in
checkpoint/quantized.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any

from jaxinfer.quantization.fields import Config, block, group_size, names, one_of, unsupported
from jaxinfer.quantization.patterns import compile_pattern
from jaxinfer.quantization.schemes import METHODS, SCHEMES, Quantization, Scheme, check_quantization

QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
OURS = "jaxinfer"  # the method of converted checkpoints
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
MLX = "mlx"  # which has no `quant_method`
MLX_BITS, MLX_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
BLOCK_SIZE, TABLE = "bnb_4bit_blocksize", "bnb_4bit_quant_type"  # the first is ours: only the tensors say it
BLOCK_SIZES = tuple(2**n for n in range(5, 13))
STACKED = ("mlx", "mxfp4")  # layouts of which one tensor may have several linears, the first axis over them
MX_GROUP = 32  # inputs with one scale
LEAST = 8  # inputs with one scale: scales are then as large as the values
_ONLY = ("modules_in_block_to_quantize", "inside_layer_modules")


@dataclass(frozen=True)
class Format:
    """How a linear `[out, in]` is stored.

    layout: "plain", values as they are, or how several of them are packed: "packed", "gptq", "awq", "bitsandbytes",
        "mlx", "mxfp4".
    bits: of a value.
    floats: e4m3, not integers.
    rows, columns: of a block with one scale; 0: all.
    zeros: blocks have a zero point, too.
    biases: blocks have a bias, too, which is added to what is scaled.
    table: whose numbers are scaled; blocks then go on from row to row.
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
    biases: bool = False
    table: str = ""
    offset: int = 0
    ordered: bool = True
    activations: bool = False
    scale: str = "weight_scale"
    inputs: bool = False

    def scheme(self, rows: int, columns: int) -> Scheme | None:
        """What holds such a weight as it is; None: it is converted to floats."""
        scheme: Scheme | None = None
        if self.layout == "mxfp4":
            return SCHEMES["mxfp4"]
        if not self.ordered or (self.zeros and not self.columns):
            return None
        if self.floats:
            scheme = SCHEMES["fp8-block" if (self.rows, self.columns) == (128, 128) else "fp8"]
            return scheme if self.columns == scheme.columns else None
        if not self.columns:
            return SCHEMES["int8-w8a8" if self.activations else "int8"] if self.bits == 8 else None
        base, size = SCHEMES["int4" if self.bits <= 4 else "int8"], self.columns
        if self.table:
            # A block that ends within a row is as many smaller ones, with the same scale.
            base, size = dataclasses.replace(SCHEMES["nf4"], name=self.table, table=self.table), math.gcd(size, columns)
        name = f"{base.name}-g{size}"
        scheme = SCHEMES.get(name) or dataclasses.replace(base, name=name, columns=size)
        scheme = base if scheme.columns == base.columns else scheme
        scheme = dataclasses.replace(scheme, name=f"{scheme.name}-zeros", zeros=True) if self.zeros else scheme
        scheme = dataclasses.replace(scheme, name=f"{scheme.name}-biases", biases=True) if self.biases else scheme
        if self.table and size < LEAST:
            return None
        try:
            scheme.arrays(rows, columns)
        except ValueError:
            return None
        return scheme


MXFP4 = Format("mxfp4", 4, columns=MX_GROUP, table="e2m1", scale="_scales")


@dataclass(frozen=True)
class Stored:
    """How a checkpoint is quantized.

    method: its `quant_method`.
    format_of: of a module's name and class ("Linear" or "Conv1D"), its Format, None if it is not quantized.
    tables: embeddings are quantized, too.
    """

    method: str
    format_of: Callable[[str, str], Format | None]
    tables: bool = False


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
        raise unsupported("", fields, "an object is needed")
    method = MLX if _is_mlx(fields) else one_of(fields, "quant_method", *(n for n in _READERS if n != MLX))
    return Stored(method, _READERS[method](fields), method == MLX)


def check_stored(config: Config) -> None:
    """Raises what reading a config.json's content raises, of converted checkpoints and of those that are quantized."""
    if converted_quantization(config) is None:
        stored_quantization(config)


def leaving(config: Config, modules: Sequence[str]) -> dict[str, Any]:
    """The config.json's content of a checkpoint that is quantized but for just these modules, whatever it said."""
    field = next(n for n in QUANTIZATION_FIELDS if config.get(n) is not None)
    fields = dict(config[field])
    if fields.get("quant_method") == "compressed-tensors":
        fields["ignore"] = [*names(fields, "ignore"), *modules]
    elif _is_mlx(fields):
        fields |= dict.fromkeys(modules, False)
    else:
        fields = {name: value for name, value in fields.items() if name not in (*_LEFT_OUT, *_ONLY)}
        fields[_LEFT_OUT[0]] = list(modules)
    return {**config, field: fields}


def respelled(config: Config, said: Config, own: Callable[[str], str]) -> dict[str, Any]:
    """The config.json's content of a checkpoint of bitsandbytes with what its tensors have said, and of one of MLX with
    modules by their own names; others as they are."""
    field = next(n for n in QUANTIZATION_FIELDS if config.get(n) is not None)
    fields = config[field]
    if _is_mlx(fields):
        fields = {own(name) if isinstance(value, Mapping | bool) else name: value for name, value in fields.items()}
    elif fields.get("quant_method") == "bitsandbytes":
        fields = {**fields, **said}
    return {**config, field: fields}


def _compressed_tensors(fields: Config) -> Callable[[str, str], Format | None]:
    one_of(fields, "quantization_status", None, "compressed")
    one_of(fields, "kv_cache_scheme", None, remedy="; kv_cache_dtype quantizes the cache without it: remove the field")
    for name in ("transform_config", "sparsity_config"):
        part = fields.get(name) or {}
        if part and (name == "transform_config" or part.get("format", "dense") != "dense"):
            raise unsupported(name, part)
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise unsupported("config_groups", groups, "groups by name are needed")
    formats = [
        (names(group, "targets"), _of_group(group, fields.get("format"), f"config_groups.{name}."))
        for name, group in groups.items()
    ]
    ignored = names(fields, "ignore")

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
    named = one_of(
        layout, "format", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", where=where
    )
    one_of(group, "output_activations", None, where=where)
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise unsupported(f"{where}weights", weights, "an object is needed")
    of = f"{where}weights."
    floats = one_of(weights, "type", "int", "float", where=of) == "float"
    packed = named == "pack-quantized"
    bits = one_of(weights, "num_bits", *((4, 8) if packed else (8,)), where=of)
    one_of(weights, "dynamic", None, False, where=of)
    if floats and packed:
        raise unsupported(f"{of}type", "float", "pack-quantized has int")
    strategy = one_of(weights, "strategy", *("tensor", "channel", "group", *(["block"] if floats else [])), where=of)
    rows, columns = 0 if strategy == "tensor" else 1, 0
    if strategy == "block":
        rows, columns = block(weights, "block_structure", of)
    elif strategy == "group":
        columns = group_size(weights, "group_size", of)
    zeros = weights.get("symmetric", True) is False
    activations = False
    if inputs is not None:
        of = f"{where}input_activations."
        if one_of(inputs, "type", "float" if floats else "int", where=of) == "int":
            one_of(inputs, "num_bits", 8, where=of)
            one_of(inputs, "dynamic", True, where=of)
            one_of(inputs, "symmetric", True, where=of)
            one_of(inputs, "strategy", "token", where=of)
            if zeros or columns:
                raise unsupported(f"{of}num_bits", 8, "weights have one scale for each channel then, and no zero point")
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
    bits = one_of(fields, "bits", 4, 8)
    kind = one_of(fields, "checkpoint_format", None, "gptq", "gptq_v2")
    one_of(fields, "pack_dtype", None, "int32")
    one_of(fields, "dynamic", None, {})
    blocks = next((fields[name] for name in _ONLY if fields.get(name)), None)
    only = [str(name) for block in blocks or () for name in ([block] if isinstance(block, str) else block)]
    # The first version stores zero points less one.
    form = Format(
        "gptq",
        bits,
        columns=group_size(fields, "group_size"),
        zeros=fields.get("sym", True) is False,
        offset=0 if kind == "gptq_v2" else 1,
        ordered=not fields.get("desc_act"),
    )
    plain = [*_left_out(fields), *([] if fields.get("lm_head") else ["lm_head"])]
    return _but(form, plain, lambda module: not only or any(f".{module}".endswith(f".{name}") for name in only))


def _awq(fields: Config) -> Callable[[str, str], Format | None]:
    bits = one_of(fields, "bits" if "bits" in fields else "w_bit", 4)
    one_of(fields, "version", None, "gemm", "GEMM")
    size = group_size(fields, "group_size" if "group_size" in fields else "q_group_size")
    plain = ["lm_head", *_left_out(fields)]
    return _but(
        Format("awq", bits, columns=size, zeros=True), plain, lambda module: not any(n in module for n in plain)
    )


def _fp8(fields: Config) -> Callable[[str, str], Format | None]:
    one_of(fields, "fmt", None, "e4m3")
    static = one_of(fields, "activation_scheme", None, "dynamic", "static") == "static"
    if fields.get("weight_block_size") is None:
        form = Format("plain", 8, True, 0, 0, inputs=static)
    else:
        rows, columns = block(fields, "weight_block_size", "")
        form = Format("plain", 8, True, rows, columns, scale="weight_scale_inv", inputs=static)
    return _but(form, ["lm_head", *_left_out(fields)])


def _bitsandbytes(fields: Config) -> Callable[[str, str], Format | None]:
    if one_of(fields, "load_in_8bit", None, False, True):
        form = Format("plain", 8, scale="SCB")
    else:
        one_of(fields, "load_in_4bit", True)
        table = one_of(fields, TABLE, None, "nf4", "fp4") or "fp4"
        size = one_of(fields, BLOCK_SIZE, None, *BLOCK_SIZES) or 64
        form = Format("bitsandbytes", 4, columns=size, table=table)
    plain = _left_out(fields) if any(fields.get(name) is not None for name in _LEFT_OUT) else ["lm_head"]
    return _but(form, plain)


def _mxfp4(fields: Config) -> Callable[[str, str], Format | None]:
    """Experts alone, whatever else is named."""
    return _but(MXFP4, _left_out(fields), lambda module: ".experts." in module)


def _is_mlx(fields: Config) -> bool:
    return fields.get("quant_method") is None and {"group_size", "bits"} <= fields.keys()


def _mlx(fields: Config) -> Callable[[str, str], Format | None]:
    """What is said of a module comes before what is said of all."""

    def form(fields: Config, where: str = "") -> Format:
        if one_of(fields, "mode", None, "affine", "mxfp4", where=where) == "mxfp4":
            one_of(fields, "bits", 4, where=where)
            one_of(fields, "group_size", MX_GROUP, where=where)
            return dataclasses.replace(MXFP4, scale="scales")
        bits = one_of(fields, "bits", *MLX_BITS, where=where)
        size = one_of(fields, "group_size", *MLX_SIZES, where=where)
        return Format("mlx", bits, columns=size, biases=True, scale="scales")

    default = form(fields)
    own: dict[str, Format | None] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            own[name] = form(value, f"{name}.")
        elif isinstance(value, bool):
            own[name] = default if value else None
    return lambda module, _: own.get(module, default)


_READERS: dict[str, Callable[[Config], Callable[[str, str], Format | None]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    MLX: _mlx,
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
    return [name for field in _LEFT_OUT for name in names(fields, field)]


def _matches(target: str, module: str, kind: str) -> bool:
    if target.startswith("re:"):
        try:
            return compile_pattern(target[3:]).match(module) is not None
        except ValueError as error:
            raise unsupported("targets or ignore", target, str(error)) from None
    return target in (module, kind)
