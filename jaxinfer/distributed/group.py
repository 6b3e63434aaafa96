"""The processes that share a model, one on each host: what they say to each other, and that none goes on alone."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NoReturn

from jaxinfer.distributed.links import Link, decode, encode
from jaxinfer.distributed.rendezvous import Kind

log = logging.getLogger("jaxinfer")

LOST = 3  # exit code where another process was lost, or failed
GRACE = 1.0  # seconds in which what another process's end did here is not spoken of
ENDING = 10.0  # seconds to end in


class Group:
    """This process's part. Process 0 leads: it sends COMMANDs, and END when its program ends; the others follow.

    A thread sends a sign of life several times within `timeout` seconds. When another process is gone, says nothing
    for so long, or says that it FAILED, this thread ends its own process with one line: device calls that wait for
    a lost one would wait forever.
    """

    def __init__(self, rank: int, size: int, links: dict[int, Link], timeout: float):
        self.rank, self.size = rank, size
        self.taken = False  # whether there is, or was, a model
        self._links = dict(sorted(links.items()))  # they came in any order
        self._timeout = timeout
        self._received: dict[int, SimpleQueue[tuple[int, bytes]]] = {other: SimpleQueue() for other in links}
        self._failed = False  # here
        self._ending = False
        self._dying = threading.Lock()
        self._all_gone = threading.Event()
        for link in links.values():
            link.socket.settimeout(timeout)
            link.heard = time.monotonic()
        threading.Thread(target=self._watch, name="jaxinfer-watchdog", daemon=True).start()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, as JSON has it, in each of them."""
        if not self.leads:
            self._send(0, Kind.VALUE, encode(value))
            return decode(self._receive(0, Kind.VALUES))
        values = [value, *(decode(self._receive(other, Kind.VALUE)) for other in self._links)]
        self.send(Kind.VALUES, encode(values))
        return values

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises ValueError in every process if some of these are not the same everywhere."""
        facts = decode(encode(facts))
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"{name} is {other.get(name)!r} in process {rank} and {first.get(name)!r} in process 0: all "
                        "hosts need the same program, model and options"
                    )

    def send(self, kind: Kind, *payload: bytes) -> None:
        """From process 0 to all others."""
        for other in self._links:
            self._send(other, kind, *payload)

    def receive(self) -> bytes:
        """The next COMMAND of process 0. Raises SystemExit when its program has ended."""
        return self._receive(0, Kind.COMMAND)

    def fail(self, text: str) -> None:
        """Ends the other processes, which say this; this one is about to end by itself."""
        if not self._failed and not self._ending:
            self._failed = True
            self._tell(text)

    def end(self) -> None:
        """At the end of this program. Process 0's takes the others along, and JAX's coordinator, so it comes last."""
        self._ending = True
        if self.leads:
            for link in [] if self._failed else self._links.values():
                with contextlib.suppress(OSError):
                    link.send(Kind.END)
            self._all_gone.wait(ENDING)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Around what fails where another process is lost: the line that says so should come first."""
        try:
            yield
        except Exception:
            time.sleep(2 * GRACE)
            raise

    def _send(self, other: int, kind: Kind, *payload: bytes) -> None:
        try:
            self._links[other].send(kind, *payload)
        except OSError as error:
            if self._ending:
                raise SystemExit(0) from None
            self._lost(other, error)

    def _receive(self, other: int, kind: Kind) -> bytes:
        got, payload = self._received[other].get()
        if got == Kind.END:
            raise SystemExit(0)
        if got != kind:
            raise ValueError(
                f"process {other} sent {Kind(got).name} where {kind.name} was due: is its program the same?"
            )
        return payload

    def _watch(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for other, link in self._links.items():
                    selector.register(link.socket, selectors.EVENT_READ, other)
                pinged = 0.0
                while selector.get_map():
                    for key, _ in selector.select(self._timeout / 5):
                        if not self._read(key.data):
                            selector.unregister(key.fileobj)
                    now = time.monotonic()
                    if now - pinged > self._timeout / 5:
                        pinged = now
                        for other in self._links:
                            self._ping(other)
            self._all_gone.set()
        except Exception as error:
            self._die(f"the watchdog: {error!r}")

    def _read(self, other: int) -> bool:
        """Takes in what another process has sent; whether it is still there."""
        try:
            for kind, payload in self._links[other].read():
                self._take(other, kind, payload)
        except (OSError, ValueError) as error:
            if not self._over:
                self._lost(other, error)
            if not self.leads:
                _exit_later(LOST if self._failed else 0)  # JAX's end waits for process 0
            return False
        return True

    def _ping(self, other: int) -> None:
        link = self._links[other]
        try:
            link.send_if_idle(Kind.PING)
            if time.monotonic() - link.heard > self._timeout:
                raise TimeoutError(f"it said nothing for {self._timeout:g} s")
        except OSError as error:
            if not self._over:
                self._lost(other, error)

    def _take(self, other: int, kind: int, payload: bytes) -> None:
        if kind == Kind.FAILED:
            # What is wrong there may be wrong here too, and is being said. And process 0 is needed there to the end.
            self._wait_for_end(other) if self.leads else time.sleep(GRACE)
            if not self._over:
                text = payload.decode(errors="replace")
                if self.leads:
                    self._tell(text, but=other)
                self._die(text)
        elif kind == Kind.END:
            self._ending = True
            _exit_later(0)  # wherever this process is, it has nothing to do any more
        if kind != Kind.PING:
            self._received[other].put((kind, payload))

    @property
    def _over(self) -> bool:
        """Whether this process ends, or is about to."""
        return self._ending or self._failed

    def _wait_for_end(self, other: int) -> None:
        deadline = time.monotonic() + ENDING / 2  # its signs of life go on
        with contextlib.suppress(OSError, ValueError):
            while (left := deadline - time.monotonic()) > 0:
                self._links[other].socket.settimeout(left)
                self._links[other].read()

    def _tell(self, text: str, but: int | None = None) -> None:
        for other, link in self._links.items():
            if other != but:
                with contextlib.suppress(OSError):
                    link.send(Kind.FAILED, text.encode())

    def _lost(self, other: int, error: Exception) -> NoReturn:
        why = "the connection was closed" if isinstance(error, ConnectionError) else error
        text = (
            f"process {other} of {self.size}, at {self._links[other].address}, is lost: {why}. Without it the others "
            "can't go on; start the program again on every host"
        )
        if self.leads:
            self._tell(text, but=other)
        self._die(text)

    def _die(self, text: str) -> NoReturn:
        if self._dying.acquire(blocking=False):  # two threads may have found it out
            os.write(2, f"jaxinfer: error: process {self.rank} of {self.size}: {' '.join(text.split())}\n".encode())
            flush = threading.Thread(target=_flush, daemon=True)  # what was printed may wait, or its lock be taken
            flush.start()
            flush.join(GRACE)
            os._exit(LOST)
        while True:
            time.sleep(GRACE)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _exit_later(code: int) -> None:
    """If the process has not ended by itself by then."""
    timer = threading.Timer(ENDING / 2, os._exit, (code,))
    timer.daemon = True
    timer.start()
