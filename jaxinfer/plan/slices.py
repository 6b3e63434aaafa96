"""TPU slices by the names that Google sells them under, what their chips can do, and their devices without them.

Speeds: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, one page a generation. Memory: what the compiler
says that programs have. v4 and v5p names count
cores, two a chip; the others count chips. A tpu7x chip is two devices to JAX, each with half of the chip.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Chip:
    """One device.

    name: of its kind.
    memory: bytes that programs can use.
    bandwidth: of the memory, bytes/s.
    flops: bfloat16, each second.
    link: bytes/s to and from all neighbours together.
    capability: NVIDIA's compute capability; None of TPUs.
    clock: cycles/s of a TPU's cores, from `flops`: a core has four matrix units of 128 x 128, since v6e of 256 x 256.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    capability: str | None = None
    clock: float = 0.0


@dataclass(frozen=True)
class Generation:
    """TPUs of one kind.

    chip: what each JAX device of them is.
    per_chip: what the slice's name counts, of each chip.
    devices: JAX's, of each chip.
    shapes: chips along each axis, by their number.
    options: further ones of the compiler's description of a slice.
    """

    chip: Chip
    per_chip: int
    devices: int
    shapes: dict[int, str]
    options: tuple[tuple[str, Any], ...] = ()


GIB = 2**30
FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
MEGACORE = (("chip_config_name", "megacore"),)

GENERATIONS = {
    "v4": Generation(Chip("v4", int(30.75 * GIB), 1.228e12, 275e12, 300e9, clock=1.05e9), 2, 1, CUBES, MEGACORE),
    "v5e": Generation(Chip("v5e", int(15.75 * GIB), 0.819e12, 197e12, 200e9, clock=1.5e9), 1, 1, FLAT),
    "v5p": Generation(Chip("v5p", int(95.74 * GIB), 2.765e12, 459e12, 600e9, clock=1.75e9), 2, 1, CUBES),
    "v6e": Generation(Chip("v6e", int(31.25 * GIB), 1.640e12, 918e12, 448e9, clock=1.75e9), 1, 1, FLAT),
    "tpu7x": Generation(
        Chip("tpu7x", int(94.75 * GIB), 3.69e12, 1153.5e12, 600e9, clock=2.2e9), 1, 2, {1: "1x1x1", **CUBES}
    ),
}
ALIASES = {"v7x": "tpu7x", "v5litepod": "v5e"}


@dataclass(frozen=True)
class Device:
    """In the place of a jax.Device, where only shapes are looked at.

    id, platform, process_index, device_kind, compute_capability: the attributes of a device that are asked for.
    """

    id: int
    platform: str
    process_index: int = 0
    device_kind: str = "none"
    compute_capability: str | None = None


@dataclass(frozen=True)
class Slice:
    """A slice and its devices, which are not there.

    name: as users have it.
    chip: what each device is.
    devices: the compiler's, or `Device`s.
    per_chip: devices of a chip.
    compiles: there is a compiler for them.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    per_chip: int = 1
    compiles: bool = True

    @classmethod
    def of_shapes(cls, name: str, chip: Chip, count: int, per_chip: int = 1) -> Slice:
        """One that nothing can be compiled for."""
        platform = "tpu" if chip.capability is None else "gpu"
        devices = (Device(i, platform, compute_capability=chip.capability) for i in range(count))
        return cls(name, chip, tuple(devices), per_chip, False)

    def with_devices(self, count: int) -> Slice:
        """As many of the same kind, for their shapes."""
        return Slice.of_shapes(f"{count} {self.chip.name}", self.chip, count, self.per_chip)


def names() -> list[str]:
    """Every slice that is known."""
    return [
        f"{g}-{count * generation.per_chip}" for g, generation in GENERATIONS.items() for count in generation.shapes
    ]


def parse_slice(name: str) -> tuple[Generation, int] | None:
    """Generation and number of chips of `v5e-8`; None if there is no such slice."""
    match = re.fullmatch(r"(\w+)-(\d{1,5})", name.strip().lower())
    generation = GENERATIONS.get(ALIASES.get(match[1], match[1])) if match else None
    if generation is None or match is None:
        return None
    chips, rest = divmod(int(match[2]), generation.per_chip)
    return (generation, chips) if not rest and chips in generation.shapes else None


def compiled_slice(name: str, generation: Generation, chips: int) -> Slice:
    """With the devices of the TPU compiler. Raises ValueError that says how to install it."""
    # libtpu asks the cloud where it is, unless it is told that this is no TPU machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError("the TPU compiler is not installed: pip install '.[tpu]' (no TPU is needed)") from None
    from jax.experimental import topologies

    shape = generation.shapes[chips]
    sizes = tuple(map(int, shape.split("x")))
    most = 8 if generation.chip.name in ("v5e", "v6e") else 4  # chips of a host
    bounds = (*sizes, 1)[:3] if chips <= most else (2, 2, 1)
    topology = topologies.get_topology_desc(
        topology_name=f"{generation.chip.name}:{shape}",
        platform="tpu",
        chips_per_host_bounds=bounds,
        **dict(generation.options),
    )
    devices: tuple[jax.Device, ...] = tuple(topology.devices)
    assert len(devices) == chips * generation.devices, (name, len(devices))
    return Slice(name, generation.chip, devices, generation.devices)
