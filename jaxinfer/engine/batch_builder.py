"""Schedules to what programs are given: the host's part of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.attention import Batch
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Decode, Key, Programs, Step
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Schedule
from jaxinfer.engine.step import DecodeRows, Rows, Scored
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays


class ScoredSpan(NamedTuple):
    """Log-probabilities of one row: of its tokens from `position` on, in which part of `Result.scored`."""

    position: int
    at: slice


class Built(NamedTuple):
    """A call: the program's key, what the host gives it, and by row, where scored tokens' log-probabilities will be."""

    key: Key
    given: tuple[Any, ...]
    spans: dict[int, ScoredSpan]


class BatchBuilder:
    """Fills arrays. The page table by slot is kept up to date as sequences grow, and so are the last call's sampling
    arrays: decoding calls follow each other with the same rows, and filling these anew would take the host longer than
    all the rest."""

    def __init__(self, programs: Programs):
        self._buckets, self._max_rows = programs.buckets, programs.max_rows
        slots = programs.shards * (self._max_rows + 1)
        self._tables = np.zeros((slots, programs.table_width), np.int32)
        self._filled: list[tuple[list[int] | None, int]] = [(None, 0)] * slots
        self._last_sampling: dict[int, tuple[tuple[int, ...], SamplingArrays]] = {}  # by shard

    def key(self, schedules: Sequence[Schedule]) -> Key:
        """Of the program that a call with these schedules, one for each shard of rows, needs."""
        if any(schedule.chunks for schedule in schedules):
            rows = Buckets.fit(self._buckets.mixed_rows, max(len(s.requests) for s in schedules))
            return Step.kind, Buckets.fit(self._buckets.tokens, max(sum(s.counts) for s in schedules)), rows
        rows = Buckets.fit(self._buckets.decode, max(len(s.decode) for s in schedules))
        return Decode.kind, rows, rows

    def build(self, schedules: Sequence[Schedule]) -> Built:
        """The call."""
        key = kind, length, size = self.key(schedules)
        spans: dict[int, ScoredSpan] = {}
        if kind == Step.kind:
            arrays = [self._step_arrays(shard, s, length, size, spans) for shard, s in enumerate(schedules)]
            return Built(key, _joined(arrays), spans)
        arrays = [self._decode_arrays(shard, s, size) for shard, s in enumerate(schedules)]
        return Built(key, (*_joined(arrays), np.int32(max(s.steps for s in schedules))), spans)

    def slot(self, request: Request) -> int:
        """A request's among those of all shards."""
        return request.shard * (self._max_rows + 1) + request.slot

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

    def _slots(self, schedule: Schedule, size: int) -> tuple[np.ndarray, np.ndarray]:
        """slot and samples of each row."""
        slot = np.full(size, self._max_rows, np.int32)
        samples = np.zeros(size, np.int32)
        slot[: len(schedule.samples)] = [request.slot for request in schedule.requests]
        samples[: len(schedule.samples)] = schedule.samples
        return slot, samples

    def _pages(self, shard: int, requests: Sequence[Request], slot: np.ndarray) -> np.ndarray:
        for request in requests:
            own = self.slot(request)
            pages, filled = self._filled[own]
            count = len(request.pages)
            if pages is not request.pages:  # another request, or the same one after a preemption
                self._tables[own] = 0
                filled = 0
            if filled < count:
                self._tables[own, filled:count] = request.pages[filled:]
                self._filled[own] = (request.pages, count)
        return self._tables[slot + shard * (self._max_rows + 1)]

    def _sampling(self, shard: int, requests: Sequence[Request], size: int) -> SamplingArrays:
        key = (size, *(request.id for request in requests))
        last = self._last_sampling.get(shard)
        if last is None or last[0] != key:
            rows = [RowSampling(r.params, r.seed, r.stop_ids, r.prompt_length, r.limit) for r in requests]
            last = self._last_sampling[shard] = (key, SamplingArrays.of_rows(rows, size))
        return last[1]


def _joined(shards: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The arrays of all shards, one after the other."""
    return shards[0] if len(shards) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *shards)
