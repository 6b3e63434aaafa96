"""Quantized checkpoints, written from the descriptions of their formats: of each linear the tensors, and the weight
that they stand for. Nothing here is the package's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.quantization.schemes import TABLES

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
Stored = tuple[dict[str, np.ndarray], np.ndarray]


class Case(NamedTuple):
    """config: quantization_config. store: a linear's tensors by what is added to its name, and the weight [out, in].
    scheme: what it is kept in, None for floats."""

    config: dict[str, Any]
    store: Callable[[np.ndarray], Stored]
    scheme: str | None


def words(values: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Unsigned `[n, m]` as int32 `[n, m * bits / 32]`: the order[i]th value is in a word's bits from i * bits on."""
    fit = 32 // bits
    padded = np.zeros((len(values), -(-values.shape[1] // fit) * fit), object)
    padded[:, : values.shape[1]] = values.astype(int)
    grouped = padded.reshape(len(values), -1, fit)
    total = sum(grouped[:, :, (order or range(fit))[i]] << (bits * i) for i in range(fit))
    return total.astype(np.uint32).view(np.int32)


def integers(weight: np.ndarray, bits: int, size: int, symmetric: bool, order: np.ndarray | None = None) -> Any:
    """Unsigned values `[out, in]`, zeros and scales `[out, G]`, and the weight; order: the group of each input."""
    rows, columns = weight.shape
    size = size if size > 0 else columns
    order = np.arange(columns) // size if order is None else order
    groups, most = order.max() + 1, 2**bits - 1
    scales, zeros = np.zeros((rows, groups), np.float32), np.zeros((rows, groups), int)
    for g in range(groups):
        some = weight[:, order == g]
        if symmetric:
            scales[:, g], zeros[:, g] = np.abs(some).max(axis=1) * 2 / most, 2 ** (bits - 1)
        else:
            low, high = np.minimum(some.min(axis=1), 0), np.maximum(some.max(axis=1), 0)
            scales[:, g] = (high - low) / most
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 0, most)
    scales = scales.astype(np.float16).astype(np.float32)
    values = np.clip(np.round(weight / scales[:, order]) + zeros[:, order], 0, most).astype(int)
    return values, zeros, scales, ((values - zeros[:, order]) * scales[:, order]).astype(np.float32)


def gptq(bits: int, size: int, *, sym: bool = True, act: bool = False, version: int = 1) -> Case:
    def store(weight: np.ndarray) -> Stored:
        order = np.arange(weight.shape[1]) // (size if size > 0 else weight.shape[1])
        order = np.random.default_rng(1).permutation(order) if act else order
        values, zeros, scales, left = integers(weight, bits, size, sym, order)
        shifted = (zeros - 1) % 2**bits if version == 1 else zeros
        return {
            "qweight": words(values, bits).T.copy(),
            "qzeros": words(shifted.T, bits),
            "scales": scales.T.astype(np.float16),
            "g_idx": order.astype(np.int32),
        }, left

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": sym,
        "desc_act": act,
        "damp_percent": 0.1,
    }
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    name = {(4, 32): "int4", (4, 128): "int4-g128", (8, 32): "int8-g32"}.get((bits, size), "")
    return Case(config, store, None if act or not name else name + "-zeros" * (not sym))


def awq(size: int) -> Case:
    def store(weight: np.ndarray) -> Stored:
        values, zeros, scales, left = integers(weight, 4, size, False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = {"qweight": words(values.T, 4, order), "qzeros": words(zeros.T, 4, order)}
        return packed | {"scales": scales.T.astype(np.float16)}, left

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return Case(config | {"modules_to_not_convert": ["k_proj"]}, store, "int4-zeros")


def compressed(
    bits: int, size: int = 0, *, kind: str = "pack", sym: bool = True, act: bool = False, inputs: Any = None
) -> Case:
    def store(weight: np.ndarray) -> Stored:
        columns = weight.shape[1]
        order = np.arange(columns) // (size or columns)
        order = np.random.default_rng(1).permutation(order) if act else order
        values, zeros, scales, left = integers(weight, bits, size or columns, sym, order)
        scales = {"weight_scale": scales.astype(ml_dtypes.bfloat16)}
        left = (values - zeros[:, order]) * scales["weight_scale"].astype(np.float32)[:, order]
        if kind == "int":
            return scales | {"weight": (values - 128).astype(np.int8)}, left
        tensors = scales | {"weight_packed": words(values, bits), "weight_shape": np.array(weight.shape)}
        tensors |= {} if sym else {"weight_zero_point": words(zeros.T, bits).T.copy()}
        return tensors | ({"weight_g_idx": order.astype(np.int32)} if act else {}), left

    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group" if size else "channel"}
    weights |= {"group_size": size or None, "actorder": "group" if act else None, "dynamic": False}
    scheme = {(4, 32): "int4", (4, 128): "int4-g128", (8, 0): "int8-w8a8" if inputs else "int8"}[bits, size]
    scheme = None if act or (not sym and not size) else scheme + "-zeros" * (not sym)
    return compressed_case(f"{kind}-quantized", weights, inputs, store, scheme)


def compressed_case(kind: str, weights: Any, inputs: Any, store: Any, scheme: str | None) -> Case:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return Case(config | {"config_groups": {"group_0": group}, "ignore": ["re:.*k_proj", "lm_head"]}, store, scheme)


def fp8(high: int, wide: int, method: str) -> Case:
    """0: the whole of it."""

    def store(weight: np.ndarray) -> Stored:
        rows, columns = weight.shape
        h, w = high or rows, wide or columns
        scales = np.zeros((-(-rows // h), -(-columns // w)), np.float32)
        values, left = np.zeros(weight.shape, FP8), np.zeros_like(weight)
        for i in range(0, rows, h):
            for j in range(0, columns, w):
                block = slice(i, i + h), slice(j, j + w)
                scales[i // h, j // w] = np.abs(weight[block]).max() / 448
                values[block] = (weight[block] / scales[i // h, j // w]).astype(FP8)
                left[block] = values[block].astype(np.float32) * scales[i // h, j // w]
        if method == "fp8":
            name = "weight_scale_inv" if wide else "weight_scale"
            return {"weight": values, name: scales if wide else scales.reshape(())}, left
        return {"weight": values, "weight_scale": scales} | (
            {"input_scale": np.ones(1, np.float32)} if high == 0 else {}
        ), left

    scheme = "fp8-block" if (high, wide) == (128, 128) else "fp8" if not wide else None
    if method == "fp8":
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        return Case(config | ({"weight_block_size": [high, wide]} if wide else {}), store, scheme)
    strategy = "block" if wide else "channel" if high else "tensor"
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    weights |= {"block_structure": [high, wide]} if wide else {}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": bool(high), "strategy": "token"}
    return compressed_case("float-quantized", weights, inputs, store, scheme)


def bitsandbytes(table: str, size: int = 64, nested: bool = False) -> Case:
    numbers = np.array(TABLES[table], np.float32)

    def store(weight: np.ndarray) -> Stored:
        count = -(-weight.size // size)
        blocks = np.zeros((count, size), np.float32)
        blocks.reshape(-1)[: weight.size] = weight.reshape(-1)
        scales = np.abs(blocks).max(axis=1)
        state: dict[str, Any] = {"quant_type": table, "blocksize": size, "shape": list(weight.shape)}
        tensors = {"weight.quant_map": numbers}
        if nested:
            mean = float(scales.mean())
            state |= {"nested_blocksize": 256, "nested_offset": mean, "nested_dtype": "float32"}
            # Not of bitsandbytes' shape, which nothing depends on.
            code = np.linspace(-1, 1, 256, dtype=np.float32)
            most = np.array([np.abs(scales[i : i + 256] - mean).max() for i in range(0, count, 256)], np.float32)
            each = np.repeat(most, 256)[:count]
            places = np.abs((scales - mean)[:, None] / each[:, None] - code).argmin(axis=1).astype(np.uint8)
            tensors |= {"weight.absmax": places, "weight.nested_absmax": most, "weight.nested_quant_map": code}
            scales = code[places] * each + np.float32(mean)
        else:
            tensors["weight.absmax"] = scales
        chosen = np.abs(blocks[..., None] / scales[:, None, None] - numbers).argmin(axis=-1)
        left = (numbers[chosen] * scales[:, None]).reshape(-1)[: weight.size].reshape(weight.shape)
        halves = chosen.reshape(-1)[: weight.size].reshape(-1, 2).astype(np.uint8)
        tensors["weight"] = (halves[:, :1] << 4) | halves[:, 1:]
        tensors[f"weight.quant_state.bitsandbytes__{table}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return tensors, left

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": table}
    return Case(
        config | ({"bnb_4bit_blocksize": size} if size != 64 else {}), store, table + f"-g{size}" * (size != 64)
    )


def llm_int8() -> Case:
    def store(weight: np.ndarray) -> Stored:
        largest = np.abs(weight).max(axis=1)
        values = np.round(weight * 127 / largest[:, None]).astype(np.int8)
        tensors = {"weight": values, "SCB": largest, "weight_format": np.array(0, np.uint8)}
        return tensors, values * (largest[:, None] / np.float32(127))

    return Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, store, "int8")


def mlx(bits: int, size: int) -> Case:
    def store(weight: np.ndarray) -> Stored:
        groups = weight.reshape(len(weight), -1, size)
        low, high = groups.min(axis=2), groups.max(axis=2)
        scales = ((low - high) / (2**bits - 1)).astype(np.float16)  # negative, as MLX's often are
        biases = high.astype(np.float16)
        of_scales, of_biases = (array.astype(np.float32)[..., None] for array in (scales, biases))
        values = np.clip(np.round((groups - of_biases) / of_scales), 0, 2**bits - 1).astype(np.uint8)
        stream = np.unpackbits(values.reshape(len(weight), -1, 1), axis=2, bitorder="little")[..., :bits]
        packed = np.packbits(stream.reshape(len(weight), -1), axis=1, bitorder="little").view(np.uint32)
        left = (values * of_scales + of_biases).reshape(weight.shape)
        return {"weight": packed, "scales": scales, "biases": biases}, left

    config = {"group_size": size, "bits": bits, "mode": "affine"}
    base = "int4" if bits <= 4 else "int8"
    name = base if (base, size) == ("int4", 32) else f"{base}-g{size}"
    return Case(config, store, f"{name}-biases")


def mlx_mxfp4() -> Case:
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    numbers = np.concatenate([numbers, -numbers])

    def store(weight: np.ndarray) -> Stored:
        groups = weight.reshape(len(weight), -1, 32)
        exponents = np.ceil(np.log2(np.abs(groups).max(axis=2, keepdims=True) / 6)).astype(int)
        values = np.abs(groups[..., None] / 2.0 ** exponents[..., None] - numbers).argmin(axis=-1)
        left = (numbers[values] * np.float32(2) ** exponents).reshape(weight.shape).astype(np.float32)
        pairs = values.reshape(len(weight), -1, 2).astype(np.uint8)
        packed = np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4).view(np.uint32)
        return {"weight": packed, "scales": (exponents[..., 0] + 127).astype(np.uint8)}, left

    return Case({"group_size": 32, "bits": 4, "mode": "mxfp4"}, store, "mxfp4")


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CASES = {
    "int8 w8a16": compressed(8),
    "int8 w8a8": compressed(8, kind="int", inputs=TOKEN),
    "int4": compressed(4, 32),
    "int4 of 128": compressed(4, 128),
    "int4 with zero points": compressed(4, 32, sym=False),
    "int8 with zero points": compressed(8, sym=False),
    "int4 in another order": compressed(4, 32, act=True),
    "fp8 of channels": fp8(1, 0, "compressed-tensors"),
    "fp8 of tensors": fp8(0, 0, "compressed-tensors"),
    "fp8 of blocks": fp8(128, 128, "compressed-tensors"),
    "fp8 of small blocks": fp8(32, 64, "fp8"),
    "deepseek": fp8(128, 128, "fp8"),
    "fp8 of whole tensors": fp8(0, 0, "fp8"),
    "gptq": gptq(4, 32),
    "gptq of 128": gptq(4, 128),
    "gptq 8 bits": gptq(8, 32),
    "gptq of rows": gptq(4, -1),
    "gptq in another order": gptq(4, 32, act=True),
    "gptq with zero points": gptq(4, 32, sym=False),
    "gptq version 2": gptq(4, 32, version=2),
    "awq": awq(32),
    "nf4": bitsandbytes("nf4", nested=True),
    "fp4": bitsandbytes("fp4"),
    "nf4 of 128": bitsandbytes("nf4", 128),
    "llm.int8": llm_int8(),
    "mlx 2": mlx(2, 32),
    "mlx 3": mlx(3, 64),
    "mlx 4": mlx(4, 64),
    "mlx 6": mlx(6, 128),
    "mlx 8": mlx(8, 64),
    "mlx mxfp4": mlx_mxfp4(),
}


def quantized(tensors: dict[str, np.ndarray], case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A checkpoint's tensors with its linears in a format, and with what they stand for."""
    stored: dict[str, np.ndarray] = {}
    left: dict[str, np.ndarray] = {}
    method = case.config.get("quant_method")  # MLX has none
    plain = ["embed", "lm_head", "wte", "wpe", "mlp.gate.", "shared_expert_gate"] if method else []
    plain += ["norm", "conv1d", "conv.conv", *(["k_proj"] if method in ("awq", "compressed-tensors") else [])]
    gpt2 = any("c_attn" in name for name in tensors)  # whose matrices are [in, out]
    for name, tensor in tensors.items():
        whole = method or tensor.shape[-1] % case.config["group_size"] == 0
        if tensor.ndim < 2 or not whole or any(part in name for part in plain):
            stored[name] = left[name] = tensor
            continue
        in_out = gpt2 and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        arrays, weight = case.store(tensor.T if in_out else tensor)
        stored |= {name.removesuffix("weight") + suffix: value for suffix, value in arrays.items()}
        left[name] = np.ascontiguousarray(weight.T if in_out else weight).astype(np.float32)
    return stored, left
