"""Meshes of devices from a short spec, and which mesh axes a weight's logical axes are split over.

`tensor` splits attention heads, MLP width and vocabulary (Shoeybi et al., arXiv:1909.08053): each device holds
a slice of every large weight, and two reductions a layer join their results. Where there are fewer key/value heads than
devices, the axis is split inside into `kv` x `group`: query heads go over both, key/value heads over `kv` alone, so
that 8 heads on 16 devices are kept twice and not 16 times. Where there are many tokens it splits these between
products, see `splits_tokens`.

`data` and `fsdp` split rows: each of their shards has its own sequences, slots and pages. Weights are whole on each
`data` shard; `fsdp` splits them too, along the model's width, and a layer's are gathered when their turn comes
(Rajbhandari et al., arXiv:1910.02054, stage 3).

Experts are split over all devices, whatever else these do: tokens are gathered from the shards of rows, and what their
experts made of them goes back (Lepikhin et al., arXiv:2006.16668). A spec's `expert` says over how many, where each
should be there more than once: the `data` axis is then split inside into `replica` x `data`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

REPLICA, DATA, FSDP = "replica", "data", "fsdp"
KV, GROUP = "kv", "group"  # mesh axes; together they are `tensor`
AXES = (DATA, FSDP, "tensor")  # of a spec
EXPERT = "expert"  # in a spec, too
ROWS = (REPLICA, DATA, FSDP)  # mesh axes that rows are split over
TENSOR = (KV, GROUP)
GATHERED = (DATA, FSDP)  # over which experts take each other's tokens
RULES: Mapping[str, tuple[str, ...]] = {
    "heads": TENSOR,
    "kv_heads": (KV,),
    "mlp": TENSOR,
    "vocab": TENSOR,
    "experts": (*GATHERED, *TENSOR),
    "embed": (FSDP,),
}
# Numbers in hidden states that are worth splitting over `tensor`, by platform: below that, what one more collective
# takes to begin is as much as is saved.
LEAST_SPLIT: dict[str, int] = {"tpu": 2**21}
PADDED = ("mlp", "vocab", "experts")  # these can be any size: what is missing to a multiple is zeros


def local_devices() -> list[jax.Device]:
    """Of this machine. Raises ValueError where JAX has none of the kind that it is told to use."""
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter is all that it says of a plugin that is not installed
        told = jax.config.jax_platforms  # type: ignore[attr-defined]
        why = " ".join(str(error).split()) or "there is no such device here, or JAX's part for it is not installed"
        where = f"JAX_PLATFORMS is {told!r}" if told else "JAX can't start"
        raise ValueError(f"{where}: {why}; set JAX_PLATFORMS=cpu, or nothing, to use what is here") from None


def parse_mesh(spec: str) -> dict[str, int]:
    """The axes of "data=2,tensor=4" and their sizes; those that are not named have 1, and `expert` all devices. Raises
    ValueError."""
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,5})\s*", part)
        if match is None:
            raise ValueError(f"mesh is {spec!r}: it must look like tensor=4 or data=2,tensor=4")
        if match[1] not in (*AXES, EXPERT):
            there = ", ".join((*AXES, EXPERT))
            raise ValueError(f"mesh is {spec!r}: there is no axis {match[1]!r}; there are {there}")
        if match[1] in sizes:
            raise ValueError(f"mesh is {spec!r}: axis {match[1]} is there twice")
        sizes[match[1]] = int(match[2])
    all_of_them = math.prod(size for axis, size in sizes.items() if axis != EXPERT)
    return {axis: sizes.get(axis, 1) for axis in AXES} | {EXPERT: sizes.get(EXPERT, all_of_them)}


def tensor_problem(tensor: int, num_heads: int, num_kv_heads: int) -> str | None:
    """Why heads can't be split in so many parts, or None."""
    if num_heads % tensor:
        return f"tensor={tensor} does not divide the model's {num_heads} heads"
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
    spec: str | None,
    devices: Sequence[jax.Device],
    num_heads: int,
    num_kv_heads: int,
    hidden_size: int,
    wanted: int = 1,
    experts: bool = False,
) -> Mesh | None:
    """The mesh of a spec over the first of `devices`; None if one device is enough.

    Without a spec it is over `wanted` devices: `tensor` as large as the model's heads allow, `data` what is left.
    experts: whether the model has some. Raises ValueError naming the sizes that would work.
    """
    fitting = tensor_sizes(num_heads, num_kv_heads, len(devices))
    if spec is None:
        tensor = max(n for n in fitting if wanted % n == 0)
        spec = f"data={wanted // tensor},tensor={tensor}"
    sizes = parse_mesh(spec)
    data, fsdp, tensor = (sizes[axis] for axis in AXES)
    count = data * fsdp * tensor
    choice = f"tensor may be {', '.join(map(str, fitting))}"
    if count > len(devices):
        raise ValueError(f"mesh is {spec!r}: it needs {count} devices and there are {len(devices)}; with them {choice}")
    problem = tensor_problem(tensor, num_heads, num_kv_heads)
    if problem is not None:
        raise ValueError(f"mesh is {spec!r}: {problem}; {choice}")
    if hidden_size % fsdp:
        may_be = ", ".join(str(n) for n in range(1, len(devices) + 1) if hidden_size % n == 0)
        raise ValueError(
            f"mesh is {spec!r}: fsdp={fsdp} does not divide the model's width of {hidden_size}; fsdp may be {may_be}"
        )
    replicas, rest = divmod(count, sizes[EXPERT])
    if rest or data % replicas:
        may_be = ", ".join(str(n * fsdp * tensor) for n in range(1, data + 1) if data % n == 0)
        raise ValueError(f"mesh is {spec!r}: so many of its devices can't share experts; expert may be {may_be}")
    if replicas > 1 and not experts:
        raise ValueError(f"mesh is {spec!r}: the model has no experts: leave expert={sizes[EXPERT]} out")
    if count == 1:
        return None
    kv = kv_parts(tensor, num_kv_heads)
    grid = np.array(devices[:count]).reshape(replicas, data // replicas, fsdp, kv, tensor // kv)
    return Mesh(grid, (*ROWS, *TENSOR), axis_types=(AxisType.Auto,) * grid.ndim)


def axis_size(placement: jax.Device | Mesh | None, axes: Sequence[str]) -> int:
    """How many parts mesh axes make together: `axis_size(mesh, ROWS)`; 1 where there is no mesh."""
    return math.prod(placement.shape[axis] for axis in axes) if isinstance(placement, Mesh) else 1


def devices_of(placement: jax.Device | Mesh) -> list[jax.Device]:
    """The device, or those of the mesh in its order."""
    return list(placement.devices.flat) if isinstance(placement, Mesh) else [placement]


def tpu_generation(kind: str) -> int | None:
    """Of a kind of device: 5 for v5e and v5p; None of what is no TPU."""
    match = re.match(r"TPU ?v?(\d+)", kind)
    return int(match[1]) if match else None


def compute_capability(device: jax.Device) -> float | None:
    """NVIDIA's number for what a GPU can do, 8.0 for an A100; None of everything else."""
    text = str(getattr(device, "compute_capability", None))  # AMD's GPUs have a name there
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else None


def partition(axes: Sequence[str | None]) -> PartitionSpec:
    """How a weight with these logical axes is split. Raises ValueError if two of them want the same mesh axis."""
    # Vectors are too small to be worth a gather.
    parts = [RULES[axis] if axis is not None and (len(axes) > 1 or axis != "embed") else () for axis in axes]
    for i, axis in enumerate(parts):
        for j, other in enumerate(parts[:i]):
            if shared := set(axis) & set(other):
                over = "fsdp" if FSDP in shared else "tensor"
                raise ValueError(f"logical axes {axes[j]!r} and {axes[i]!r} of one weight are both split over {over}")
    return PartitionSpec(*(part or None for part in parts))


def fsdp_axis(axes: Sequence[str | None]) -> int | None:
    """Which axis of a weight `fsdp` splits, if any."""
    spec = partition(axes)
    return next((i for i in range(len(axes)) if axes_of(spec, i) == (FSDP,)), None)


def on_axes(axes: Sequence[str | None], wanted: Sequence[str]) -> PartitionSpec:
    """How a weight with these logical axes is split over some of the mesh's axes."""
    spec = partition(axes)
    return PartitionSpec(*(tuple(a for a in axes_of(spec, i) if a in wanted) or None for i in range(len(axes))))


def on_tensor(call: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A call that each device of `tensor` makes on its own part; for use inside of a shard_map over rows."""
    return jax.shard_map(call, axis_names=set(TENSOR), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def splits_tokens(tokens: int, width: int) -> bool:
    """Whether hidden states `[tokens, width]` of a shard of rows are split over `tensor` between products: then norms
    and sums are each device's part, and an all-reduce is a reduce-scatter and an all-gather (sequence parallelism,
    Korthikanti et al., arXiv:2205.05198)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(TENSOR) <= set(mesh.axis_names) or set(TENSOR) & set(mesh.manual_axes):
        return False
    device = mesh.abstract_device
    least = LEAST_SPLIT.get(jax.default_backend() if device is None else device.platform)
    parts = math.prod(mesh.shape[axis] for axis in TENSOR)
    return least is not None and tokens * width >= least and parts > 1 and tokens % parts == 0


def split_tokens(x: jax.Array) -> jax.Array:
    """Hidden states `[T, D]`, each device of `tensor` with some tokens, where that is worth it."""
    return lax.with_sharding_constraint(x, PartitionSpec(TENSOR)) if splits_tokens(*x.shape) else x


def whole_tokens(x: jax.Array) -> jax.Array:
    """They again, all tokens on each device."""
    return lax.with_sharding_constraint(x, PartitionSpec()) if splits_tokens(*x.shape) else x


def with_sharding(
    abstract: jax.ShapeDtypeStruct, axes: Sequence[str | None], placement: jax.Device | Mesh, multiples: Sequence[int]
) -> jax.ShapeDtypeStruct:
    """A weight with its sharding on a device; or split over a mesh, and padded to what that divides.

    multiples: how many places of each axis are not to be split.
    """
    if not isinstance(placement, Mesh):
        return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=SingleDeviceSharding(placement))
    shape = padded(abstract.shape, axes, placement, multiples)
    return jax.ShapeDtypeStruct(shape, abstract.dtype, sharding=NamedSharding(placement, partition(axes)))


def padded(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, multiples: Sequence[int]) -> tuple[int, ...]:
    """The shape, with what can be padded rounded up to what the mesh divides; multiples: see with_sharding."""
    each = zip(axes, counts(axes, mesh), multiples, strict=True)
    units = (count * unit if axis in PADDED else 1 for axis, count, unit in each)
    return tuple(-(-size // unit) * unit for size, unit in zip(shape, units, strict=True))


def counts(axes: Sequence[str | None], placement: jax.Device | Mesh) -> tuple[int, ...]:
    """Into how many parts each axis of a weight is split."""
    return tuple(axis_size(placement, axes_of(partition(axes), i)) for i in range(len(axes)))


def axes_of(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """The mesh axes that an array's axis is split over."""
    part = spec[axis]
    return (part,) if isinstance(part, str) else tuple(part or ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on each device."""
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh) -> str:
    """A mesh as a spec."""
    sizes = {DATA: axis_size(mesh, (REPLICA, DATA)), FSDP: mesh.shape[FSDP], "tensor": axis_size(mesh, TENSOR)}
    named = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    if mesh.shape[REPLICA] > 1:
        named.append(f"{EXPERT}={axis_size(mesh, RULES['experts'])}")
    return ",".join(named)


def on_each(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of a device's part of an array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


Index = tuple[tuple[int, int], ...]


def parts(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> dict[Index, list[Any]]:
    """The different parts of an array on this process's devices, and which devices hold each."""
    holders: dict[Index, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        holders.setdefault(on_each(index, shape), []).append(device)
    return holders
