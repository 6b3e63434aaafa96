"""Chat templates are rendered by processes of their own, which the kernel ends where a template asks for too much.

A thread can't be stopped, an alarm reaches the main thread alone, and a list of what may not be written has gaps. A
process costs a tenth of a second once, 20 MB, and some 0.1 ms a prompt; in return nobody else waits for Python's lock
meanwhile. It is a new program, not a fork (JAX has threads), and ends when this one does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxinfer.text import sandbox
from jaxinfer.text.sandbox import HEADER, receive
from jaxinfer.text.template_takes import Takes

PROCESSES = 4  # at most; more callers wait for one another

# Of a render, and what a byte of template and values adds.
SECONDS, SECONDS_A_BYTE = 3.0, 2.5e-7  # of processor time
MEMORY, MEMORY_A_BYTE = 2**28, 32
CHARACTERS, CHARACTERS_A_BYTE = 2**20, 16  # of the prompt: the tokenizer's time and memory go with them
WAIT = 300  # seconds for an answer, however little of a processor there is


class TemplateError(ValueError):
    """What a template raised.

    line: where it can't be read.
    """

    def __init__(self, message: str, line: int | None):
        super().__init__(message)
        self.line = line


class LimitError(ValueError):
    """What a template did that none may, as what comes after its name in a sentence."""


def render(source: str, values: Mapping[str, Any]) -> str:
    """What the template writes. values: plain JSON. Any thread may call.

    Raises TemplateError, LimitError, and OSError where no process can be started.
    """
    return str(_ask(source, values)["text"])


@lru_cache(maxsize=64)
def takes(source: str) -> Takes:
    """Which forms of messages the template is written for. Raises what `render` raises."""
    return Takes(**_ask(source, None)["takes"])


def _ask(source: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    request = json.dumps([source, values]).encode()
    characters = CHARACTERS + CHARACTERS_A_BYTE * len(request)
    seconds, memory = SECONDS + SECONDS_A_BYTE * len(request), MEMORY + MEMORY_A_BYTE * len(request)
    answer = _pool.ask(HEADER.pack(len(request), seconds, memory, characters) + request)
    if "text" in answer or "takes" in answer:
        return answer
    if "error" in answer:
        raise TemplateError(answer["error"], answer["line"])
    if answer["limit"] == "characters":
        raise LimitError(f"wrote more than {characters} characters, the limit here")
    if answer["limit"] == "bytes":
        raise LimitError(f"took more than {memory >> 20} MiB of memory, the limit here")
    if answer["limit"] == -signal.SIGPROF:
        raise LimitError(f"took more than {seconds:.1f} s of processor time, the limit here")
    raise LimitError(f"ended the process that rendered it (exit code {answer['limit']})")


class _Ended(Exception):
    def __init__(self, code: int):
        self.code = code


class _Process:
    """One that renders, and the connection to it."""

    def __init__(self) -> None:
        if not sys.executable:
            raise OSError("chat templates need a Python program to run them, and sys.executable is empty")
        self._socket, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", WAIT, 0))
        path = [*(entry for entry in sys.path if isinstance(entry, str)), str(Path(sandbox.__file__).parents[2])]
        command = [sys.executable, "-S", str(sandbox.__file__), *path]
        with theirs:  # Ctrl-C does not reach a session of its own
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, request: bytes) -> dict[str, Any]:
        """Raises _Ended if it has. Whatever is raised, this is of no more use."""
        try:
            self._socket.sendall(request)
            answer: dict[str, Any] = json.loads(receive(self._socket, int.from_bytes(receive(self._socket, 8), "big")))
            return answer
        except (OSError, ValueError):  # nothing, or half an answer, is no JSON
            raise _Ended(self.end(patience=1)) from None
        except BaseException:
            self.end()
            raise

    def end(self, patience: float = 0) -> int:
        """Its exit code, or, negative, the signal that ended it: this one, unless it ends by itself so soon."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience)
        self._process.kill()
        return self._process.wait()

    def disown(self) -> None:
        """In a process that was forked from the one that it belongs to."""
        self._socket.close()
        self._process.returncode = 0


class _Pool:
    """The processes that wait for a template."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._idle: list[_Process] = []
        self._slots = threading.BoundedSemaphore(PROCESSES)

    def ask(self, request: bytes) -> dict[str, Any]:
        with self._slots:
            for process in iter(self._take, None):
                try:
                    return self._kept(process, process.ask(request))
                except _Ended as ended:
                    if ended.code == -signal.SIGPROF:
                        return {"limit": ended.code}
                    # else somebody may have killed it while it was idle
            process = _Process()
            try:
                return self._kept(process, process.ask(request))
            except _Ended as ended:
                return {"limit": ended.code}

    def _take(self) -> _Process | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _kept(self, process: _Process, answer: dict[str, Any]) -> dict[str, Any]:
        if "limit" in answer:
            process.end()  # and with it goes all that the template took
        else:
            self._idle.append(process)
        return answer

    def end(self) -> None:
        for process in iter(self._take, None):
            process.end()

    def disown(self) -> None:
        for process in self._idle:
            process.disown()
        self._begin()


_pool = _Pool()
atexit.register(_pool.end)
os.register_at_fork(after_in_child=_pool.disown)
