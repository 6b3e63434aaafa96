"""Packed calls of whole texts, several on their way at a time. Nothing stays on the device but the weights, so any
number of threads may ask at once."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.engine.compiled import Folder
from jaxinfer.engine.executables import ExecutableCache
from jaxinfer.engine.malloc import trim_memory
from jaxinfer.engine.pooling.packing import Packed, Row, arrays, pack, spans
from jaxinfer.engine.pooling.programs import PoolingPrograms, PoolTexts, PoolTokens
from jaxinfer.engine.pooling.reader import Reader
from jaxinfer.engine.ready import ReadyPrograms
from jaxinfer.engine.stats import EngineStats
from jaxinfer.errors import EngineClosed
from jaxinfer.models.model import Params

IN_FLIGHT = 3  # calls that the device has
CALLS_A_PORTION = 16  # texts of so many are sorted together
Values = np.ndarray | list[np.ndarray]  # f32[rows, N], or of each row f32[tokens, N]


class Call(NamedTuple):
    """One that the device has.

    rows: its texts, in the order of `values`.
    values: f32[rows of all shards, N], or of all their tokens.
    places: of each text among those rows; of tokens a slice.
    start: when it was launched, by time.perf_counter.
    """

    rows: list[Row]
    values: jax.Array
    places: list[int] | list[slice]
    start: float


class PoolingEngine(ReadyPrograms):
    """Texts in, rows of numbers out.

    budget: tokens of a call, on each shard of rows.
    stats: of `calls`, `prefill_tokens` and `prefill_seconds`, and how many texts are `finished`.
    """

    def __init__(
        self,
        programs: PoolingPrograms,
        params: Params,
        on_compile: Callable[[str], None] | None = None,
        compiled: Folder | None = None,
        kept: ExecutableCache | None = None,
    ):
        super().__init__(programs, on_compile, compiled, kept)
        self.programs, self.params, self.budget = programs, params, programs.budget
        self.model = programs.model
        self.stats = EngineStats()
        self.closed = False
        self._turn = threading.Lock()
        self._arrived = 0.0  # when the last call's numbers did

    @property
    def portion(self) -> int:
        """Tokens of texts that are sorted together, about."""
        return CALLS_A_PORTION * self.budget * self.programs.shards

    def run(self, reader: Reader, tokens: bool = False) -> Iterator[tuple[list[Row], Values]]:
        """The numbers of the texts of a call, as they are there; tokens: of each of their tokens. Raises EngineClosed,
        and what ended the reading."""
        flying: deque[Call] = deque()
        reader.start()
        try:
            while (rows := reader.take(wait=not flying)) is not None:
                for packed in pack(rows, self.programs, self.budget):
                    flying.append(self._launch(packed, tokens))
                    if len(flying) > IN_FLIGHT:
                        yield self._wait(flying.popleft())
                if not rows:
                    yield self._wait(flying.popleft())
            while flying:
                yield self._wait(flying.popleft())
            reader.end()
        finally:
            reader.stop()

    def check_open(self) -> None:
        """Raises EngineClosed after `close`."""
        if self.closed:
            raise EngineClosed("this LLM was closed: load it again with LLM(...)")

    def close(self) -> None:
        """Frees the device's memory."""
        self.abandon()
        with self._turn:
            if self.closed:
                return
            self.closed = True
            for array in self.params.values():
                array.delete()
            self.params = {}
            self._executables.clear()
        gc.collect()
        trim_memory()

    def _launch(self, packed: Packed, tokens: bool) -> Call:
        each = self.programs.rows(packed.size)
        batch, skips = arrays(packed, each)
        kind = PoolTokens.kind if tokens else PoolTexts.kind
        program: PoolTexts = self.programs[kind, packed.size]  # type: ignore[assignment]
        inputs = (batch, skips)[: len(program.inputs)]
        rows = [row for shard in packed.shards for row in shard]
        places: Any = [i * each + place for i, shard in enumerate(packed.shards) for place in range(len(shard))]
        if tokens:
            places = list(spans(packed))
        with self._turn:
            self.check_open()
            others = [] if program.key in self._executables else self.programs.keys_up_to(kind, self.budget)
            (executable,) = self._ready([program.key], others)
            values, _ = program.run(executable, self.params, self.programs.state, inputs)
            self.stats.calls += 1
        assert isinstance(values, jax.Array)
        return Call(rows, values, places, time.perf_counter())

    def _wait(self, call: Call) -> tuple[list[Row], Values]:
        all_values = np.asarray(jax.device_get(call.values))
        values = all_values[call.places] if isinstance(call.places[0], int) else [all_values[i] for i in call.places]
        with self._turn:
            now = time.perf_counter()
            self.stats.prefill_seconds += now - max(call.start, self._arrived)
            self._arrived = now
            self.stats.prefill_tokens += sum(len(row.ids) for row in call.rows)
            self.stats.finished += len(call.rows)
        return call.rows, values
