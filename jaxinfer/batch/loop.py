"""The loop of a job: records in, results to the writer, and the device busy in between."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from jaxinfer.batch.order import ROWS, ordered
from jaxinfer.batch.parquet import column_kinds
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.progress import Progress
from jaxinfer.batch.results import Results
from jaxinfer.batch.row import Record, Row
from jaxinfer.batch.writer import Writer
from jaxinfer.engine.prompts import prompt_ids
from jaxinfer.engine.scoring import encode_pair, encode_text
from jaxinfer.llm import LLM, Encoded, Pair
from jaxinfer.sampling.params import SamplingParams


class Work(NamedTuple):
    """A row that is ready to run: see `order.Work`. scored: how many tokens at the prompt's end are to be scored, and
    text, what they are."""

    row: Row
    prompt: list[int]
    length: int
    params: SamplingParams | None = None
    scored: int = 0
    text: str | None = None


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
        self.llm, self.parser, self.results, self.writer, self.progress = llm, parser, results, writer, progress
        self.seed, self.truncate, self.stop = seed, truncate, stop
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
            running: dict[int, Work] = {}
            for output in self._ask(self._items(works, running)):
                work = running.pop(output.index)
                self._put(work.row, output)
                if self._stopping() and self.writer.manifest.next_part > (self._last or 0):
                    return  # what else is running is broken off

    def _ask(self, items: Iterator[Any]) -> Iterator[Any]:
        ask = self.llm.score_iter if self.results.task == "score" else self.llm.generate_iter
        return ask(items, on_error="return")

    def _items(self, works: Iterator[Work], running: dict[int, Work]) -> Iterator[Any]:
        """What is asked of the LLM, until too much is held or there is no more."""
        for place in itertools.count():
            if self._held > self.max_held:
                return
            work = next(works, None)
            while work is not None and self._stopping() and self.writer.part(work.row.index) != self._last:
                work = next(works, None)
            if work is None:
                self._more = False
                return
            running[place] = work
            if self.results.task == "score":
                yield Pair(work.text, work.prompt[: -work.scored], work.prompt[-work.scored :])
            else:
                yield Encoded(None, work.prompt), work.params

    def _works(self, stream: Generator[Record, None, int]) -> Iterator[Work]:
        """The rows that are to be run. Those that can't be are put as errors."""
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
            error = row.error or self.results.refuse(row)
            if error is None:
                try:
                    work = self._work(row)
                except ValueError as problem:
                    error = f"{row.where}: {problem}"
                else:
                    yield work
                    continue
            self._put(row, error)
        if sample is not None:
            manifest.columns = dict(column_kinds(sample, self.results.kinds))
        self.writer.end(self._total)

    def _counted(self, stream: Generator[Record, None, int]) -> Iterator[Record]:
        self._total = yield from stream

    def _stopping(self) -> bool:
        if self._last is None and self.stop():
            self._last = self.writer.manifest.next_part
        return self._last is not None

    def _put(self, row: Row, result: Any) -> None:
        """Gives the writer an output, or why there is none."""
        error = result if isinstance(result, str) else result.error and f"{row.where}: {result.error}"
        written = self.writer.manifest.rows
        if error:
            self.writer.put(row.index, self.results.failed(row, error))
        elif self.results.task == "score":
            self.writer.put(row.index, self.results.scored(row, result))
        else:
            self.writer.put(row.index, self.results.generated(row, result))
        self._held -= self.writer.manifest.rows - written
        self.progress.update(self.writer)

    def _work(self, row: Row) -> Work:
        """A row's tokens. Raises ValueError."""
        ask, tokenizer, context = row.ask, self.llm.tokenizer, self.llm.sizes.max_model_len
        assert ask is not None
        if self.results.task == "score":
            assert ask.prompt is not None
            if ask.continuation is None:
                text: Any = ask.prompt
                given, scored = encode_text(ask.prompt, tokenizer)
            else:
                text = ask.continuation
                given, scored = encode_pair(ask.prompt, ask.continuation, tokenizer)
            ids = self._fitting([*given, *scored], context + 1)
            count = min(len(scored), len(ids) - 1)
            whole = isinstance(text, str) and count == len(scored)
            return Work(row, ids, len(ids), None, count, text if whole else None)
        params = ask.params
        assert params is not None
        if ask.messages is not None:
            ids = self.llm.chat_prompt(ask.messages, ask.tools)["prompt_token_ids"]
        else:
            assert ask.prompt is not None
            ids = prompt_ids(ask.prompt, tokenizer)[1]
        wanted = min(params.max_tokens or 1, context // 2)
        ids = self._fitting(ids, context - wanted)
        if params.seed is None and not params.greedy:
            digest = hashlib.blake2b(f"{self.seed}:{row.index}".encode(), digest_size=8).digest()
            params = dataclasses.replace(params, seed=int.from_bytes(digest) >> 2)
        return Work(row, ids, min(len(ids) + (params.max_tokens or context), context), params)

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens, BOS before them where there was one; all of them unless they are to be cut."""
        if not self.truncate or len(ids) <= room:
            return ids
        bos = ids[:1] if ids[0] == self.llm.tokenizer.bos_token_id else []
        return bos + ids[len(ids) - room + len(bos) :]
