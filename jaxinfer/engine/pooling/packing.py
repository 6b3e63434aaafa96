"""Texts into calls: sorted by their tokens, one after the other, so that few tokens of a call are padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.attention import ForwardBatch
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.pooling.programs import PoolingPrograms

FULL = 0.75  # a call that would have fewer of its tokens becomes several smaller ones


class Row(NamedTuple):
    """A text as a model gets it.

    place: in the input.
    ids: its tokens, at least one.
    type_ids: which part of a pair each is of; None: all are of the first.
    skip: how many of the first take no part in the pooling.
    """

    place: int
    ids: list[int]
    type_ids: list[int] | None = None
    skip: int = 0


@dataclass(frozen=True)
class Packed:
    """The texts of a call.

    size: its tokens, on each shard of rows.
    shards: the texts of each.
    """

    size: int
    shards: list[list[Row]]


def pack(rows: Sequence[Row], programs: PoolingPrograms, budget: int) -> Iterator[Packed]:
    """Calls of up to `budget` tokens a shard, or of a single text that has more."""
    sizes, shards = programs.sizes, programs.shards
    usual = tuple(size for size in sizes if size <= max(budget, sizes[0]))
    waiting = sorted(rows, key=lambda row: len(row.ids))  # the longest at the end
    left = sum(len(row.ids) for row in rows)
    while waiting:
        size = Buckets.fit(usual, min(-(-left // shards), usual[-1]))
        if left < FULL * size * shards and size > usual[0]:
            size = usual[usual.index(size) - 1]
        size = max(size, Buckets.fit(sizes, len(waiting[-1].ids)))
        taken: list[list[Row]] = [[] for _ in range(shards)]
        used = [0] * shards
        while waiting:
            shard = used.index(min(used))
            length = len(waiting[-1].ids)
            if used[shard] + length > size or len(taken[shard]) == programs.rows(size):
                break
            taken[shard].append(waiting.pop())
            used[shard] += length
        left -= sum(used)
        yield Packed(Buckets.fit(sizes, max(used)), taken)


def arrays(packed: Packed, rows: int) -> tuple[ForwardBatch, np.ndarray]:
    """What the program of its size takes, with so many rows a shard: the batch, and of each how many tokens are
    skipped."""
    shape = len(packed.shards), packed.size
    tokens, positions, types = (np.zeros(shape, np.int32) for _ in range(3))
    segments = np.full(shape, rows - 1, np.int32)
    ends, skips = np.zeros((len(packed.shards), rows + 1), np.int32), np.zeros((len(packed.shards), rows), np.int32)
    for shard, own in enumerate(packed.shards):
        end = 0
        for i, row in enumerate(own):
            start, end = end, end + len(row.ids)
            tokens[shard, start:end] = row.ids
            positions[shard, start:end] = np.arange(end - start)
            segments[shard, start:end] = i
            types[shard, start:end] = 0 if row.type_ids is None else row.type_ids
            ends[shard, i + 1] = end
            skips[shard, i] = row.skip
        ends[shard, len(own) + 1 :] = end
    batch = ForwardBatch(
        tokens=tokens.reshape(-1),  # type: ignore[arg-type]  # JAX takes NumPy's
        positions=positions.reshape(-1),  # type: ignore[arg-type]
        segment_ids=segments.reshape(-1),  # type: ignore[arg-type]
        cu_q_lens=ends.reshape(-1),  # type: ignore[arg-type]
        kv_lens=np.diff(ends, axis=1).reshape(-1),  # type: ignore[arg-type]
        tables=(),
        distribution=np.tile(np.array([0, rows, rows], np.int32), len(packed.shards)),  # type: ignore[arg-type]
        token_types=types.reshape(-1),  # type: ignore[arg-type]
    )
    return batch, skips.reshape(-1)


def spans(packed: Packed) -> Iterator[slice]:
    """Of each text, where its tokens are in the arrays."""
    for i, shard in enumerate(packed.shards):
        end = i * packed.size
        for row in shard:
            start, end = end, end + len(row.ids)
            yield slice(start, end)
