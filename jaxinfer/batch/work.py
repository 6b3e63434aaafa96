"""What the LLM is asked for a row, and what comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxinfer.batch.results import Results
from jaxinfer.batch.row import Ask, Row
from jaxinfer.batch.writer import Result
from jaxinfer.llm import LLM
from jaxinfer.sampling.params import SamplingParams


class Work(NamedTuple):
    """A row that is ready to run: see `order.Work`.

    row: what it is of.
    prompt: how it begins; of what is scored, all of it.
    length: tokens that it may have in the end; of text, letters.
    items: what the LLM is asked, once or several times.
    """

    row: Row
    prompt: list[int] | str
    length: int
    items: Sequence[Any]


class Worker(ABC):
    """Runs rows of one task.

    llm, results: what runs them, and what is made of its outputs.
    seed: of those that sample and have none of their own.
    truncate: prompts that are too long.
    params: of a task in `row.POOLING`, as far as they are given.

    Raises ValueError where the model does something else, or can't do it so.
    """

    def __init__(self, llm: LLM, results: Results, *, seed: int, truncate: bool, params: Mapping[str, Any]):
        self.llm, self.results, self.seed, self.truncate, self.params = llm, results, seed, truncate, params

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the results depend on besides the job and the checkpoint."""

    @property
    def defaults(self) -> SamplingParams:
        """Those of rows that say nothing."""
        return SamplingParams()

    @abstractmethod
    def work(self, row: Row, ask: Ask, key: object) -> Work:
        """Of a row that was understood. Raises ValueError."""

    @abstractmethod
    def outputs(self, items: Iterable[Any]) -> Iterator[Any]:
        """The LLM's output for each, as they are done; errors are in them."""

    @abstractmethod
    def result(self, row: Row, outputs: list[Any]) -> Result:
        """What is written for a row, of the outputs of its items in their order."""

    def prepare(self, row: Row, key: object) -> Work | str:
        """The row's work, or why it can't be done. key: by what the row is known, for its seed."""
        error = row.error or self.results.refuse(row)
        if error is not None:
            return error
        assert row.ask is not None
        try:
            return self.work(row, row.ask, key)
        except ValueError as problem:
            return f"{row.where}: {problem}"

    def run(self, works: Iterator[Work]) -> Iterator[tuple[Work, Result]]:
        """Each with its result, as they are done. They are taken as they are needed."""
        running: dict[int, tuple[Work, list[Any]]] = {}

        def items() -> Iterator[Any]:
            index = 0
            for work in works:
                done: list[Any] = []
                for item in work.items:
                    running[index] = work, done
                    index += 1
                    yield item

        for output in self.outputs(items()):
            work, done = running.pop(output.index)
            done.append(output)
            if len(done) == len(work.items):
                yield work, self._result(work.row, sorted(done, key=lambda output: output.index))

    def _result(self, row: Row, outputs: list[Any]) -> Result:
        error = next((output.error for output in outputs if output.error), None)
        if error is None:
            return self.result(row, outputs)
        return self.results.failed(row, f"{row.where}: {error}")
