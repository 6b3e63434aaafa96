"""Which grammars' tables are on the devices: plain Python, tested without one.

A sequence that runs holds the blocks of its grammar's table, if there is room for it: otherwise it goes by masks. A
table that nobody holds stays where it is until its blocks are needed, those first that were used longest ago.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jaxinfer.engine.guided.tables import LOST, GrammarTable
from jaxinfer.engine.request import Request
from jaxinfer.sampling.table_sizes import BLOCK, BLOCKS, CLASSES
from jaxinfer.sampling.tables import TokenTables


class TableBlocks:
    """Blocks of one shard of rows.

    loads: how often a table was put on the devices.
    """

    def __init__(self) -> None:
        self.loads = 0
        self.reset()

    def reset(self) -> None:
        """Nothing is on the devices, and nobody runs."""
        self._tables: dict[GrammarTable, list[int]] = {}  # those used longest ago first
        self._users: Counter[GrammarTable] = Counter()
        self._free = list(range(BLOCKS))
        self._coming: list[tuple[GrammarTable, list[int]]] = []

    def hold(self, request: Request) -> None:
        """Gives a request that is about to run its grammar's blocks, if it can go by a table."""
        guide = request.guide
        follows = request.exclusions is not None and request.exclusions.follows
        if guide is None or guide.table is None or guide.state == LOST or follows:
            return
        blocks = self._tables.pop(guide.table, None)
        if blocks is None:
            if (blocks := self._taken(guide.table.blocks)) is None:
                return
            self._coming.append((guide.table, blocks))
        self._tables[guide.table] = blocks  # at the end: it is the one that was used last
        self._users[guide.table] += 1
        request.table = blocks

    def release(self, request: Request) -> None:
        """A request runs no longer."""
        if request.table is not None:
            assert request.guide is not None
            assert request.guide.table is not None
            self._users[request.guide.table] -= 1
            request.table = None

    def coming(self) -> Iterator[tuple[int, TokenTables]]:
        """What is to be put into blocks before the next call."""
        coming, self._coming = self._coming, []
        for table, blocks in coming:
            if self._tables.get(table) is blocks:
                self.loads += 1
                for i, block in enumerate(blocks):
                    yield block, _block(table, i, blocks)

    def _taken(self, count: int) -> list[int] | None:
        unused = [table for table in self._tables if not self._users[table]]
        if len(self._free) + sum(table.blocks for table in unused) < count:
            return None
        while len(self._free) < count:
            self._free += self._tables.pop(unused.pop(0))
        blocks, self._free = self._free[:count], self._free[count:]
        return blocks


def place_of(state: int, blocks: Sequence[int]) -> int:
    """Where a table's state is on the devices."""
    return blocks[state // BLOCK] * BLOCK + state % BLOCK


def _block(table: GrammarTable, number: int, blocks: Sequence[int]) -> TokenTables:
    """The values of one of a table's blocks."""
    part = slice(number * BLOCK, (number + 1) * BLOCK)
    size = len(table.ends[part])
    masks, next, ends = (
        np.zeros((BLOCK, *own), dtype)
        for own, dtype in (((table.masks.shape[1],), np.uint32), ((CLASSES,), np.uint16), ((), np.uint8))
    )
    masks[:size], ends[:size] = table.masks[part], table.ends[part]
    places = np.array([place_of(state, blocks) for state in range(len(table.ends))], np.uint16)
    next[:size, : table.next.shape[1]] = places[table.next[part]]
    return TokenTables(masks, table.classes, next, ends)
