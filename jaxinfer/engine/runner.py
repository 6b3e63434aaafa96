"""Owns what is compiled and what is on the device: executables by bucket, parameters, cache and slots."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.attention import Batch
from jaxinfer.distributed import blamed
from jaxinfer.engine.background import in_background
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.compiled import Folder
from jaxinfer.engine.leader import Leader
from jaxinfer.engine.programs import PREPARE, ZEROS, Key, Programs
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Schedule
from jaxinfer.engine.step import DecodeRows, Rows, Sampled, Scored, State
from jaxinfer.models.model import Params
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays
from jaxinfer.sampling.sample import Logprobs
from jaxinfer.sampling.slots import Masks


class ScoredSpan(NamedTuple):
    """Log-probabilities of one row: of its tokens from `position` on, in which part of `Result.scored`."""

    position: int
    at: slice


@dataclass
class Result:
    """What one call sampled, on the host: row r's tokens are tokens[:count[r], r]. Log-probabilities where asked for:
    `scored` of given tokens, all rows' one after the other; `spans` says whose."""

    tokens: np.ndarray
    count: np.ndarray
    logprobs: Logprobs | None
    scored: Logprobs | None
    spans: dict[int, ScoredSpan]


@dataclass
class Launched:
    """A call that the device has been given."""

    sampled: Sampled
    wants_logprobs: bool
    spans: dict[int, ScoredSpan]

    def wait(self) -> Result:
        """The call's result, when it is there."""
        sampled = self.sampled
        info = sampled.logprobs if self.wants_logprobs else None
        scored = sampled.scored if self.spans else None
        with blamed():
            tokens, count, info, scored = jax.device_get((sampled.tokens, sampled.count, info, scored))
        return Result(tokens, count, info, scored, self.spans)


class Runner:
    """Runs schedules. Cache and slots are donated to every call, so there is one of them at any time."""

    def __init__(
        self,
        programs: Programs,
        params: Params,
        on_compile: Callable[[str], None] | None = None,
        compiled: Folder | None = None,
    ):
        self.programs = programs
        self.model, self.buckets = programs.model, programs.buckets
        self.max_rows, self.max_steps, self.table_width = programs.max_rows, programs.max_steps, programs.table_width
        self.params = params
        self.on_compile = on_compile
        self.compile_seconds = 0.0
        self.compilations = 0
        self._compiled = compiled
        self._executables: dict[Key, Any] = {}
        self._coming: dict[Key, Future[None]] = {}  # those that threads have begun to compile
        self._abandoned: Future[None] = Future()
        self._prepare([ZEROS], lambda *_: "making the cache")
        self.state = self._executables[ZEROS]()
        self.leader: Leader | None = None  # on process 0 of several
        # The page table by slot, kept up to date as sequences grow, and the last call's sampling arrays: decoding calls
        # follow each other with the same rows, and filling these anew would take the host longer than all the rest.
        slots = programs.shards * (self.max_rows + 1)
        self._tables = np.zeros((slots, self.table_width), np.int32)
        self._filled: list[tuple[list[int] | None, int]] = [(None, 0)] * slots
        self._last_sampling: dict[int, tuple[tuple[int, ...], SamplingArrays]] = {}  # by shard

    def launch(self, schedules: Sequence[Schedule]) -> Launched:
        """Gives a call to the device, one schedule for each shard of rows, and does not wait for it."""
        key = self.program_of(schedules)
        return self._launch_step(key, schedules) if key[0] == "step" else self._launch_decode(key, schedules)

    def program_of(self, schedules: Sequence[Schedule]) -> Key:
        """The one that a call with these schedules needs."""
        if any(schedule.chunks for schedule in schedules):
            rows = Buckets.fit(self.buckets.mixed_rows, max(len(s.requests) for s in schedules))
            return "step", Buckets.fit(self.buckets.tokens, max(sum(s.counts) for s in schedules)), rows
        rows = Buckets.fit(self.buckets.decode, max(len(s.decode) for s in schedules))
        return "decode", rows, rows

    def prepare(self, request: Request, masks: Masks, clear: bool) -> None:
        """Makes a sequence's slot ready for its penalties and masks; `clear` forgets the tokens of the one before."""
        self.call(PREPARE, (np.int32(self._place(request)), masks, np.bool_(clear)))

    def call(self, key: Key, given: tuple[Any, ...]) -> Any:
        """Calls a program, on all hosts, with what the host gives it besides parameters and state, which it changes."""
        if self.leader is not None:
            return self.leader.call(key, given, self._call)
        return self._call(key, given)

    def recover(self) -> None:
        """After a broken-off call (Ctrl-C): the state was donated to it, and its result may never have arrived."""
        if self.leader is not None:
            self.leader.wait()
        if any(array.is_deleted() for array in jax.tree.leaves(self.state)):
            if self.leader is not None:
                raise ValueError("a call on several hosts was broken off: start the program again on each of them")
            self.state = self._executables[ZEROS]()

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
        _trim_memory()

    def abandon(self) -> None:
        """Nobody waits any more for a program that is being compiled: before `close`, from another thread."""
        if not self._abandoned.done():
            self._abandoned.set_result(None)

    def warm_up(self, keys: Sequence[Key] | None = None) -> None:
        """Compiles every program that a schedule can need, or these, several at a time, on all hosts."""
        keys = self.programs.keys() if keys is None else keys
        if self.leader is not None:
            self.leader.warm_up(keys)
        what = "loaded" if self._compiled else "compiled"
        self._prepare(keys, lambda done, count: f"{what} {done} of {count} programs")

    def _launch_step(self, key: Key, schedules: Sequence[Schedule]) -> Launched:
        _, length, size = key
        spans: dict[int, ScoredSpan] = {}
        arrays = [self._step_arrays(shard, s, length, size, spans) for shard, s in enumerate(schedules)]
        sampled: Sampled = self.call(key, _joined(arrays))
        return Launched(sampled, _want_logprobs(schedules), spans)

    def _launch_decode(self, key: Key, schedules: Sequence[Schedule]) -> Launched:
        arrays = [self._decode_arrays(shard, s, key[2]) for shard, s in enumerate(schedules)]
        steps = max(s.steps for s in schedules)
        sampled: Sampled = self.call(key, (*_joined(arrays), np.int32(steps)))
        return Launched(sampled, _want_logprobs(schedules), {})

    def _step_arrays(
        self, shard: int, schedule: Schedule, length: int, size: int, spans: dict[int, ScoredSpan]
    ) -> tuple[Any, ...]:
        """What one shard gives to a mixed call; where its rows' scored tokens will be goes into `spans`."""
        requests, total = schedule.requests, sum(schedule.counts)
        tokens, positions, row, scored, after = (np.zeros(length, np.int32) for _ in range(5))
        likeliest, end_scored = False, 0
        q_start = np.full(size + 1, total, np.int32)
        q_start[0] = 0
        kv_len = np.zeros(size, np.int32)
        end = len(schedule.decode)  # decoding rows find their token in their slot
        positions[:end] = schedule.start[:end]
        row[:end] = q_start[:end] = np.arange(end)
        kv_len[:end] = positions[:end] + 1
        q_start[end] = end
        for i, (request, count) in enumerate(schedule.chunks, end):
            start, past = end, schedule.start[i]
            end = start + count
            tokens[start:end] = request.tokens[past : past + count]
            positions[start:end] = np.arange(past, past + count)
            row[start:end] = i
            q_start[i + 1] = end
            kv_len[i] = past + count
            if request.scored_from is not None:
                first = max(past + 1, request.scored_from)
                given = request.scored_tokens(first, past + count + 1)
                begin, end_scored = end_scored, end_scored + len(given)
                scored[begin:end_scored] = given
                after[begin:end_scored] = np.arange(start + first - past - 1, start + first - past - 1 + len(given))
                spans[shard * size + i] = ScoredSpan(first, slice(shard * length + begin, shard * length + end_scored))
                likeliest |= bool(request.params.prompt_logprobs)
        row[total:] = size - 1
        slot, samples = self._slots(schedule, size)
        arrays: dict[str, Any] = {
            "tokens": tokens,
            "positions": positions,
            "row": row,
            "q_start": q_start,
            "kv_len": kv_len,
            "pages": self._pages(shard, requests, slot),
            "rows": np.array([len(schedule.decode), len(requests), len(requests)], np.int32),
            "logits_at": np.maximum(q_start[1:] - 1, 0),
        }
        wanted = Scored(scored, after, np.array([end_scored], np.int32), np.array([likeliest]))
        return Batch(**arrays), Rows(slot, samples), self._sampling(shard, requests, size), wanted

    def _decode_arrays(self, shard: int, schedule: Schedule, size: int) -> tuple[Any, ...]:
        """What one shard gives to a decoding call."""
        requests = schedule.decode
        positions = np.zeros(size, np.int32)
        positions[: len(requests)] = schedule.start
        slot, samples = self._slots(schedule, size)
        rows = DecodeRows(slot, samples, positions, self._pages(shard, requests, slot))
        return rows, self._sampling(shard, requests, size)

    def _call(self, key: Key, given: tuple[Any, ...]) -> Any:
        program = self._executable(key)
        if key == PREPARE:
            self.state = State(self.state.cache, program(self.state.slots, *given))
            return None
        sampled, self.state = program(self.params, self.state, *given)
        return sampled

    def _executable(self, key: Key) -> Any:
        """A program that was compiled ahead: a bucket compiles once, and never behind our back."""
        if key not in self._executables:
            what = f"{'loading' if self._compiled else 'compiling'} {key[0]} for {key[1]} tokens"
            self._prepare([key], lambda done, _: "generating" if done else what)
        return self._executables[key]

    def _prepare(self, keys: Sequence[Key], words: Callable[[int, int], str]) -> None:
        """Waits until these programs are there, which other threads compile: Ctrl-C is heard at once, and what had
        begun by then is there later for whoever needs it. words: what is said when so many are done, of how many."""
        missing = [key for key in keys if key not in self._executables]
        anew = [key for key in missing if key not in self._coming or self._coming[key].done()]
        start = time.perf_counter()
        try:
            with in_background(self._compile, anew) as futures:
                self._coming |= dict(zip(anew, futures, strict=True))
                for done, key in enumerate(missing):
                    self._say(words(done, len(missing)))
                    wait([self._coming[key], self._abandoned], return_when=FIRST_COMPLETED)
                    if not self._coming[key].done():
                        raise ValueError("the engine was closed while a program was compiled")
                    self._coming[key].result()
        finally:
            self.compile_seconds += time.perf_counter() - start
        if missing:
            self._say(words(len(missing), len(missing)))

    def _say(self, what: str) -> None:
        if self.on_compile is not None:
            self.on_compile(what)

    def _compile(self, key: Key) -> None:
        found = None if self._compiled is None else self._compiled.fetch(self.programs, key)
        if found is None:
            found = self.programs.lower(key).compile()
            self.compilations += 1
        self._executables[key] = found
        _trim_memory()  # the compiler leaves a hundred megabytes behind each time

    def _slots(self, schedule: Schedule, size: int) -> tuple[np.ndarray, np.ndarray]:
        """slot and samples of each row."""
        slot = np.full(size, self.max_rows, np.int32)
        samples = np.zeros(size, np.int32)
        slot[: len(schedule.samples)] = [request.slot for request in schedule.requests]
        samples[: len(schedule.samples)] = schedule.samples
        return slot, samples

    def _pages(self, shard: int, requests: Sequence[Request], slot: np.ndarray) -> np.ndarray:
        for request in requests:
            place = self._place(request)
            pages, filled = self._filled[place]
            count = len(request.pages)
            if pages is not request.pages:  # another request, or the same one after a preemption
                self._tables[place] = 0
                filled = 0
            if filled < count:
                self._tables[place, filled:count] = request.pages[filled:]
                self._filled[place] = (request.pages, count)
        return self._tables[slot + shard * (self.max_rows + 1)]

    def _place(self, request: Request) -> int:
        """Of a request's slot among those of all shards."""
        return request.shard * (self.max_rows + 1) + request.slot

    def _sampling(self, shard: int, requests: Sequence[Request], size: int) -> SamplingArrays:
        key = (size, *(request.id for request in requests))
        last = self._last_sampling.get(shard)
        if last is None or last[0] != key:
            rows = [RowSampling(r.params, r.seed, r.stop_ids, r.prompt_length) for r in requests]
            last = self._last_sampling[shard] = (key, SamplingArrays.of_rows(rows, size))
        return last[1]


def _joined(shards: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The arrays of all shards, one after the other."""
    return shards[0] if len(shards) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *shards)


def _want_logprobs(schedules: Sequence[Schedule]) -> bool:
    return any(request.params.logprobs is not None for schedule in schedules for request in schedule.requests)


def _trim_memory() -> None:
    """glibc keeps freed pieces below 32 MB until it is told to give them back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
