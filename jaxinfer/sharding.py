"""Meshes of devices from a short spec, and which mesh axes a weight's logical axes are split over.

`tensor` splits attention heads, MLP width and vocabulary (Shoeybi et al., arXiv:1909.08053): each device holds a slice
of every large weight, and two reductions a layer join their results. Where there are fewer key/value heads than
devices, the axis is split inside into `kv` x `group`: query heads go over both, key/value heads over `kv` alone, so
that 8 heads on 16 devices are kept twice and not 16 times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

AXES = ("tensor",)  # of a spec
KV, GROUP = "kv", "group"  # mesh axes; together they are `tensor`
RULES: Mapping[str, tuple[str, ...]] = {
    "heads": (KV, GROUP),
    "kv_heads": (KV,),
    "mlp": (KV, GROUP),
    "vocab": (KV, GROUP),
    "embed": (),
}
CACHE = PartitionSpec(None, KV)  # of keys and values, [pages, K, page_size, d]
PADDED = ("mlp", "vocab")  # these can be any size: what is missing to a multiple is zeros


def parse_mesh(spec: str) -> dict[str, int]:
    """The axes of "tensor=4" and their sizes. Raises ValueError."""
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,5})\s*", part)
        if found is None:
            raise ValueError(f"mesh is {spec!r}: it must look like tensor=4")
        if found[1] not in AXES:
            raise ValueError(f"mesh is {spec!r}: there is no axis {found[1]!r}; there is {', '.join(AXES)}")
        if found[1] in sizes:
            raise ValueError(f"mesh is {spec!r}: axis {found[1]} is there twice")
        sizes[found[1]] = int(found[2])
    return sizes


def tensor_problem(tensor: int, num_heads: int, num_kv_heads: int) -> str | None:
    """Why heads can't be split in so many parts, or None."""
    if num_heads % tensor:
        return f"tensor={tensor} does not divide the model's {num_heads} attention heads"
    if num_kv_heads % tensor and tensor % num_kv_heads:
        return f"tensor={tensor} neither divides the model's {num_kv_heads} key/value heads nor is a multiple of them"
    return None


def tensor_sizes(num_heads: int, num_kv_heads: int, most: int) -> list[int]:
    """In how many parts heads can be split, up to `most`."""
    return [n for n in range(1, most + 1) if tensor_problem(n, num_heads, num_kv_heads) is None]


def kv_parts(tensor: int, num_kv_heads: int) -> int:
    """Into how many parts key/value heads are split: where there are fewer of them, each is kept several times."""
    return min(tensor, num_kv_heads)


def make_mesh(
    spec: str | None, devices: Sequence[jax.Device], num_heads: int, num_kv_heads: int, wanted: int = 1
) -> Mesh | None:
    """The mesh of a spec over the first of `devices`; None if one device is enough.

    Without a spec it is the largest one that the model's heads allow, of at most `wanted` devices.
    Raises ValueError naming the sizes that would work.
    """
    fitting = tensor_sizes(num_heads, num_kv_heads, len(devices))
    tensor = max(n for n in fitting if n <= wanted) if spec is None else parse_mesh(spec).get("tensor", 1)
    if tensor > len(devices):
        raise ValueError(f"mesh is {spec!r}: there are {len(devices)} devices; with them {_choice(fitting)}")
    problem = tensor_problem(tensor, num_heads, num_kv_heads)
    if problem is not None:
        raise ValueError(f"mesh is {spec!r}: {problem}; {_choice(fitting)}")
    if tensor == 1:
        return None
    kv = kv_parts(tensor, num_kv_heads)
    grid = np.array(devices[:tensor]).reshape(kv, tensor // kv)
    return Mesh(grid, (KV, GROUP), axis_types=(AxisType.Auto, AxisType.Auto))


def _choice(fitting: Sequence[int]) -> str:
    return f"tensor may be {', '.join(map(str, fitting))}"


def partition(axes: Sequence[str | None]) -> PartitionSpec:
    """How a weight with these logical axes is split. Raises ValueError if two of them want the same mesh axis."""
    parts = [RULES[axis] if axis is not None else () for axis in axes]
    for i, axis in enumerate(parts):
        for j, other in enumerate(parts[:i]):
            if set(axis) & set(other):
                raise ValueError(f"logical axes {axes[j]!r} and {axes[i]!r} of one weight are both split over tensor")
    return PartitionSpec(*(part or None for part in parts))


def placed(abstract: jax.ShapeDtypeStruct, axes: Sequence[str | None], place: jax.Device | Mesh) -> Any:
    """A weight with its sharding on a device; or split over a mesh, and padded to what that divides."""
    if not isinstance(place, Mesh):
        return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=SingleDeviceSharding(place))
    shape = padded(abstract.shape, axes, place)
    return jax.ShapeDtypeStruct(shape, abstract.dtype, sharding=NamedSharding(place, partition(axes)))


def padded(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> tuple[int, ...]:
    """The shape with MLP width and vocabulary rounded up to what the mesh divides."""
    return tuple(
        -(-size // mesh.size) * mesh.size if axis in PADDED else size for size, axis in zip(shape, axes, strict=True)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on each device."""
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh) -> str:
    """A mesh as a spec."""
    return f"tensor={mesh.size}"


def on_each(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of a device's part of an array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


Index = tuple[tuple[int, int], ...]


def parts(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> dict[Index, list[Any]]:
    """The different parts of an array on this process's devices, and which devices hold each."""
    found: dict[Index, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        found.setdefault(on_each(index, shape), []).append(device)
    return found
