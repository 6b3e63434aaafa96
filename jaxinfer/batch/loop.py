"""The loop of a job: records in, results to the writer, and the device busy in between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxinfer.batch.ahead import LATER, SECONDS, Ahead, Later
from jaxinfer.batch.order import ROWS, ordered
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.progress import Progress
from jaxinfer.batch.readers import Records
from jaxinfer.batch.row import Record, Row
from jaxinfer.batch.tables import column_kinds
from jaxinfer.batch.work import Work, Worker
from jaxinfer.batch.writer import Result, Writer


class Loop:
    """Runs the rows of a shard, from the first part on that is not written.

    worker: runs them, and says what is written.

    Rows run in the order of `ordered`. Results are held until their part is complete, so nothing new is begun while an
    early row keeps too many of them waiting.
    """

    def __init__(
        self,
        worker: Worker,
        parser: Parser,
        writer: Writer,
        progress: Progress,
        *,
        stop: Callable[[], bool],
    ):
        self.worker, self.results = worker, worker.results
        self.parser, self.writer, self.progress, self.stop = parser, writer, progress, stop
        self.max_held = 16 * ROWS + 2 * writer.rows_per_part
        self._first = writer.manifest.next_part
        self._last: int | None = None  # the part after which to stop
        self._held = 0  # rows that were read and are not written
        self._more = True
        self._unreadable: Exception | None = None  # why the input can't be read on
        self._lock = threading.Lock()  # of all that is put: broken rows are where they are read
        self._left = False  # nothing is put any more

    def run(self, stream: Records) -> None:
        """Runs them all, or until `stop` says so and the part that is next then is written.

        stream: `records` from the first part that is not written, or from the beginning if it isn't known yet what
        columns a table has. It is read in a thread of its own: what there is runs while more is waited for. Where it
        raises, what was read before is run first.
        """
        with Ahead(stream) as ahead, self._putting():
            works = ordered(self._works(ahead), ahead.wait)
            while self._more:
                for work, result in self.worker.run(self._wanted(works, ahead)):
                    self._put(work.row, result)
                    if self._stopping() and self.writer.manifest.next_part > (self._last or 0):
                        return  # what else is running is broken off
        if self._unreadable is not None:
            raise self._unreadable

    @contextlib.contextmanager
    def _putting(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._left = True

    def _wanted(self, works: Iterator[Work | Later | None], ahead: Ahead[int]) -> Iterator[Work]:
        """What is to be run now: until too much is held, or there is no more. It is asked in another thread than that
        which takes the results, and waits for rows that are not there yet."""
        while self._held <= self.max_held and not self._left:
            try:
                work = next(works)
            except StopIteration:
                self._more = False
                return
            if work is LATER:
                if self._stopping() and not self._held:
                    self._more = False
                    return
                ahead.wait(SECONDS)
            elif work is not None and (not self._stopping() or self.writer.part(work.row.index) == self._last):
                yield work

    def _works(self, ahead: Ahead[int]) -> Iterator[Work | Later | None]:
        """The rows that are to be run. Those that can't be are put as errors, and None."""
        manifest = self.writer.manifest
        sample: list[Row] | None = None
        if self.results.table and manifest.columns is None:
            sample = []
        for record in self._readable(ahead):
            if record is LATER:
                yield LATER
                continue
            part = self.writer.part(record.index)
            mine = part >= self._first and part % manifest.shards == manifest.shard
            if not mine and sample is None:
                continue
            if self._stopping() and part > (self._last or 0):
                return
            row = self.parser.parse(record)
            if sample is not None:
                sample.append(row)
                if len(sample) == self.writer.rows_per_part:
                    manifest.columns, sample = self._columns(sample), None
            if not mine:
                continue
            with self._lock:
                self._held += 1
            work = self.worker.prepare(row, row.index)
            if isinstance(work, Work):
                yield work
            else:
                self._put(row, self.results.failed(row, work))
                yield None
        if self._unreadable is not None:
            return
        if sample is not None:
            manifest.columns = self._columns(sample)
        with self._lock:
            if not self._left:
                self.writer.end(ahead.result or 0)

    def _columns(self, sample: list[Row]) -> dict[str, Any]:
        """Those of a table: the input's, and the results."""
        kinds = self.results.kinds(self.results.logprobs(sample))
        if self.writer.schema is not None:
            return {
                c: "as read" for c in self.writer.schema.names if c not in kinds and c != self.results.others
            } | kinds
        columns = column_kinds((row.columns for row in sample), kinds)
        return {c: kind for c, kind in columns.items() if c != self.results.others}

    def _readable(self, ahead: Ahead[int]) -> Iterator[Record | Later]:
        try:
            yield from ahead
        except (ValueError, OSError) as error:  # of the input, which the reader has put into words
            self._unreadable = error

    def _stopping(self) -> bool:
        if self._last is None and self.stop():
            self._last = self.writer.manifest.next_part
        return self._last is not None

    def _put(self, row: Row, result: Result) -> None:
        with self._lock:
            if self._left:
                return
            written = self.writer.manifest.rows
            self.writer.put(row.index, result)
            self._held -= self.writer.manifest.rows - written
            self.progress.update(self.writer)
