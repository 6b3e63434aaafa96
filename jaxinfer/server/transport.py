"""Writes to many connections, together."""

from __future__ import annotations

import asyncio
from typing import Any

MOST = 64  # connections that have something to be written: it goes out then, turn or no turn


class Outbox:
    """What has been written in this turn of the event loop. A call of the device gives each stream a frame: written one
    by one between the making of the others, each would wake the client up, on a CPU that computes."""

    def __init__(self) -> None:
        self._written: list[CorkedTransport] = []

    def put(self, transport: CorkedTransport) -> None:
        """Has something to send. It is sent when all that is to be done now is done."""
        if not self._written:
            asyncio.get_running_loop().call_soon(self._send)
        self._written.append(transport)
        if len(self._written) == MOST:
            self._send()

    def _send(self) -> None:
        written, self._written = self._written, []
        for transport in written:
            transport.send()


class CorkedTransport:
    """A transport whose writes wait in an outbox, and leave as one."""

    def __init__(self, transport: asyncio.Transport, outbox: Outbox):
        self._transport, self._outbox = transport, outbox
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Later, as soon as the event loop has a moment."""
        self._pieces.append(data)
        if len(self._pieces) == 1:
            self._outbox.put(self)

    def send(self) -> None:
        """What has been written."""
        pieces, self._pieces = self._pieces, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        """After all that has been written."""
        self.send()
        self._transport.close()
