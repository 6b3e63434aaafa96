"""Texts to tokens in a thread of its own, while the device computes those that came before."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxinfer.engine.pooling.packing import Row

GATHER_SECONDS = 0.005  # what comes one by one is waited for so long, for a call of several


class Reader:
    """Rows of what an iterable gives, in portions that are sorted by themselves.

    make: the row of one and of its place; None: there is nothing to compute. What it raises ends the reading, as an
        error of the iterable itself does.
    portion: tokens of one, about; two are read ahead at most, so that memory does not depend on how many there are.
    """

    def __init__(self, asked: Iterable[Any], make: Callable[[int, Any], Row | None], portion: int):
        self._asked, self._make, self._portion = asked, make, portion
        self._rows: list[Row] = []
        self._tokens = 0
        self._error: BaseException | None = None
        self._reading, self._left = True, False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to read."""
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._read,), name="jaxinfer-reader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nobody wants the rest."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until nothing is read any more."""
        if self._thread is not None:
            self._thread.join()

    def take(self, wait: bool) -> list[Row] | None:
        """The next portion: all that was read, where nothing else is to do; None at the end, and [] if it is not there
        and nobody `wait`s."""
        with self._changed:
            if not wait and self._reading and self._tokens < self._portion:
                return []
            self._changed.wait_for(lambda: self._rows or not self._reading)
            seconds = None if isinstance(self._asked, Sequence) else GATHER_SECONDS
            self._changed.wait_for(lambda: self._tokens >= self._portion or not self._reading, seconds)
            rows, self._rows, self._tokens = self._rows, [], 0
            self._changed.notify_all()
        return rows or None

    def end(self) -> None:
        """Raises what ended the reading, if it was an error."""
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        try:
            for index, entry in enumerate(self._asked):
                row = self._make(index, entry)
                with self._changed:
                    if row is not None:
                        self._rows.append(row)
                        self._tokens += len(row.ids)
                    if self._tokens >= self._portion or len(self._rows) == 1:
                        self._changed.notify_all()
                    self._changed.wait_for(lambda: self._tokens < 2 * self._portion or self._left)
                    if self._left:
                        break
        except BaseException as error:
            self._error = error
        with self._changed:
            self._reading = False
            self._changed.notify_all()
