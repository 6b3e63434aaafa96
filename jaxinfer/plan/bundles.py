"""What libtpu writes down of the code that it makes: the VLIW bundles of each fusion and kernel.

A bundle is what the core's units start in a cycle; each unit has slots in it. Files have names as
`1796059-fusion.7-02-final_bundles.txt`: of fusions that are the same, the compiler makes and writes one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Those that decide how fast a bundle's units are at best; and what they are called in tables.
UNITS = {
    "MXU": "matrix",
    "XLU": "transposes",
    "VALU": "vector",
    "EUP": "functions",
    "VLOAD": "loads",
    "VSTORE": "stores",
    "SALU": "scalar",
}
BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +((?:[A-Z]{2} ?)*): (>*) *(.*)$", re.MULTILINE)
BODY, BRANCH = "LB", "sbr.rel"  # where a loop's body begins, and the instruction with which it ends
DELAY = 4  # bundles behind a branch that run before it takes place
SAME = re.compile(r"^key:(.+)\nordinal:.*\nequivalent_hlos\[.*\]:\n((?:  .+\n)*)", re.MULTILINE)
FILE = re.compile(r"\d+-(.+)-\d+-final_(bundles|hlo-static-per-bundle-utilization)\.txt")


@dataclass(frozen=True)
class Code:
    """Of a fusion or a kernel.

    depths: how many bundles are in no loop, in one, in one within another, ...
    slots: of each unit's slots in the bundles of the innermost loop (of all where there is none), what share is used.
    grid: how often a kernel's outermost loop runs; None where nothing says so.
    loops: of each loop, in the order of the code, how deep it is and how many bundles are in it and in none within it.
    """

    depths: tuple[int, ...]
    slots: Mapping[str, float]
    grid: int | None = None
    loops: tuple[tuple[int, int], ...] = ()

    @property
    def bundles(self) -> int:
        return sum(self.depths)

    def run(self, iterations: int) -> int:
        """How many run at least, if the outermost loop has so many iterations: all of it, with loops within it once."""
        return self.depths[0] + iterations * sum(self.depths[1:])

    def runs(self, said: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
        """Of each loop its depth, its bundles and how often it runs in all, if loops of these depths run so often. One
        that the compiler has made within these counts once. None of them if the code has others."""
        left, found = [*said], list[tuple[int, int, int]]()
        own = 0  # depth of the last one that is said
        for depth, bundles in self.loops:
            if left and left[0][0] == depth:
                own, times = left.pop(0)
            elif depth > own > 0:
                times = found[-1][2]
            else:
                return ()
            found.append((depth, bundles, times))
        return () if left else tuple(found)

    def run_as(self, runs: Sequence[tuple[int, int, int]]) -> int:
        """How many run then."""
        return self.depths[0] + sum(bundles * times for _, bundles, times in runs)


def read_bundles(folder: Path) -> dict[str, Code]:
    """What was written there, by the names of HLO instructions."""
    texts: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*-final_*.txt")):
        if match := FILE.fullmatch(path.name):
            texts.setdefault(match[1], {})[match[2]] = path.read_text()
    grids = _grids(folder)
    codes = {
        name: read_code(own["bundles"], own.get("hlo-static-per-bundle-utilization", ""), grids.get(stem(name)))
        for name, own in texts.items()
        if "bundles" in own
    }
    for path in folder.glob("*-deduplication-map.txt"):
        for first, others in SAME.findall(path.read_text()):
            codes |= {other: codes[first] for other in others.split() if first in codes}
    return codes


def read_code(bundles: str, utilization: str = "", grid: int | None = None) -> Code:
    """From the text of both files."""
    found = BUNDLE.findall(bundles)
    depths = _depths(found)
    loops = _loops([labels.split() for labels, *_ in found], depths)
    deepest = max(depths, default=0)
    counts = [depths.count(depth) for depth in range(deepest + 1)]
    rows = [line.split() for line in utilization.splitlines() if re.fullmatch(r"[\d ]+", line) and line.strip()]
    names = re.search(r"^(\w+(?:, [\w:]+)+)$", utilization, re.MULTILINE)
    slots: dict[str, float] = {}
    if names is not None and len(rows) == len(depths) + 1:  # the first are how many slots there are
        there, inner = rows[0], [row for row, depth in zip(rows[1:], depths, strict=True) if depth == deepest]
        for i, name in enumerate(names[1].split(", ")):
            if name in UNITS and int(there[i]):
                slots[name] = sum(int(row[i]) for row in inner) / (int(there[i]) * len(inner))
    return Code(tuple(counts), slots, grid, loops)


def _depths(bundles: list[tuple[str, str, str]]) -> list[int]:
    """In how many loops each is, by its labels, marks and text. One in which nothing starts is written without marks,
    and the branch that ends a loop with one too few; behind it are more of the loop's."""
    depths: list[int] = []
    before, left = 0, 0
    for labels, marks, text in bundles:
        if left and not labels:
            left -= 1
        elif len(marks) < before and BRANCH in text and not labels:
            left = DELAY
        elif not text.startswith("{}"):
            before, left = len(marks), 0
        depths.append(before)
    return depths


def _loops(labels: list[list[str]], depths: list[int]) -> tuple[tuple[int, int], ...]:
    """By each bundle's labels, and in how many loops it is."""
    loops: list[list[int]] = []
    inside: list[int] = []  # of those that a bundle is in
    for own, depth in zip(labels, depths, strict=True):
        if BODY in own or depth > len(inside):
            inside[depth - 1 :] = [len(loops)]
            loops.append([depth, 0])
        del inside[depth:]
        if depth:
            loops[inside[-1]][1] += 1
    return tuple((depth, count) for depth, count in loops)


def stem(name: str) -> str:
    """Of a kernel, whose instructions are numbered."""
    return re.sub(r"\.\d+$", "", name)


def _grids(folder: Path) -> dict[str, int | None]:
    """How often each kernel's outermost loop runs, by the name of its function; None where several have the name."""
    grids: dict[str, int | None] = {}
    for path in folder.glob("mosaic/*-original.txt"):
        text = path.read_text()
        name = re.search(r"func\.func @(\w+)\(", text)
        bounds = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", text)
        if name is not None:
            grid = math.prod(int(n) for n in bounds[1].split(",")) if bounds else 1
            grids[name[1]] = grid if grids.get(name[1], grid) == grid else None
    return grids
