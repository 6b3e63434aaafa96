"""A model on several hosts: the same program runs on each, `initialize` joins them, process 0 does the work.

On process 0 everything is as on one host. On the others `LLM(...)` does its part of what process 0 asks the devices to
do, for as long as process 0's program runs, and then ends the process, with exit code 0: what comes after `LLM(...)` in
a program happens once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.relay import Relay
from jaxinfer.distributed.rendezvous import Kind, Place, find_place, join, on_tpu_pod

__all__ = ["Group", "Kind", "blamed", "group", "initialize", "on_tpu_pod", "reported"]

log = logging.getLogger("jaxinfer")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_group: Group | None = None
_cluster: Place | None = None


def group() -> Group | None:
    """The processes that this one has joined."""
    return _group


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    heartbeat_timeout: float = 30.0,
) -> None:
    """Joins this process with those of the other hosts; before anything else uses JAX, in each of them.

    coordinator: HOST:PORT at which the others reach process 0. process_id: from 0 to num_processes - 1. Without them,
    what JAX finds on TPU pods, Slurm and Open MPI; on a machine by itself nothing happens. timeout: seconds in which
    all must come. heartbeat_timeout: after so many seconds without a sign of life from another process, this one ends
    with a line on stderr and exit code 3; at once where the other one's connection breaks.

    The environment variable JAXINFER_SECRET, the same on every host, keeps others out.
    Raises ValueError and OSError (TimeoutError) with one line.
    """
    global _group, _cluster
    for name, value in (("timeout", timeout), ("heartbeat_timeout", heartbeat_timeout)):
        if not isinstance(value, int | float) or not 0 < value <= 1e6:
            raise ValueError(f"{name} is {value!r}: it must be seconds, above 0")
    if _cluster is not None and (coordinator, num_processes, process_id) == (None, None, None):
        return
    cluster = find_place(coordinator, num_processes, process_id, timeout)
    if cluster is None or cluster == _cluster:
        return
    if _cluster is not None:
        raise ValueError(f"this is process {_cluster.rank} of {_cluster.size} of {_cluster.coordinator} already")
    import jax

    if jax.distributed.is_initialized():
        raise ValueError("jax.distributed is initialized already: call jaxinfer.distributed.initialize instead")
    links, port = join(cluster, timeout)
    _cluster = cluster
    joined = Group(cluster.rank, cluster.size, links, heartbeat_timeout)
    try:
        _start_jax(cluster, port, timeout, heartbeat_timeout)
    except Exception as error:
        joined.fail(f"process {cluster.rank}: {error}")
        raise
    _group = joined
    atexit.register(joined.end)
    log.info("process %d of %d, %d devices", cluster.rank, cluster.size, len(jax.devices()))


def blamed() -> contextlib.AbstractContextManager[None]:
    """See Group.blamed."""
    return contextlib.nullcontext() if _group is None else _group.blamed()


def reported(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Where this, which loads the model, raises in one process, the others end too, and say why."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        again = _group is not None and _group.taken
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if _group is not None and not again:
                _group.fail(f"process {_group.rank}: {error or type(error).__name__}")
            raise

    return run


def _start_jax(cluster: Place, port: int, timeout: float, heartbeat_timeout: float) -> None:
    import jax

    options: dict[str, Any] = {
        # It takes SIGTERM away from the process.
        "jax_enable_preemption_service": False,
        # The processes may end one after the other, and whether they are all there is ours to watch.
        "jax_enable_recoverability": True,
    }
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{port if cluster.rank == 0 else Relay((cluster.host, port)).port}",
            cluster.size,
            cluster.rank,
            cluster.local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"127.0.0.1:{port}" if cluster.local else f"[::]:{port}",
            initialization_timeout=int(timeout) + 1,
            heartbeat_timeout_seconds=int(10 * heartbeat_timeout) + 60,
        )
        count = jax.process_count()
    except RuntimeError as error:
        raise ValueError(f"JAX could not be started on {cluster.size} hosts: {error}") from None
    if count != cluster.size:
        raise ValueError(f"JAX has found {count} processes instead of {cluster.size}, on {jax.default_backend()}")
