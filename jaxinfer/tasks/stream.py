"""Texts of many callers at once, together in calls of the device: each has a future of its own."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.engine.pooling.engine import PoolingEngine
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.engine.pooling.reader import Reader
from jaxinfer.errors import EngineClosed, QueueFullError
from jaxinfer.tasks.pooling import PoolingTask, TextOptions

CLOSED = "the engine was closed: load it again with AsyncEngine(...)"


@dataclass(frozen=True)
class Ask:
    """What is asked of texts.

    task: what makes outputs.
    text_options, options: see PoolingTask.
    """

    task: PoolingTask[Any]
    text_options: TextOptions
    options: Any


@dataclass(frozen=True)
class Asked:
    """A text, and who waits for its output."""

    text: Any
    ask: Ask
    future: Future[Any] = field(default_factory=Future)


class Stream:
    """Of an engine, in a thread that is always there. Tasks are of texts, not of tokens.

    max_queued: most texts that may wait to be read.
    """

    def __init__(self, engine: PoolingEngine, max_queued: int):
        self._engine, self._max_queued = engine, max_queued
        self._queue: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._running: dict[int, Asked] = {}  # by their places
        self._turn = 0  # of readers, one after each error of the device
        self._lock = threading.Lock()  # of what follows: nothing is queued after the end
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="jaxinfer-stream", daemon=True)
        self._thread.start()

    def submit(self, text: Any, ask: Ask) -> Future[Any]:
        """Its output comes, or ValueError for what can't be served, or what went wrong. Cancelling it in time saves the
        work. Raises EngineClosed and QueueFullError."""
        asked = Asked(text, ask)
        with self._lock:
            if self.closed:
                raise EngineClosed(CLOSED)
            waiting = self._queue.qsize()
            if waiting >= self._max_queued:
                raise QueueFullError(f"{waiting} texts are waiting, and max_queued is {self._max_queued}; try later")
            self._queue.put(asked)
        return asked.future

    def close(self) -> None:
        """What has no output yet ends with EngineClosed, and the memory is freed."""
        with self._lock:
            self.closed = True
        self._queue.put(None)
        self._engine.close()
        self._thread.join()
        while not self._queue.empty():
            if (asked := self._queue.get()) is not None:
                asked.future.set_exception(EngineClosed(CLOSED))

    def _run(self) -> None:
        while not self.closed:
            self._turn += 1
            error: BaseException | None = EngineClosed(CLOSED)
            try:
                reader = Reader(self._read(self._turn), self._row, self._engine.portion)
                for rows, values in self._engine.run(reader):
                    for i, row in enumerate(rows):
                        self._answer(row, values[i : i + 1])
            except BaseException as caught:
                error = EngineClosed(CLOSED) if self.closed else caught
            running, self._running = self._running, {}
            for asked in running.values():
                asked.future.set_exception(error)

    def _read(self, turn: int) -> Iterator[Asked]:
        """What comes, until the end. A reader that is not the last one any more gives back what it got."""
        while (asked := self._queue.get()) is not None:
            if self._turn != turn:
                self._queue.put(asked)
                return
            yield asked

    def _row(self, index: int, asked: Asked) -> Row | None:
        if not asked.future.set_running_or_notify_cancel():
            return None
        try:
            row = asked.ask.task.row(index, asked.text, asked.ask.text_options)
        except ValueError as error:
            asked.future.set_exception(error)
            return None
        self._running[index] = asked
        return row

    def _answer(self, row: Row, values: Any) -> None:
        asked = self._running.pop(row.place)
        try:
            (output,) = asked.ask.task.outputs([row], values, asked.ask.options)
        except Exception as error:
            asked.future.set_exception(error)
        else:
            asked.future.set_result(dataclasses.replace(output, index=0))
