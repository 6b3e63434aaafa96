"""Frames over TCP: a kind and a payload, both ways, with a time-out for all that is sent."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from typing import Any

HEADER = struct.Struct(">BI")  # kind, bytes of the payload
MOST = 2**30  # bytes of a payload: more is not ours


class Link:
    """One end of a connection. Any thread may send; one reads. Raises OSError once the other end is gone, or takes in
    nothing for `timeout` seconds, and ValueError for what is no frame."""

    def __init__(self, connection: socket.socket, timeout: float):
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.address: str = connection.getpeername()[0].removeprefix("::ffff:")
        self.heard = time.monotonic()
        self._received = bytearray()
        self._sending = threading.Lock()

    def send(self, kind: int, *payload: bytes) -> None:
        """Sends one frame, whole."""
        size = sum(map(len, payload))
        if size > MOST:
            raise ValueError(f"{size} bytes for another host: at most {MOST} can be sent at once")
        with self._sending:
            self.socket.sendall(b"".join((HEADER.pack(kind, size), *payload)))

    def send_if_idle(self, kind: int) -> None:
        """Sends a frame without payload, unless another is being sent."""
        if self._sending.acquire(blocking=False):
            try:
                self.socket.sendall(HEADER.pack(kind, 0))
            finally:
                self._sending.release()

    def read_one(self, most: int, deadline: float) -> tuple[int, bytes]:
        """The next frame, whole before `deadline` (of time.monotonic), and nothing of what follows it: for as long as
        `read` was not called."""
        kind, size = HEADER.unpack(self._exactly(HEADER.size, deadline))
        if size > most:
            raise ValueError(f"a frame of {size} bytes")
        return kind, self._exactly(size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        timeout, data = self.socket.gettimeout(), b""
        try:
            while len(data) < size:
                self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                if not (more := self.socket.recv(size - len(data))):
                    raise ConnectionResetError("the connection was closed")
                data += more
        finally:
            self.socket.settimeout(timeout)
        return data

    def read(self, most: int = MOST) -> list[tuple[int, bytes]]:
        """The frames, of at most so many bytes, that are complete once something has come, which it waits for."""
        data = self.socket.recv(1 << 20)
        if not data:
            raise ConnectionResetError("the connection was closed")
        self.heard = time.monotonic()
        self._received += data
        frames = []
        start = 0
        while len(self._received) - start >= HEADER.size:
            kind, size = HEADER.unpack_from(self._received, start)
            if size > most:
                raise ValueError(f"a frame of {size} bytes")
            end = start + HEADER.size + size
            if len(self._received) < end:
                break
            frames.append((kind, bytes(self._received[start + HEADER.size : end])))
            start = end
        del self._received[:start]
        return frames

    def close(self) -> None:
        self.socket.close()


def encode(value: Any) -> bytes:
    """As JSON; what that does not have, as text."""
    return json.dumps(value, default=str).encode()


def decode(data: bytes) -> Any:
    """What `encode` was given. Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
