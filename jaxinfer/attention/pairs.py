"""The work of the kernel for TPUs (`paged_kernel.py`), and how often its loops run for it: what a profile goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Cut(NamedTuple):
    """What a call of the kernel is cut into.

    size: tokens of a block of queries; 1: it is of rows that decode, and else of all others.
    steps: most pairs, which the grid has.
    keys: of a block.
    page_size, page_bytes: of a page.
    blanked: of how many keys those that no query sees are blanked at a time; 0: they are not.
    window: see AttentionSpec; 0: there is none.
    """

    size: int
    steps: int
    keys: int
    page_size: int
    page_bytes: int
    blanked: int
    window: int

    @property
    def metadata(self) -> dict[str, str]:
        """What a compiled kernel says of itself."""
        return {name: str(number) for name, number in self._asdict().items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Cut:
        return cls(**{name: int(metadata[name]) for name in cls._fields})


class Pairs(NamedTuple):
    """Work: rows, and blocks of queries that they have tokens in.

    row, block: i32[N] of each pair; beyond the last one, its.
    begin, end: i32[N], of the blocks of keys that the queries see; done: how many those of the pairs before have.
    size: i32[1], how many pairs there are.
    """

    row: jax.Array
    block: jax.Array
    begin: jax.Array
    end: jax.Array
    done: jax.Array
    size: jax.Array


class Span(NamedTuple):
    """Of a pair, or of several.

    first, last: token (exclusive).
    shift: what makes positions of tokens.
    lowest, highest: position (exclusive) that some of the tokens see.
    """

    first: Any
    last: Any
    shift: Any
    lowest: Any
    highest: Any

    @classmethod
    def of(cls, row: Any, block: Any, starts: Any, lengths: Any, cut: Cut) -> Span:
        """starts: i32[R+1], of rows in the stream; lengths: i32[R], of their keys. Arrays, or a kernel's references."""
        first = jnp.maximum(starts[row], block * cut.size)
        last = jnp.minimum(starts[row + 1], (block + 1) * cut.size)
        shift = lengths[row] - starts[row + 1]
        lowest = jnp.maximum(first + shift - cut.window + 1, 0) if cut.window else jnp.zeros_like(first)
        return cls(first, last, shift, lowest, last + shift)


def pairs_of(starts: jax.Array, lengths: jax.Array, wanted: jax.Array, blocks: int, cut: Cut) -> Pairs:
    """Of the wanted rows. blocks: of queries."""
    stops = starts[1:]
    first = starts[:-1] // cut.size
    counts = jnp.where(wanted & (stops > starts[:-1]), (stops - 1) // cut.size - first + 1, 0)
    ends = jnp.cumsum(counts)
    number, total = jnp.arange(cut.steps, dtype=jnp.int32), ends[-1]
    here = jnp.maximum(jnp.minimum(number, total - 1), 0)
    row = jnp.minimum(jnp.sum(here[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), counts.shape[0] - 1)
    block = jnp.clip(first[row] + here - (ends - counts)[row], 0, blocks - 1)
    span = Span.of(row, block, starts, lengths, cut)
    begin = span.lowest // cut.keys
    end = jnp.where(number < total, (span.highest + cut.keys - 1) // cut.keys, begin)
    steps = end - begin
    return Pairs(row, block, begin, end, jnp.cumsum(steps) - steps, total[None])


class Work(NamedTuple):
    """Of a call.

    loops: of each loop, in the order in which the code has them, how deep it is and how often it runs in all.
    read: bytes of keys and values.
    """

    loops: tuple[tuple[int, int], ...]
    read: int


def work_of(metadata: Mapping[str, str], tokens: Sequence[int], lengths: Sequence[int]) -> Work:
    """Of a compiled kernel, for rows with so many tokens in the stream, and then so many keys."""
    cut = Cut.of(metadata)
    starts, kept = (jnp.asarray(x, jnp.int32) for x in (np.cumsum([0, *tokens]), lengths))
    wanted = (np.asarray(tokens) == 1) == (cut.size == 1)
    pairs = pairs_of(starts, kept, jnp.asarray(wanted), -(-sum(tokens) // cut.size), cut)
    span = Span.of(pairs.row, pairs.block, starts, kept, cut)
    count = int(pairs.size[0])
    begin, end, lowest, highest = (np.asarray(x)[:count] for x in (pairs.begin, pairs.end, span.lowest, span.highest))
    pages = -(-highest // cut.page_size) - lowest // cut.page_size
    brought, blocks = int(pages.sum()), int((end - begin).sum())
    # Those that are copied before the first block: of the others, the block before has the copies begun.
    early = (
        min(int(pages[0]), int(begin[0] + 1) * cut.keys // cut.page_size - int(lowest[0]) // cut.page_size)
        if count
        else 0
    )
    # Steps of the grid that have no pair do next to nothing.
    loops = [(1, count), (2, early), (2, blocks), (3, brought - early), (3, brought)]
    if cut.blanked:
        before = np.maximum(-(-lowest // cut.blanked) - begin * cut.keys // cut.blanked, 0)
        loops.append((3, int((before + end * cut.keys // cut.blanked - highest // cut.blanked).sum())))
    return Work(tuple(loops), brought * cut.page_bytes)
