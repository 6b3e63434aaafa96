"""Command lines, in this process (`cli`) and in one of their own, at a terminal (`Terminal`)."""

import io
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import pytest

from jaxinfer.cli import main

SECONDS = 120  # far more than anything takes, even on a busy machine
PATIENCE = 1e6  # nothing takes so long that a line on stderr says so


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a refused command line."""
        assert (self.code, self.out) == (2, "")
        prefix = "jaxinfer: error: "
        assert self.err.startswith(prefix)
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err.removeprefix(prefix).strip()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs main() here. Input is what is piped in; None is a terminal that nobody types at."""
    log = logging.getLogger("jaxinfer")
    before = log.handlers, log.level, log.propagate

    def run(*arguments: object, stdin: bytes | None = b"") -> Result:
        stream = io.TextIOWrapper(io.BytesIO(stdin or b""))
        stream.isatty = lambda: stdin is None  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr("jaxinfer.cli.console.PATIENCE", PATIENCE)
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    yield run
    log.handlers, log.level, log.propagate = before


class Terminal:
    """`jaxinfer ARGUMENTS` at a terminal of its own, with all its output in `seen`."""

    def __init__(self, *arguments: object):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "jaxinfer", *map(str, arguments)]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str | None, after: int = 0) -> str:
        """Reads until `text` is among what was seen from `after` on (None: until the process is done)."""
        end = time.monotonic() + SECONDS
        while text is None or text not in self.seen[after:]:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # how Linux says that nobody has the other end open any more
                    assert text is None, self.seen
                    break
        return self.seen[after:]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        self.wait_for(None)
        return self.process.wait(SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
