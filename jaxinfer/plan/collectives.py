"""What a compiled program sends between chips, read out of its text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\((.*)")
CHAIN = re.compile(r'chain_id="(\d+)"')
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collectives:
    """Those of a kind. One in a loop counts once.

    count: how many.
    bytes: of their results, on each chip.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collectives]:
    """By kind, those that there are."""
    totals: dict[str, Collectives] = {}
    chains: set[tuple[str, str]] = set()
    for shape, kind, start, rest in OPERATION.findall(text):
        if chain := CHAIN.search(rest):  # one that runs beside several others is written down with each
            if (kind, chain[1]) in chains:
                continue
            chains.add((kind, chain[1]))
        sizes = [_bytes(*array) for array in ARRAY.findall(shape)]
        # What begins one of these has its operand in its result too.
        size = max(sizes) if start and kind in ("all-gather", "collective-permute") else sum(sizes)
        before = totals.get(kind, Collectives(0, 0))
        totals[kind] = Collectives(before.count + 1, before.bytes + size)
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _bytes(kind: str, bits: str, shape: str) -> int:
    """Of bf16[64,4096]."""
    count = math.prod(int(n) for n in shape.split(",") if n)
    return -(-count * int(bits or 8) // 8)
