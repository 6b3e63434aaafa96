"""Texts of many callers at once, together in calls of the device: each has a future of its own."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import queue
import threading
import weakref
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
    """Of an engine, in a thread that is there until it is stopped. Tasks are of texts, not of tokens.

    max_queued: most texts that may wait to be read.
    """

    def __init__(self, engine: PoolingEngine, max_queued: int):
        self._engine, self._max_queued = engine, max_queued
        self._queue: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()  # None: something has changed
        self._turn = 0  # of readers, one after each error of the device
        self._lock = threading.Lock()  # of what follows: nothing is queued after the end
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="jaxinfer-stream", daemon=True)
        self._thread.start()
        _streams.add(self)

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

    def stop(self) -> None:
        """What has no output yet ends with EngineClosed, some time later."""
        with self._lock:
            self.closed = True
        self._queue.put(None)

    def close(self) -> None:
        """The same now, and the memory is freed."""
        self.stop()
        self._engine.close()
        self._thread.join()

    def _run(self) -> None:
        while not self.closed:
            running: dict[int, Asked] = {}  # by their places
            reader = Reader(self._read(self._turn), functools.partial(self._row, running), self._engine.portion)
            error: BaseException | None = None
            try:
                for rows, values in self._engine.run(reader):
                    for i, row in enumerate(rows):
                        self._answer(running.pop(row.place), row, values[i : i + 1])
            except BaseException as caught:
                error = caught
            self._turn += 1
            self._queue.put(None)
            reader.join()  # or what it has in its hands would be lost
            for asked in running.values():
                asked.future.set_exception(EngineClosed(CLOSED) if self.closed or error is None else error)
        while not self._queue.empty():
            left = self._queue.get()
            if left is not None and left.future.set_running_or_notify_cancel():
                left.future.set_exception(EngineClosed(CLOSED))

    def _read(self, turn: int) -> Iterator[Asked]:
        """What comes, until the end. A reader that is not the last one any more gives back what it got."""
        while True:
            asked = self._queue.get()
            if self.closed or self._turn != turn:
                if asked is not None:
                    self._queue.put(asked)
                return
            if asked is not None:
                yield asked

    def _row(self, running: dict[int, Asked], index: int, asked: Asked) -> Row | None:
        if not asked.future.set_running_or_notify_cancel():
            return None
        try:
            row = asked.ask.task.row(index, asked.text, asked.ask.text_options)
        except ValueError as error:
            asked.future.set_exception(error)
            return None
        running[index] = asked
        return row

    def _answer(self, asked: Asked, row: Row, values: Any) -> None:
        try:
            (output,) = asked.ask.task.outputs([row], values, asked.ask.options)
        except Exception as error:
            asked.future.set_exception(error)
        else:
            asked.future.set_result(dataclasses.replace(output, index=0))


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register  # a thread that is in JAX while that is taken down would crash
def _close_all() -> None:
    for stream in list(_streams):
        stream.close()
