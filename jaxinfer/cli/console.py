"""What a command says besides its result, all of it on stderr: progress, log messages, errors."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.live import Live

PATIENCE = 10.0  # seconds


def say_error(error: object) -> None:
    """One line on stderr, whatever the error's text is."""
    print(f"jaxinfer: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


class Progress:
    """A line that says what is being waited for. Where stderr is not a terminal there is nothing, or (`plain`) a
    line of its own every PATIENCE seconds, as long as there is something new to say.

    Call it with a few words to show them. It must be hidden before anything goes to stdout, which may be the same
    terminal; as a context manager it is hidden at the end, whatever happens.
    """

    def __init__(self, quiet: bool = False, plain: bool = False) -> None:
        self.muted = False  # while a line of text is being written: the progress line would wipe it out
        self._live: Live | None = None
        self._in_terminal = sys.stderr.isatty()
        self._quiet = quiet or not (self._in_terminal or plain)
        self._what = ""
        self._hidden = threading.Event()
        self._watch: threading.Thread | None = None

    def __call__(self, what: str) -> None:
        if self._quiet or self.muted:
            return
        if not self._in_terminal:
            self._what = what
            if self._watch is None:
                self._hidden = threading.Event()
                self._watch = threading.Thread(target=self._say, args=(self._hidden,), daemon=True)
                self._watch.start()
            return
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        if self._live is not None:
            self._live.update(Spinner("dots", what))
            return
        # Left to itself rich would send what is printed to stdout meanwhile to stderr.
        self._live = Live(Spinner("dots", what), console=Console(stderr=True), transient=True, redirect_stdout=False)
        self._live.start(refresh=True)  # or the first words are seen only if what comes next takes its time

    def hide(self) -> None:
        """Takes the line away; the next call shows it again."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._hidden.set()
        self._watch = None

    def _say(self, hidden: threading.Event) -> None:
        text = ""
        while not hidden.wait(PATIENCE):
            if self._what != text:
                text = self._what
                print(f"jaxinfer: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()


def print_pieces(pieces: Iterable[str], progress: Progress) -> None:
    """Prints text as it comes. However it ends, Ctrl-C included, what came is printed, on lines of its own.

    The first piece waits for the second: between them the program that decodes may have to be compiled.
    """
    waiting, last = "", ""
    try:
        for i, piece in enumerate(pieces):
            waiting += piece
            if i == 0:
                continue
            progress.hide()
            progress.muted = True
            sys.stdout.write(waiting)
            sys.stdout.flush()
            last, waiting = waiting, ""
    finally:
        progress.hide()
        progress.muted = False
        print(waiting, end="" if (waiting or last).endswith("\n") else "\n", flush=True)


class LogHandler(logging.Handler):
    """Log records as lines like those of errors. Looks stderr up each time: the progress line replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"jaxinfer: {record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


def title(text: str, width: int = 70) -> str:
    """A prompt on one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
