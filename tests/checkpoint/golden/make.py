"""Writes golden files: linears as bitsandbytes and MLX store them, and what they read in that. Neither is needed by
tests, and each may have an environment of its own:

    python make.py bitsandbytes    with torch, bitsandbytes 0.50.2 and safetensors
    python make.py mlx             with mlx[cpu] 0.32.4
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent


def bitsandbytes():
    import torch
    from bitsandbytes import functional
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            # Blocks that end with rows, that go on over them, and more of them than have one scale of scales.
            for rows, columns, size in ((6, 128, 64), (5, 96, 64), (20, 512, 32)):
                if (nested and size == 64) or (not nested and size == 32):
                    continue
                weight = torch.randn(rows, columns) * torch.rand(rows, 1)
                weight[2] = 0
                packed, state = functional.quantize_4bit(
                    weight, quant_type=kind, compress_statistics=nested, blocksize=size
                )
                name = f"{kind}{'-nested' if nested else ''} {rows}x{columns}/{size}:"
                tensors[f"{name}weight"] = packed
                tensors |= {f"{name}weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
                if not nested:
                    tensors[f"{name}original"] = weight
                tensors[f"{name}expected"] = functional.dequantize_4bit(packed, state)
    weight = torch.randn(6, 64)
    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    kind = torch.tensor(0, dtype=torch.uint8)
    tensors |= {"int8 6x64/0:weight": values, "int8 6x64/0:SCB": scales, "int8 6x64/0:weight_format": kind}
    tensors["int8 6x64/0:expected"] = functional.int8_vectorwise_dequant(values, scales)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "bitsandbytes.safetensors")


def mlx():
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    tensors = {}
    kinds = [(2, 32, mx.float32), (3, 64, mx.float16), (4, 64, mx.bfloat16), (4, 32, mx.float16)]
    for bits, size, dtype in (*kinds, (5, 32, mx.float16), (6, 128, mx.float32), (8, 64, mx.bfloat16)):
        weight = (mx.random.normal((6, 128)) * mx.random.uniform(shape=(6, 1))).astype(dtype)
        packed, scales, biases = mx.quantize(weight, size, bits)
        name = f"{bits} 6x128/{size}:"
        tensors |= {f"{name}weight": packed, f"{name}scales": scales, f"{name}biases": biases}
        tensors[f"{name}expected"] = mx.dequantize(
            packed, scales.astype(mx.float32), biases.astype(mx.float32), size, bits
        )
    weight = mx.random.normal((6, 128)) * mx.random.uniform(shape=(6, 1))
    packed, scales = mx.quantize(weight, mode="mxfp4")
    tensors |= {"mxfp4 6x128/32:weight": packed, "mxfp4 6x128/32:scales": scales}
    tensors["mxfp4 6x128/32:expected"] = mx.dequantize(packed, scales, mode="mxfp4", dtype=mx.float32)
    mx.save_safetensors(str(HERE / "mlx.safetensors"), tensors)


if __name__ == "__main__":
    {"bitsandbytes": bitsandbytes, "mlx": mlx}[sys.argv[1]]()
