"""What process 0 of several tells the others to do: what reaches its own devices, and so the same on all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxinfer.distributed import Group, Kind
from jaxinfer.engine.batch_builder import Call
from jaxinfer.engine.programs import Key


class Leader:
    """Sends calls to the other processes before they are made here. What has begun on one must begin on all, so both
    happen in a thread of their own, which Ctrl-C does not reach."""

    def __init__(self, group: Group):
        self._group = group
        self._thread = ThreadPoolExecutor(1, "jaxinfer-leader")
        self.wait()  # Ctrl-C while it starts could leave two of them

    def call(self, calls: Sequence[Call], call: Callable[[Sequence[Call]], list[Any]]) -> list[Any]:
        """The results of `call`, which calls the programs here."""
        return self._thread.submit(self._call, calls, call).result()

    def wait(self) -> None:
        """Until nothing is being called."""
        self._thread.submit(lambda: None).result()

    def warm_up(self, keys: Sequence[Key]) -> None:
        """The others compile these programs, while this process does."""
        self._say("warm up", *keys)

    def close(self) -> None:
        """The others free their devices' memory."""
        self._say("close")
        self._thread.shutdown()

    def _say(self, *what: Any) -> None:
        self._thread.submit(self._group.send, Kind.COMMAND, json.dumps(what).encode() + b"\n").result()

    def _call(self, calls: Sequence[Call], call: Callable[[Sequence[Call]], list[Any]]) -> list[Any]:
        self._group.send(Kind.COMMAND, pack(calls))
        with self._group.blamed():
            return finished(call(calls))


def pack(calls: Sequence[Call]) -> bytes:
    """Calls as bytes: their keys, as JSON, a newline, and one array after the other; `unpack` knows their shapes."""
    arrays = [np.asarray(leaf).tobytes() for _, inputs in calls for leaf in jax.tree.leaves(inputs)]
    return b"".join([json.dumps(["call", *(key for key, _ in calls)]).encode(), b"\n", *arrays])


def unpack(data: memoryview, abstract: Any) -> Any:
    """The arrays, as they are in `abstract`. Raises ValueError if these are not as many bytes."""
    leaves, tree = jax.tree.flatten(abstract)
    arrays, at = [], 0
    for leaf in leaves:
        count = int(np.prod(leaf.shape))
        if at + count * leaf.dtype.itemsize > len(data):
            break
        arrays.append(np.frombuffer(data, leaf.dtype, count, at).reshape(leaf.shape))
        at += count * leaf.dtype.itemsize
    if len(arrays) < len(leaves) or at < len(data):
        raise ValueError(f"process 0 sent {len(data)} bytes for a call, which are not what the same call takes here")
    return jax.tree.unflatten(tree, arrays)


def finished(result: Any) -> Any:
    """The result of a call. On CPU it is waited for: collectives of two calls at once may wait for each other forever,
    as they share threads."""
    return jax.block_until_ready(result) if jax.default_backend() == "cpu" else result
