"""Where a model can be planned for: TPU slices by their names, and GPUs as `h100-4`.

GPUs: speeds from NVIDIA's data sheets, without sparsity, of float16 or bfloat16; the links are PCIe for T4 and L4,
NVLink for the others, both ways. Memory: what nvidia-smi shows, and of that what JAX takes unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Compute capabilities: https://developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

import re

from jaxinfer.plan.slices import Chip, Slice, compiled_slice, names, parse_slice

MIB = 2**20
TAKEN = 0.75  # of a GPU's memory
MOST = 8  # GPUs of a machine


def _gpu(name: str, capability: str, mib: int, bandwidth: float, flops: float, link: float) -> Chip:
    return Chip(name, int(mib * MIB * TAKEN), bandwidth, flops, link, capability)


GPUS = {
    "t4": _gpu("T4", "7.5", 15_360, 0.320e12, 65e12, 32e9),
    "l4": _gpu("L4", "8.9", 23_034, 0.300e12, 121e12, 64e9),
    "a100": _gpu("A100 80GB", "8.0", 81_920, 2.039e12, 312e12, 600e9),
    "h100": _gpu("H100", "9.0", 81_559, 3.35e12, 989e12, 900e9),
    "h200": _gpu("H200", "9.0", 143_771, 4.8e12, 989e12, 900e9),
}


def find_target(name: str, compiles: bool = True) -> Slice:
    """The slice `v5e-8`, or 4 GPUs as `h100-4` (`h100` is one). compiles=False: for its shapes alone, as GPUs always
    are. Raises ValueError that lists what there is, or says how to install the TPU compiler."""
    gpu = re.fullmatch(r"(\w+?)(?:-(\d))?", name.strip().lower())
    if gpu is not None and gpu[1] in GPUS and 1 <= (count := int(gpu[2] or 1)) <= MOST:
        return Slice.of_shapes(name, GPUS[gpu[1]], count)
    parsed = parse_slice(name)
    if parsed is None:
        gpus = ", ".join(GPUS)
        raise ValueError(f"topology {name!r} is not known; there are {', '.join(names())}, {gpus}, with -2 to -8 GPUs")
    generation, chips = parsed
    if compiles:
        return compiled_slice(name, generation, chips)
    return Slice.of_shapes(name, generation.chip, chips * generation.devices, generation.devices)
