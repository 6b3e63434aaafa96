"""Which adapters are on the devices: plain Python, tested without one.

A sequence that runs holds its adapter's slot. One that nobody holds stays where it is until its slot is needed, those
first that were used longest ago.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from jaxinfer.checkpoint.factors import LoadedAdapter
from jaxinfer.engine.request import Request


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
        self._adapters: dict[int, bytes] = {}  # their digests by slot: those used longest ago first
        self._users = [0] * self.count
        self._coming: dict[int, LoadedAdapter] = {}
        self._leaving: deque[bytes] = deque()  # of other threads

    def hold(self, request: Request) -> bool:
        """Gives a request that is about to run its adapter's slot; False if all are held by others' adapters."""
        assert request.adapter is not None
        slot = self._place(request.adapter)
        if slot is None:
            return False
        before = self._adapters.pop(slot, None)
        if before != request.adapter.digest:
            self._coming[slot] = request.adapter
        self._adapters[slot] = request.adapter.digest  # at the end: it is the one that was used last
        self._users[slot] += 1
        request.adapter_slot = slot
        return True

    def has_room(self, request: Request) -> bool:
        """Whether `hold` would find a slot."""
        return request.adapter is None or self._place(request.adapter) is not None

    def _place(self, adapter: LoadedAdapter) -> int | None:
        """Where one is, or may be put."""
        self._leave()
        own = (slot for slot, other in self._adapters.items() if other == adapter.digest)
        blank = (slot for slot in range(self.count) if slot not in self._adapters)
        unused = (slot for slot in self._adapters if not self._users[slot])
        return next(itertools.chain(own, blank, unused), None)

    def release(self, request: Request) -> None:
        """A request runs no longer."""
        if request.adapter_slot >= 0:
            self._users[request.adapter_slot] -= 1
            request.adapter_slot = -1

    def forget(self, digest: bytes) -> None:
        """One that will not be asked for again; those that run keep it. Any thread may call it."""
        self._leaving.append(digest)

    def _leave(self) -> None:
        while self._leaving:
            digest = self._leaving.popleft()
            for slot in [slot for slot, own in self._adapters.items() if own == digest and not self._users[slot]]:
                del self._adapters[slot]

    def coming(self) -> Iterator[tuple[int, LoadedAdapter]]:
        """What is to be put into slots before the next call."""
        self._leave()
        while self._coming:
            self.loads += 1
            yield self._coming.popitem()
