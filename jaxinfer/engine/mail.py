"""From the engine's thread to callers in an event loop, which wakes up once a call of the device for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from jaxinfer.engine.outputs import RequestOutput

Item = RequestOutput | BaseException


class Box:
    """What has come for one caller."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """In the engine's thread."""
        self._items.append(item)

    def wake(self) -> None:
        """In the event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Item]:
        """All that there is, once there is something."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return [self._items.popleft() for _ in range(len(self._items))]


class Mail:
    """The boxes of one event loop that have got something since it was last told."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._filled: list[Callable[[], None]] = []

    def put(self, box: Box, item: Item) -> None:
        """In the engine's thread."""
        box.put(item)
        self._filled.append(box.wake)

    def send(self) -> None:
        """In the engine's thread, after a step."""
        filled, self._filled = self._filled, []
        if filled and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake, filled)


def _wake(filled: list[Callable[[], None]]) -> None:
    for wake in filled:
        wake()
