"""Which layers share a page table, and which share arrays."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Kept = tuple[int | None, int | None]  # a layer's window and chunk


@dataclass(frozen=True)
class CacheGroup:
    """Layers that keep the same of a sequence, and so have one page table, or its slot.

    layers: their places in the model.
    arrays: of each, which of the cache's it has.
    pool: whose pages its table has, by number; None: it has slots.
    window: how many tokens it keeps; None: all.
    chunk: it keeps those of the last chunk of so many; None: all.
    """

    layers: tuple[int, ...]
    arrays: tuple[int, ...]
    pool: int | None
    window: int | None
    chunk: int | None = None

    @property
    def forgets(self) -> bool:
        """Whether it gives pages back while its sequence goes on."""
        return self.window is not None or self.chunk is not None

    def first_page(self, position: int, page_size: int) -> int:
        """The first page that a token at this position, or one after it, can see into."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk // page_size
        return 0 if self.window is None else max(0, position - self.window + 1) // page_size

    def room(self, position: int) -> int:
        """Most tokens from this position on that one call may write: what they see begins at one page."""
        return sys.maxsize if self.chunk is None else self.chunk - position % self.chunk

    def most_pages(self, tokens: int, page_size: int, reach: int) -> int:
        """That a sequence of so many tokens holds at once. reach: most tokens of it that a call writes."""
        whole = -(-tokens // page_size)
        if self.chunk is not None:
            return min(whole, -(-self.chunk // page_size))
        return whole if self.window is None else min(whole, _touched(self.window - 1 + reach, page_size))


@dataclass(frozen=True)
class Pool:
    """Arrays of one shape, each of as many pages, in which one allocator hands them out. A page belongs to one group,
    k-th layers of which use the k-th array.

    layer: one that has such.
    size: how many arrays.
    """

    layer: int
    size: int


def group_layers(
    kinds: Sequence[tuple[Hashable, Kept, bool] | None],
) -> tuple[tuple[CacheGroup, ...], tuple[Pool, ...]]:
    """Groups, and the pools that they share. kinds: of each layer its geometry, window and chunk, and whether it is
    paged; None: it keeps nothing.

    Layers of one geometry that keep different ones are cut into groups of one size, that of the smallest kind, so
    that any page can serve any of them and nothing is divided ahead. Where that does not divide another kind, its last
    group leaves arrays of its pages unused. Source: vLLM's hybrid KV cache manager (its `kv_cache_utils.py`).
    """
    groups: list[CacheGroup] = []
    pools: list[Pool] = []
    arrays = 0
    by_geometry: dict[tuple[bool, Hashable], dict[Kept, list[int]]] = {}
    for layer, kind in enumerate(kinds):
        if kind is not None:
            geometry, kept, paged = kind
            by_geometry.setdefault((not paged, geometry), {}).setdefault(kept, []).append(layer)
    for (slots, _), by_kept in sorted(by_geometry.items(), key=lambda item: item[0][0]):
        size = min(map(len, by_kept.values()))
        for kept, layers in by_kept.items():
            for start in range(0, len(layers), size):
                own = tuple(layers[start : start + size])
                used = tuple(range(arrays, arrays + len(own)))
                groups.append(CacheGroup(own, used, None if slots else len(pools), *kept))
        if not slots:
            pools.append(Pool(next(iter(by_kept.values()))[0], size))
        arrays += size
    return tuple(groups), tuple(pools)


def _touched(tokens: int, page_size: int) -> int:
    """Most pages that so many tokens in a row lie in, wherever they begin."""
    return (tokens + page_size - 2) // page_size + 1
