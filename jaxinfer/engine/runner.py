"""Owns what is compiled and what is on the device: executables by bucket, parameters, cache and slots."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoint.factors import LoadedAdapter
from jaxinfer.distributed import blamed
from jaxinfer.engine.batch_builder import BatchBuilder, Call, ScoredSpan
from jaxinfer.engine.compiled import Folder
from jaxinfer.engine.executables import ExecutableCache
from jaxinfer.engine.leader import Leader
from jaxinfer.engine.malloc import trim_memory
from jaxinfer.engine.programs import (
    Key,
    LoadAdapter,
    LoadScaledAdapter,
    LoadTable,
    PrepareCounts,
    PrepareMasks,
    PreparePlaces,
    Programs,
    Sampled,
    State,
    Zeros,
)
from jaxinfer.engine.ready import ReadyPrograms
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import SchedulerOutput
from jaxinfer.models.model import Params
from jaxinfer.sampling.logprobs import Logprobs
from jaxinfer.sampling.slots import Masks, TablePlaces, TokenCounts, mask_words
from jaxinfer.sampling.table_sizes import BLOCKS
from jaxinfer.sampling.tables import TokenTables
from jaxinfer.weights import LowRank


@dataclass
class Result:
    """What one call sampled, on the host.

    tokens: row r's are tokens[:count[r], r]; each shard of rows has as many rows.
    count: of each row.
    logprobs: of the tokens, where asked for.
    scored: log-probabilities of given tokens, where asked for, one request's after the other.
    spans: whose those are.
    """

    tokens: np.ndarray
    count: np.ndarray
    logprobs: Logprobs | None
    scored: Logprobs | None
    spans: dict[int, ScoredSpan]


@dataclass
class PendingStep:
    """A call that the device has been given.

    sampled: None where nothing is, or not yet.
    scored: None where nothing is.
    wants_logprobs: whether some row asks for those of its tokens.
    spans: see Result.
    rows: of all shards.
    held: the sampling that waits for its masks.
    """

    sampled: Sampled | None
    scored: Logprobs | None
    wants_logprobs: bool
    spans: dict[int, ScoredSpan]
    rows: int
    held: Call | None = None

    def wait(self) -> Result:
        """The call's result, when it is there."""
        sampled = self.sampled
        if sampled is None:
            nothing = np.zeros(self.rows, np.int32)
            sampled = Sampled(nothing[None], nothing, None)
        info = sampled.logprobs if self.wants_logprobs else None
        with blamed():
            tokens, count, info, scored = jax.device_get((sampled.tokens, sampled.count, info, self.scored))
        return Result(tokens, count, info, scored, self.spans)


class Runner(ReadyPrograms):
    """Runs schedules. Cache and slots are donated to every call, so there is one of them at any time."""

    def __init__(
        self,
        programs: Programs,
        params: Params,
        on_compile: Callable[[str], None] | None = None,
        compiled: Folder | None = None,
        kept: ExecutableCache | None = None,
    ):
        super().__init__(programs, on_compile, compiled, kept)
        self.programs = programs
        self.model, self.buckets = programs.model, programs.buckets
        self.max_rows, self.max_steps = programs.max_rows, programs.max_steps
        self.params = params
        self.batches = BatchBuilder(programs)
        self.state = State()
        self._prepare([Zeros.key], lambda *_: "making the cache")
        self._call([(Zeros.key, ())])
        self.leader: Leader | None = None  # on process 0 of several

    def launch(self, schedules: Sequence[SchedulerOutput]) -> PendingStep:
        """Gives a call to the device, one schedule for each shard of rows, and does not wait for it. What it samples
        may be held back until `sample`."""
        built = self.batches.build(schedules)
        calls = built.calls[:-1] if built.held else built.calls
        then = [*([built.calls[-1][0]] if built.held else ()), *built.next]
        results = self.call(calls, then)
        scored = next((result for result in results if isinstance(result, Logprobs)), None)
        sampled = next((result for result in results if isinstance(result, Sampled)), None)
        rows = len(schedules) * max(len(schedule.requests) for schedule in schedules)
        held = built.calls[-1] if built.held else None
        return PendingStep(sampled, scored, _want_logprobs(schedules), built.spans, rows, held)

    def all_allowed(self, step: PendingStep) -> np.ndarray:
        """Masks u32[R, V/32] for what a step holds back, with all bits set. Each shard of rows has as many."""
        assert step.held is not None
        (_, size), _ = step.held
        words = mask_words(self.model.config.vocab_size)
        return np.full((self.programs.shards * size, words), 0xFFFFFFFF, np.uint32)

    @property
    def on_cpu(self) -> bool:
        return self.programs.devices[0].platform == "cpu"

    def sample(self, step: PendingStep, masks: np.ndarray, but: Sequence[int] = ()) -> None:
        """Gives the device the sampling that a step holds back, `but` for some rows."""
        assert step.held is not None
        key, inputs = step.held
        rows: Any = inputs[0]
        rows.samples[list(but)] = 0
        (step.sampled,) = self.call([(key, (*inputs[:2], masks, *inputs[2:]))])  # adapters come after them
        step.held = None

    def prepare(self, request: Request, values: Masks | TokenCounts) -> None:
        """Makes a sequence's slot ready for its masks or its penalties."""
        program = PrepareMasks if isinstance(values, Masks) else PrepareCounts
        self.call([(program.key, (np.int32(self.batches.slot(request)), values))])

    def prepare_places(self, places: Sequence[tuple[Request, int]]) -> None:
        """Makes sequences' slots ready for their grammars' tables: where in these they are."""
        rows = self.programs.shards * self.max_rows
        slot, place = np.full(rows, self.programs.shards * (self.max_rows + 1) - 1, np.int32), np.zeros(rows, np.int32)
        slot[: len(places)] = [self.batches.slot(request) for request, _ in places]
        place[: len(places)] = [own for _, own in places]
        self.call([(PreparePlaces.key, (slot, TablePlaces(place)))])

    def load_table(self, shard: int, block: int, value: TokenTables) -> None:
        """Puts some states of a grammar's table into a block on the devices."""
        self.call([(LoadTable.key, (np.int32(shard * BLOCKS + block), value))])

    def load_adapter(self, slot: int, adapter: LoadedAdapter) -> None:
        """Puts an adapter into a slot on the devices."""

        def padded(own: np.ndarray[Any, Any], shape: jax.Array) -> np.ndarray[Any, Any]:
            return np.pad(own, [(0, size - there) for size, there in zip(shape.shape, own.shape, strict=True)])

        def whole(name: str, one: LowRank) -> LowRank:
            if name in adapter.factors:
                return jax.tree.map(padded, adapter.factors[name], one)
            nothing: LowRank = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), one)
            if nothing.gain is None:
                return nothing
            return dataclasses.replace(nothing, gain=nothing.gain + (np.nan if adapter.scaled else 1))

        program = LoadScaledAdapter if adapter.scaled else LoadAdapter
        self.call(
            [(program.key, (np.int32(slot), {name: whole(name, one) for name, one in self.programs.adapter.items()}))]
        )

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Of one of the parameters, a vector."""
        return np.asarray(self.params[name])

    def rows(self, name: str, ids: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of one of them, a matrix, as float32."""
        weight: Any = self.model.params[name].bind(self.params, False)
        return np.asarray(weight.take(np.asarray(ids, np.int32), np.float32))

    def call(self, calls: Sequence[Call], then: Sequence[Key] = ()) -> list[Any]:
        """Calls programs one after the other, on all hosts: all of them or none. What each of them gives the host.
        then: what is likely to be called next."""
        if self.leader is not None:
            return self.leader.call(calls, self._call)
        return self._call(calls, then)

    def recover(self) -> None:
        """After a broken-off call (Ctrl-C): the state was donated to it, and its result may never have arrived."""
        if self.leader is not None:
            self.leader.wait()
        if any(array.is_deleted() for array in jax.tree.leaves(self.state)):
            if self.leader is not None:
                raise ValueError("a call on several hosts was broken off: start the program again on each of them")
            self._call([(Zeros.key, ())])

    def close(self) -> None:
        """Frees the device's memory now instead of when the last reference goes."""
        if self.leader is not None:
            self.leader.close()
        for array in jax.tree.leaves((self.params, self.state)):
            if not array.is_deleted():
                array.delete()
        self.params = {}
        self._executables.clear()
        # On CPU weights lie in numpy's memory, which JAX lets go of when Python collects garbage.
        gc.collect()
        trim_memory()

    def warm_up(self, keys: Sequence[Key] | None = None) -> None:
        """The same on all hosts."""
        keys = self.programs.keys() if keys is None else keys
        if self.leader is not None:
            self.leader.warm_up(keys)
        super().warm_up(keys)

    def _call(self, calls: Sequence[Call], then: Sequence[Key] = ()) -> list[Any]:
        executables = self._ready([key for key, _ in calls], then)
        results = []
        for executable, (key, inputs) in zip(executables, calls, strict=True):
            result, self.state = self.programs[key].run(executable, self.params, self.state, inputs)
            results.append(result)
        return results


def _want_logprobs(schedules: Sequence[SchedulerOutput]) -> bool:
    return any(request.params.logprobs is not None for schedule in schedules for request in schedule.requests)
