"""Which adapters there are, by name, and which of them are on the devices: plain Python, tested without one.

A sequence that runs holds its adapter's slot. One that nobody holds stays where it is until its slot is needed, those
first that were used longest ago.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxinfer.checkpoint.factors import LoadedAdapter
from jaxinfer.engine.request import Request
from jaxinfer.errors import RequestError


class AskedAdapter(NamedTuple):
    """An adapter as somebody asks for it.

    name: one that is loaded, or that it is to have then.
    path: of a folder or a hub id, from which it comes; None: it must be loaded.
    """

    name: str
    path: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, asked: Any) -> AskedAdapter:
        """Of a name, or of what has the fields of vLLM's LoRARequest. Raises RequestError."""
        if isinstance(asked, str):
            return cls(asked)
        name = getattr(asked, "lora_name", None)
        paths = (getattr(asked, field, None) for field in ("lora_path", "path", "lora_local_path"))
        path = next((path for path in paths if path), None)
        if not isinstance(name, str) or not name or not isinstance(path, str | os.PathLike):
            raise RequestError(f"adapter is {asked!r:.100}: it must be the name of one that is loaded", "adapter")
        if getattr(asked, "load_inplace", False):
            raise RequestError(f"load_inplace of {name!r}: LLM.load_adapter(name, folder) reads one again", "adapter")
        return cls(name, path)


class AdapterSlots:
    """Slots, of all shards of rows together.

    loads: how often one was put into a slot.
    """

    def __init__(self, count: int):
        self.count = count
        self.loads = 0
        self.reset()

    def reset(self) -> None:
        """Nothing is on the devices, and nobody runs."""
        self._adapters: dict[int, LoadedAdapter] = {}  # by slot: those used longest ago first
        self._users = [0] * self.count
        self._coming: dict[int, LoadedAdapter] = {}

    def hold(self, request: Request) -> bool:
        """Gives a request that is about to run its adapter's slot; False if all are held by others' adapters."""
        assert request.adapter is not None
        slot = next((slot for slot, own in self._adapters.items() if own.digest == request.adapter.digest), None)
        if slot is None:
            blank = (slot for slot in range(self.count) if slot not in self._adapters)
            unused = (slot for slot in self._adapters if not self._users[slot])
            slot = next(blank, next(unused, None))
            if slot is None:
                return False
            self._coming[slot] = request.adapter
        self._adapters.pop(slot, None)
        self._adapters[slot] = request.adapter  # at the end: it is the one that was used last
        self._users[slot] += 1
        request.adapter_slot = slot
        return True

    def release(self, request: Request) -> None:
        """A request runs no longer."""
        if request.adapter_slot >= 0:
            self._users[request.adapter_slot] -= 1
            request.adapter_slot = -1

    def forget(self, adapter: LoadedAdapter) -> None:
        """One that will not be asked for again; those that run keep it."""
        for slot in [slot for slot, own in self._adapters.items() if own is adapter and not self._users[slot]]:
            del self._adapters[slot]

    def coming(self) -> Iterator[tuple[int, LoadedAdapter]]:
        """What is to be put into slots before the next call."""
        while self._coming:
            self.loads += 1
            yield self._coming.popitem()
