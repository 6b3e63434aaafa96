"""How far a job is, on stderr: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any, Self

from jaxinfer.batch.writer import Writer

SHOWN, SAID = 0.1, 10.0  # seconds between two states of the bar, and between two lines


class Progress:
    """Shows rows, tokens a second, time left and errors; nothing unless `shown`."""

    def __init__(self, shown: bool = False):
        self._shown = shown
        self._bar: Any = None
        self._next = float("inf")
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                unit="row",
                leave=False,
                desc="reading the input",
                file=sys.stderr,
                ncols=shutil.get_terminal_size().columns,
                nrows=20,  # tqdm shows nothing at a terminal that doesn't tell its size
            )

    def say(self, what: str) -> None:
        """What is being waited for."""
        if self._bar is not None:
            self._bar.set_description_str(what)

    def begin(self, writer: Writer, total: int | None) -> None:
        """The first of `total` rows (None: nobody knows) that are not done yet comes now."""
        self._total, self._first, self._first_tokens = total, writer.rows, writer.tokens
        self._begun = time.monotonic()
        if self._bar is not None:
            self._bar.reset(total)
            self._bar.initial = self._bar.n = writer.rows
            self._next = self._begun
        elif self._shown:
            self._next = self._begun + SAID
            if writer.rows:
                self._line(f"{self._rows(writer)} are done: going on")

    def update(self, writer: Writer) -> None:
        """Rows are done."""
        now = time.monotonic()
        if now < self._next:
            return
        seconds = max(now - self._begun, 1e-9)
        state = f"{(writer.tokens - self._first_tokens) / seconds:.0f} tokens/s, {writer.errors} errors"
        if self._bar is not None:
            self._next = now + SHOWN
            self._bar.set_description_str("batch", refresh=False)
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(writer.rows - self._bar.n)
            return
        self._next = now + SAID
        left = ""
        if self._total is not None and writer.rows > self._first:
            minutes = (self._total - writer.rows) * seconds / (writer.rows - self._first) / 60
            left = f", {minutes:.1f} minutes left"
        self._line(f"{self._rows(writer)}, {state}{left}")

    def _rows(self, writer: Writer) -> str:
        return f"{writer.rows:,} rows" if self._total is None else f"{writer.rows:,} of {self._total:,} rows"

    def _line(self, text: str) -> None:
        print(f"jaxinfer: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
