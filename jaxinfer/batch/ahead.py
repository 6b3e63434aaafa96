"""Reading ahead, in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from enum import Enum
from types import TracebackType
from typing import Generic, Self, TypeVar

from jaxinfer.batch.row import Record

ITEMS, SIZE = 1024, 2**24  # that are read ahead: whichever is reached first
SECONDS = 1.0  # that the thread may take to end; it may wait for a pipe for ever

T = TypeVar("T")
R = TypeVar("R")


class Later(Enum):
    """In place of an item that is not there yet."""

    LATER = "later"


LATER = Later.LATER


class Ahead(Generic[R]):
    """The records that a generator yields, and what it returns (`result`, at the end).

    Iterating never waits: LATER comes where there is nothing yet. What the generator raises comes after all that it
    yielded before.
    """

    def __init__(self, records: Generator[Record, None, R]):
        self._records = records
        self._read: deque[Record] = deque()
        self._size = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._result: R | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="jaxinfer-read", daemon=True)
        self._thread.start()

    @property
    def result(self) -> R | None:
        return self._result

    def wait(self, seconds: float) -> bool:
        """Waits so long for the next record, or the end; returns whether it is there."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._read) or self._ended, seconds)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Record | Later:
        with self._changed:
            if self._read:
                record = self._read.popleft()
                self._size -= _size(record)
                self._changed.notify_all()
                return record
            if not self._ended:
                return LATER
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _run(self) -> None:
        try:
            while True:
                record = next(self._records)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or (len(self._read) < ITEMS and self._size < SIZE))
                    if self._closed:
                        return
                    self._read.append(record)
                    self._size += _size(record)
                    self._changed.notify_all()
        except StopIteration as end:
            self._result = end.value
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(SECONDS)


def _size(record: Record) -> int:
    """Roughly, bytes."""
    value = record.value
    texts = value.values() if isinstance(value, dict) else [value]
    return sum(len(text) for text in texts if isinstance(text, str | bytes))
