"""The loop of a job: records in, results to the writer, and the device busy in between."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from jaxinfer.batch.order import ROWS, ordered
from jaxinfer.batch.parquet import column_kinds
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.progress import Progress
from jaxinfer.batch.results import Results
from jaxinfer.batch.row import Record, Row
from jaxinfer.batch.work import Work, Worker
from jaxinfer.batch.writer import Result, Writer
from jaxinfer.llm import LLM


class Loop:
    """Runs the rows of a shard, from the first part on that is not written.

    Rows run in the order of `ordered`. Results are held until their part is complete, so nothing new is begun while an
    early row keeps too many of them waiting.
    """

    def __init__(
        self,
        llm: LLM,
        parser: Parser,
        results: Results,
        writer: Writer,
        progress: Progress,
        *,
        seed: int,
        truncate: bool,
        stop: Callable[[], bool],
    ):
        self.worker = Worker(llm, results, seed=seed, truncate=truncate)
        self.parser, self.results, self.writer, self.progress, self.stop = parser, results, writer, progress, stop
        self.max_held = 16 * ROWS + 2 * writer.rows_per_part
        self._first = writer.manifest.next_part
        self._last: int | None = None  # the part after which to stop
        self._held = 0  # rows that were read and are not written
        self._more = True
        self._total = 0

    def run(self, stream: Generator[Record, None, int]) -> None:
        """Runs them all, or until `stop` says so and the part that is next then is written.

        stream: `records` from the first part that is not written, or from the beginning if it isn't known yet what
        columns Parquet has.
        """
        works = ordered(self._works(stream))
        while self._more:
            for work, result in self.worker.run(self._wanted(works)):
                self._put(work.row, result)
                if self._stopping() and self.writer.manifest.next_part > (self._last or 0):
                    return  # what else is running is broken off

    def _wanted(self, works: Iterator[Work | None]) -> Iterator[Work]:
        """What is to be run now: until too much is held, or there is no more."""
        while self._held <= self.max_held:
            try:
                work = next(works)
            except StopIteration:
                self._more = False
                return
            if work is not None and (not self._stopping() or self.writer.part(work.row.index) == self._last):
                yield work

    def _works(self, stream: Generator[Record, None, int]) -> Iterator[Work | None]:
        """The rows that are to be run. Those that can't be are put as errors, and None."""
        manifest = self.writer.manifest
        sample: list[dict[str, Any]] | None = None
        if self.results.parquet and manifest.columns is None:
            sample = []
        for record in self._counted(stream):
            part = self.writer.part(record.index)
            mine = part >= self._first and part % manifest.shards == manifest.shard
            if not mine and sample is None:
                continue
            if self._stopping() and part > (self._last or 0):
                return
            row = self.parser.parse(record)
            if sample is not None:
                sample.append(row.columns)
                if len(sample) == self.writer.rows_per_part:
                    manifest.columns, sample = dict(column_kinds(sample, self.results.kinds)), None
            if not mine:
                continue
            self._held += 1
            work = self.worker.prepare(row, row.index)
            if isinstance(work, Work):
                yield work
            else:
                self._put(row, self.results.failed(row, work))
                yield None
        if sample is not None:
            manifest.columns = dict(column_kinds(sample, self.results.kinds))
        self.writer.end(self._total)

    def _counted(self, stream: Generator[Record, None, int]) -> Iterator[Record]:
        self._total = yield from stream

    def _stopping(self) -> bool:
        if self._last is None and self.stop():
            self._last = self.writer.manifest.next_part
        return self._last is not None

    def _put(self, row: Row, result: Result) -> None:
        written = self.writer.manifest.rows
        self.writer.put(row.index, result)
        self._held -= self.writer.manifest.rows - written
        self.progress.update(self.writer)
