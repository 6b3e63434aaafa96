"""A compiled program as bytes, in JAX's own format (jax.experimental.serialize_executable), and all that it depends on.

The format has pickle inside: such bytes are as trusted as code. JAX takes those of another version or machine without
complaint, so what they were compiled for is compared before they are looked at.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax.experimental import serialize_executable

from jaxinfer import __version__
from jaxinfer.attention.fused import tokamax_version
from jaxinfer.engine.programs import Key, ModelPrograms
from jaxinfer.kernels.cpu import kernels

LAPACK = b"lapack_"  # what its functions' names begin with
SETTINGS = ("enable_x64", "default_matmul_precision", "default_prng_impl", "threefry_partitionable")
# What of a CPU matters to a compiler; the rest of Linux's list changes with the kernel and the hypervisor.
FEATURES = re.compile(r"s?sse|avx|amx|fma|f16c|bmi|v?aes|v?pclmul|sha|gfni|popcnt|abm|movbe|adx|asimd|sve|fp(hp)?$")


def environment(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """All that compiled programs depend on besides model and sizes. devices: those of the mesh, in its order."""
    kind = devices[0].platform
    facts: dict[str, Any] = {
        "jaxinfer": code(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "device": kind if kind == "cpu" else devices[0].device_kind,
        "devices": [_place(device) for device in devices],
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "settings": {name: getattr(jax.config, f"jax_{name}") for name in SETTINGS} | {"XLA_FLAGS": _flags()},
    }
    if kind == "cpu":
        facts["features"] = [platform.machine(), *cpu_features()]
        facts["settings"]["CPU kernels"] = kernels().level or "none"
    if kind == "tpu":
        facts["settings"]["tokamax"] = tokamax_version() or "none"
        facts["settings"]["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "")
    return _plain(facts)


def code() -> str:
    """Tells versions and copies of this package from each other."""
    return f"{__version__} ({_source()})"


def signature(programs: ModelPrograms, key: Key) -> str:
    """Of a program's arguments and results: names, shapes, types and how they are split."""
    leaves = [(s.shape, str(s.dtype), _spec(s.sharding)) for s in jax.tree.leaves(programs[key].arguments)]
    text = f"{_trees(programs, key)} {leaves}"
    return hashlib.sha256(text.encode()).hexdigest()


def serialize(programs: ModelPrograms, key: Key, compiled: Any) -> bytes:
    """A compiled program in JAX's format."""
    content, *trees = serialize_executable.serialize(compiled)
    assert tuple(trees) == _trees(programs, key), key
    return content


def deserialize(programs: ModelPrograms, key: Key, content: bytes) -> jax.stages.Compiled:
    """It again, ready to be called. Runs pickle: of trusted bytes alone. Raises ValueError."""
    devices = programs.devices
    if LAPACK in content and devices[0].platform == "cpu":
        _find_lapack()
    try:
        return serialize_executable.deserialize_and_load(
            content, *_trees(programs, key), backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # of pickle, of what it calls, and of the runtime
        raise ValueError(f"JAX can't read it ({type(error).__name__}: {error})") from None


@functools.cache
def _find_lapack() -> None:
    """JAX looks LAPACK's functions up when it first lowers a program that calls one, and a program that is read would
    jump to nowhere."""
    shape = jax.ShapeDtypeStruct((2, 2), "float32")
    solve = jax.jit(functools.partial(lax.linalg.triangular_solve, left_side=True))
    solve.trace(shape, shape).lower(lowering_platforms=("cpu",))


def _trees(programs: ModelPrograms, key: Key) -> tuple[Any, Any]:
    """Of arguments and results. JAX would have them pickled."""
    program = programs[key]
    return jax.tree.structure((program.arguments, {})), jax.tree.structure(program.results)


def _place(device: jax.Device) -> str:
    coordinates = f" at {tuple(device.coords)}" if hasattr(device, "coords") else ""
    return f"device {device.id} of process {device.process_index}{coordinates}"


def _spec(sharding: Any) -> str:
    return str(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else "one device"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


@functools.cache
def _source() -> str:
    """Of all files: a change anywhere may change a program."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _flags() -> list[str]:
    """XLA's, but for those that change no program."""
    idle = ("--xla_force_host_platform_device_count", "--xla_dump")
    return [flag for flag in shlex.split(os.environ.get("XLA_FLAGS", "")) if not flag.startswith(idle)]


def cpu_features() -> list[str]:
    """Of this machine, where Linux says them."""
    with contextlib.suppress(OSError):
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return sorted(feature for feature in set(match[1].split()) if FEATURES.match(feature)) if match else []
    return [platform.processor()]
