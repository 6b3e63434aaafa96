"""Schedules to what programs are given: the host's part of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.attention import ForwardBatch, Table
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.kv_cache import Copies
from jaxinfer.engine.programs import (
    Copy,
    Decode,
    DecodeForward,
    DecodeRows,
    Forward,
    FullDecode,
    FullSample,
    GuidedSample,
    Key,
    Places,
    Program,
    Programs,
    Sample,
    SampleRows,
    Score,
    Scored,
    adapted_kind,
)
from jaxinfer.engine.request import Held, Request
from jaxinfer.engine.scheduler import SchedulerOutput
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays


class ScoredSpan(NamedTuple):
    """Log-probabilities of one request.

    position: of the first of its tokens that they are of.
    at: in which part of `Result.scored` they are.
    """

    position: int
    at: slice


Call = tuple[Key, tuple[object, ...]]  # a program's key, and what the host gives it


class Built(NamedTuple):
    """What a step calls.

    calls: programs, one after the other, and what the host gives them.
    spans: by request, where its scored tokens' log-probabilities will be.
    next: of the programs that the step after this one is likely to call, if they are others.
    held: the last of the calls lacks its masks, its last argument, which need the tokens of the step before.
    """

    calls: list[Call]
    spans: dict[int, ScoredSpan]
    next: Sequence[Key] = ()
    held: bool = False


class BatchBuilder:
    """Fills arrays. The page table by slot is kept up to date as sequences grow, and so are the last call's sampling
    arrays: decoding calls follow each other with the same rows, and filling these anew would take the host longer than
    all the rest."""

    def __init__(self, programs: Programs):
        self._buckets, self._max_rows, self._max_tokens = programs.buckets, programs.max_rows, programs.max_tokens
        self._no_adapter = programs.adapter_limits.slots
        self._adapted_vocabulary = programs.adapter_limits.vocabulary
        slots, widths = programs.shards * (self._max_rows + 1), programs.table_widths
        windows = [group.forgets for group in programs.layout.groups]
        self._tables = [
            _SlotTable(slots, width, windowed) if width else None
            for width, windowed in zip(widths, windows, strict=True)
        ]
        # By shard: of how many rows, whose, and all together.
        self._last_sampling: dict[int, tuple[int, dict[tuple[int, int], RowSampling], SamplingArrays]] = {}

    def build(self, schedules: Sequence[SchedulerOutput]) -> Built:
        """What is called for these schedules, one for each shard of rows."""
        built = self._build(schedules)
        return built._replace(calls=self._copy_calls(schedules) + built.calls)

    def _copy_calls(self, schedules: Sequence[SchedulerOutput]) -> list[Call]:
        """What is copied before all else."""
        most, size = max(len(pairs) for s in schedules for pairs in [(), *s.copies]), self._max_rows
        parts = [slice(start, start + size) for start in range(0, most, size)]
        kinds = max(len(s.copies) for s in schedules)
        nothing: Copies = [[]] * kinds
        return [
            (
                (Copy.kind, size),
                _joined([(tuple(Places.of(pairs[part], size) for pairs in s.copies or nothing),) for s in schedules]),
            )
            for part in parts
        ]

    def _build(self, schedules: Sequence[SchedulerOutput]) -> Built:
        plain = all(request.params.is_plain for schedule in schedules for request in schedule.requests)
        held = any(request.constrained for schedule in schedules for request in schedule.requests)
        adapted = any(request.adapter_slot >= 0 for schedule in schedules for request in schedule.requests)
        if any(schedule.chunks for schedule in schedules):
            length = Buckets.fit(self._buckets.tokens, max(sum(s.counts) for s in schedules))
            arrays = [self._forward_arrays(shard, s, length) for shard, s in enumerate(schedules)]
            beside = self._adapters(schedules, self._max_rows) if adapted else ()
            calls: list[Call] = [((_kind(Forward, adapted), length), (*_joined(arrays), *beside))]
        elif held:
            key = self._decode_key(max(len(s.decode) for s in schedules), DecodeForward, adapted)
            arrays = [(self._decode_rows(shard, s, key[1]),) for shard, s in enumerate(schedules)]
            calls = [(key, (*_joined(arrays), *(self._adapters(schedules, key[1]) if adapted else ())))]
        else:
            key = self._decode_key(max(len(s.decode) for s in schedules), Decode if plain else FullDecode, adapted)
            arrays = [self._decode_arrays(shard, s, key[1]) for shard, s in enumerate(schedules)]
            steps = np.int32(max(s.steps for s in schedules))
            beside = self._adapters(schedules, key[1]) if adapted else ()
            return Built([(key, (*_joined(arrays), steps, *beside))], {})
        spans: dict[int, ScoredSpan] = {}
        if any(request.scored_from is not None for schedule in schedules for request, _ in schedule.chunks):
            scored = [self._scored_arrays(shard, s, spans) for shard, s in enumerate(schedules)]
            beside = self._adapters_of_scored(schedules, spans) if adapted and self._adapted_vocabulary else ()
            calls.append(((_kind(Score, bool(beside)), self._max_tokens), (*_joined(scored), *beside)))
        samples = not spans or any(any(schedule.samples) for schedule in schedules)
        if samples:  # perhaps nothing, but then there is something to be waited for
            size = Buckets.fit(self._buckets.sample, max(len(s.requests) for s in schedules))
            arrays = [self._sample_arrays(shard, s, size) for shard, s in enumerate(schedules)]
            sample = GuidedSample if held else Sample if plain else FullSample
            beside = self._adapters(schedules, size) if adapted and self._adapted_vocabulary else ()
            calls.append(((_kind(sample, bool(beside)), size), (*_joined(arrays), *beside)))
        # Where no prompt is left to be computed, all rows that have room decode next.
        going_on = max(sum(request.room > 0 for request in s.requests) for s in schedules)
        over = all(all(s.samples) and sum(s.counts) < self._max_tokens for s in schedules)
        decode = DecodeForward if held else Decode if plain else FullDecode
        coming = [self._decode_key(going_on, decode, adapted)] if over and going_on else []
        return Built(calls, spans, coming, held and samples)

    def _decode_key(self, rows: int, program: type[Decode | DecodeForward], adapted: bool) -> Key:
        """Of the program that decodes so many rows of each shard."""
        sizes = self._buckets.decode if program is Decode else self._buckets.full_decode
        return _kind(program, adapted), Buckets.fit(sizes, rows)

    def _adapters(self, schedules: Sequence[SchedulerOutput], size: int) -> tuple[np.ndarray]:
        """The adapter's slot of each row."""
        slots = np.full((len(schedules), size), self._no_adapter, np.int32)
        for shard, schedule in enumerate(schedules):
            for row, request in enumerate(schedule.requests):
                if request.adapter_slot >= 0:
                    slots[shard, row] = request.adapter_slot
        return (slots.reshape(-1),)

    def slot(self, request: Request) -> int:
        """A request's among those of all shards."""
        return request.shard * (self._max_rows + 1) + request.slot

    def _adapters_of_scored(
        self, schedules: Sequence[SchedulerOutput], spans: Mapping[int, ScoredSpan]
    ) -> tuple[np.ndarray]:
        """The adapter's slot of each scored token."""
        slots = np.full(len(schedules) * self._max_tokens, self._no_adapter, np.int32)
        for schedule in schedules:
            for request, _ in schedule.chunks:
                if request.id in spans and request.adapter_slot >= 0:
                    slots[spans[request.id].at] = request.adapter_slot
        return (slots,)

    def _forward_arrays(self, shard: int, schedule: SchedulerOutput, length: int) -> tuple[Any, ...]:
        """What one shard gives to a forward."""
        requests, total, size = schedule.requests, sum(schedule.counts), self._max_rows
        tokens, positions, row = (np.zeros(length, np.int32) for _ in range(3))
        cu_q_lens = np.full(size + 1, total, np.int32)
        cu_q_lens[0] = 0
        kv_lens = np.zeros(size, np.int32)
        slot, _ = self._slots(schedule, size)
        end = len(schedule.decode)  # decoding rows find their token in their slot
        positions[:end] = schedule.start[:end]
        row[:end] = cu_q_lens[:end] = np.arange(end)
        kv_lens[:end] = positions[:end] + 1
        cu_q_lens[end] = end
        for i, (request, count) in enumerate(schedule.chunks, end):
            start, past = end, schedule.start[i]
            end = start + count
            tokens[start:end] = request.tokens[past : past + count]
            positions[start:end] = np.arange(past, past + count)
            row[start:end] = i
            cu_q_lens[i + 1] = end
            kv_lens[i] = past + count
        row[total:] = size - 1
        rows = np.array([len(schedule.decode), len(requests), len(requests)], np.int32)
        tables = self._tables_of(shard, requests, slot)
        arrays: tuple[Any, ...] = tokens, positions, row, cu_q_lens, kv_lens, tables, rows, slot
        return (ForwardBatch(*arrays),)

    def _sample_arrays(self, shard: int, schedule: SchedulerOutput, size: int) -> tuple[Any, ...]:
        """What one shard gives to a sample."""
        slot, samples = self._slots(schedule, size)
        logits_indices, length = np.zeros(size, np.int32), np.zeros(size, np.int32)
        counts = np.array(schedule.counts, np.int32)
        logits_indices[: len(counts)] = np.cumsum(counts, dtype=np.int32) - 1
        length[: len(counts)] = counts + schedule.start
        return SampleRows(slot, samples, logits_indices, length), self._sampling(shard, schedule.requests, size)

    def _scored_arrays(self, shard: int, schedule: SchedulerOutput, spans: dict[int, ScoredSpan]) -> tuple[Any, ...]:
        """What one shard gives to a score; where its requests' log-probabilities will be goes into `spans`."""
        tokens, after = np.zeros(self._max_tokens, np.int32), np.zeros(self._max_tokens, np.int32)
        likeliest, end, start = False, 0, len(schedule.decode)
        for (request, count), past in zip(schedule.chunks, schedule.start[start:], strict=True):
            if request.scored_from is not None:
                first = max(past + 1, request.scored_from)
                wanted = request.scored_tokens(first, past + count + 1)
                begin, end = end, end + len(wanted)
                tokens[begin:end] = wanted
                after[begin:end] = np.arange(start + first - past - 1, start + first - past - 1 + len(wanted))
                offset = shard * self._max_tokens
                spans[request.id] = ScoredSpan(first, slice(offset + begin, offset + end))
                likeliest |= bool(request.params.prompt_logprobs)
            start += count
        return (Scored(tokens, after, np.array([end], np.int32), np.array([likeliest])),)

    def _decode_arrays(self, shard: int, schedule: SchedulerOutput, size: int) -> tuple[Any, ...]:
        """What one shard gives to a decoding call."""
        return self._decode_rows(shard, schedule, size), self._sampling(shard, schedule.decode, size)

    def _decode_rows(self, shard: int, schedule: SchedulerOutput, size: int) -> DecodeRows:
        requests = schedule.decode
        positions = np.zeros(size, np.int32)
        positions[: len(requests)] = schedule.start
        slot, samples = self._slots(schedule, size)
        return DecodeRows(slot, samples, positions, self._tables_of(shard, requests, slot))

    def _slots(self, schedule: SchedulerOutput, size: int) -> tuple[np.ndarray, np.ndarray]:
        """slot and samples of each row."""
        slot = np.full(size, self._max_rows, np.int32)
        samples = np.zeros(size, np.int32)
        slot[: len(schedule.samples)] = [request.slot for request in schedule.requests]
        samples[: len(schedule.samples)] = schedule.samples
        return slot, samples

    def _tables_of(self, shard: int, requests: Sequence[Request], slot: np.ndarray) -> tuple[Table | None, ...]:
        paged = [table for table in self._tables if table is not None]
        offset = shard * (self._max_rows + 1)
        for group, table in enumerate(paged):
            table.fill(requests, group, offset)
        slots = slot + offset
        return tuple(None if table is None else table.of(slots) for table in self._tables)

    def _sampling(self, shard: int, requests: Sequence[Request], size: int) -> SamplingArrays:
        keys = [(request.id, request.table_end) for request in requests]
        last = self._last_sampling.get(shard)
        if last is None or (last[0], list(last[1])) != (size, keys):
            known = {} if last is None else last[1]
            rows = {
                key: known.get(key) or RowSampling(r.params, r.seed, r.stop_ids, r.prompt_length, r.limit, r.table_end)
                for key, r in zip(keys, requests, strict=True)
            }
            last = self._last_sampling[shard] = size, rows, SamplingArrays.of_rows(list(rows.values()), size)
        return last[2]


class _SlotTable:
    """A group's page table by slot."""

    def __init__(self, slots: int, width: int, windowed: bool):
        self._pages = np.zeros((slots, width), np.int32)
        self._first = np.zeros(slots, np.int32)
        # Of each slot: whose pages, how many, from which on.
        self._filled: list[tuple[Held | None, int, int]] = [(None, 0, 0)] * slots
        self._windowed = windowed

    def fill(self, requests: Sequence[Request], group: int, offset: int) -> None:
        """Brings slots up to date with their sequences' pages of this group. offset: of the shard's slots."""
        for request in requests:
            held, slot = request.pages[group], offset + request.slot
            before, filled, first = self._filled[slot]
            count = len(held.pages)
            # Of another request, of the same one before a preemption, or with pages that have fallen out of the window.
            if before is not held or first != held.first:
                self._pages[slot], self._first[slot], filled = 0, held.first, 0
            elif filled == count:
                continue
            width = min(count, self._pages.shape[1])
            self._pages[slot, filled:width] = held.pages[filled:width]
            self._filled[slot] = held, count, held.first

    def of(self, slots: np.ndarray) -> Table:
        return Table(self._pages[slots], self._first[slots] if self._windowed else None)


def _kind(program: type[Program[Any]], adapted: bool) -> str:
    return adapted_kind(program.kind) if adapted else program.kind


def _joined(shards: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The arrays of all shards, one after the other."""
    return shards[0] if len(shards) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *shards)
