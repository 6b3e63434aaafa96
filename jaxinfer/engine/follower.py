"""What the processes do that follow: as process 0 says, until its program ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.open import Weights
from jaxinfer.distributed import Group
from jaxinfer.engine.compiled import Folder
from jaxinfer.engine.config import EngineConfig, which
from jaxinfer.engine.leader import finished, unpack
from jaxinfer.engine.programs import Key
from jaxinfer.engine.runner import Runner

HERE = which(of_process_0=True)


def agree(
    group: Group,
    settings: EngineConfig,
    config: Mapping[str, Any],
    dtype: np.dtype[Any],
    checkpoint: Weights,
    placement: jax.Device | Mesh,
    compiled: Folder | None,
) -> None:
    """Takes the processes for one model. Raises ValueError in all of them if they don't load the same one in the same
    way, or if it can't be split over them."""
    group.taken = True
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    facts = {
        "the digest of the compiled programs that are used": compiled.digest if compiled else None,
        **{f"option {name}": value for name, value in settings.items() if name not in HERE},
        "config.json's digest": digest,
        "the weights' size in bytes": checkpoint.nbytes,
        "dtype": str(dtype),
        "the kind of device": jax.local_devices()[0].device_kind,
        "the number of devices": jax.local_device_count(),
    }
    group.agree(facts)
    processes = {device.process_index for device in placement.devices.flat} if isinstance(placement, Mesh) else {0}
    if len(processes) < group.size:
        raise ValueError(
            f"mesh is {settings['mesh']!r}: it has devices of {len(processes)} processes, and all {group.size} need "
            f"some; {jax.device_count()} devices are there in all"
        )


def follow(group: Group, runner: Runner) -> NoReturn:
    """Does the calls that process 0 does, with this process's part of parameters and state.

    Raises SystemExit(0) when process 0's program ends, and ValueError for what can't be from it.
    """
    keys = set(runner.programs.keys())
    while True:
        header, _, data = group.receive().partition(b"\n")
        what, *named = json.loads(header)
        wanted: list[Key] = [tuple(key) for key in named]
        if not keys.issuperset(wanted):
            raise ValueError(f"process 0 says {what!r} of programs {wanted}: they are not all there here")
        match what:
            case "call":
                inputs = unpack(memoryview(data), [runner.programs[key].inputs for key in wanted])
                with group.blamed():
                    finished(runner.call(list(zip(wanted, inputs, strict=True))))
            case "warm up":
                runner.warm_up(wanted)
            case "close":
                runner.close()
            case _:
                raise ValueError(f"process 0 says {what!r}")
