"""JAX's connection to its coordinator, led through a local port.

JAX's client ends its process from C++, with a stack trace, as soon as the connection to the coordinator breaks, which
is when process 0 dies. Led through here it does not see that: what ends the process is our own watchdog, with one line.
"""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Listens on `port` of this machine and passes everything on to an address, and back."""

    def __init__(self, address: tuple[str, int]):
        self._address = address
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._open: list[socket.socket] = []  # what nobody refers to is closed
        threading.Thread(target=self._serve, name="jaxinfer-relay", daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._lead, args=(near,), daemon=True).start()

    def _lead(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._address)  # may take minutes to fail
        except OSError:
            near.close()
            return
        self._open += [near, far]
        threading.Thread(target=_pass_on, args=(far, near, False), daemon=True).start()
        _pass_on(near, far, True)


def _pass_on(source: socket.socket, sink: socket.socket, passes_end: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if passes_end:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
