"""The text of a compiled TPU program: its scheduled instructions, and what these say of themselves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

ARRAY = re.compile(r"\b(pred|token|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^{}]*\})?")
START = re.compile(r"\s*(ROOT )?%(\S+) = ")
HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
NAME = re.compile(r"%([\w.\-<>]+)")
METADATA = re.compile(r"kernel_metadata=(\{[^}]*\})")
VIEWS = ("bitcast", "reshape")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # what changes an array in place, and which operand is new


@dataclass(frozen=True)
class Array:
    """bytes: without the layout's padding. dims: its shape. in_memory: it is in HBM, in no memory of the core's own."""

    bytes: int
    dims: tuple[int, ...]
    in_memory: bool


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    name, opcode: as they are there.
    shape: of the result, as text.
    operands: names of instructions of the same computation.
    rest: what follows the operands: attributes, metadata, the backend's configuration.
    inner: what is between the operands' parentheses.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    inner: str

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Of the result."""
        return tuple(_array(*match) for match in ARRAY.findall(self.shape))

    def said(self, pattern: str) -> str | None:
        """What the pattern's group is in the rest."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    def number(self, pattern: str) -> int | None:
        found = self.said(pattern)
        return None if found is None else int(found)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it has none."""
        return self.number(r'"estimated_cycles":"(\d+)"')

    @property
    def iterations(self) -> int:
        """How often a fusion's own loop over its window runs."""
        bounds = self.said(r'"iteration_bounds":\[([^\]]+)\]') or ""
        return math.prod(int(n) for n in re.findall(r"\d+", bounds))

    @property
    def op_name(self) -> str:
        """The path of names that JAX gave it."""
        return (self.said(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace("\\'", "'")

    @property
    def frame(self) -> int | None:
        """Its line in the table of stack frames."""
        return self.number(r"stack_frame_id=(\d+)")

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.said(r'custom_call_target="([^"]*)"') or ""

    @property
    def kernel_metadata(self) -> dict[str, str]:
        """What a kernel says of itself."""
        found = METADATA.search(self.rest)
        return json.loads(found[1]) if found else {}

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler says it. See `Module.trips`."""
        return self.number(r'"known_trip_count":\{"n":"(\d+)"')

    @property
    def index(self) -> int:
        """Of the element that is taken out of a tuple, or of a parameter."""
        found = self.number(r"\bindex=(\d+)") if self.opcode == "get-tuple-element" else None
        return int(self.inner) if found is None else found

    @property
    def aliases(self) -> dict[int, int]:
        """Results that are operands, changed in place: by the result's index the operand's."""
        pairs = re.findall(r"\{(\d*)\}: \((\d+), ", self.rest.partition("output_to_operand_aliasing=")[2])
        found = {int(result or 0): int(operand) for result, operand in pairs}
        lists = self.rest.partition('"aliasing_operands":')[2]
        for indices in re.findall(r'"indices":\[([\d",]+)\]', lists):  # operands, and behind the last of them results
            operand, *results = sorted(int(n) for n in re.findall(r"\d+", indices))
            found |= {result - len(self.operands): operand for result in results if result >= len(self.operands)}
        return found

    def called(self, attribute: str) -> tuple[str, ...]:
        """Names of computations: of `calls`, `body`, `branch_computations` and the like."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%\S+?)(?:,|$| ))", self.rest)
        return tuple(NAME.findall(found[1] or found[2])) if found else ()


@dataclass(frozen=True)
class Computation:
    """Its instructions by name, in the order in which they run; `root` is the result's name."""

    instructions: Mapping[str, Instruction]
    root: str

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Those that take each, by its name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def constant(self, name: str) -> int | None:
        """The integer that this is, or is a copy of; None if it is none."""
        own = self[name]
        while own.opcode in ("copy", "bitcast"):
            own = self[own.operands[0]]
        return int(own.inner) if own.opcode == "constant" and re.fullmatch(r"-?\d+", own.inner) else None

    def read(self, own: Instruction, operand: str) -> int:
        """Bytes that one of its instructions, no fusion, reads of an operand: of what it slices or gathers from only
        those, and of what it changes in place none."""
        whole = sum(array.bytes for array in self[operand].arrays)
        if own.operands[0] != operand:
            return whole
        if own.opcode in ("dynamic-slice", "slice", "gather"):
            return min(whole, sum(array.bytes for array in own.arrays))
        return 0 if own.opcode in UPDATES else whole

    def written(self, own: Instruction) -> int:
        """Bytes of its result that are new."""
        changed = UPDATES.get(own.opcode)
        return sum(array.bytes for array in (own if changed is None else self[own.operands[changed]]).arrays)

    def read_as_fusion(self, index: int) -> int:
        """Bytes that all of it reads of an operand."""
        return sum(self._read(own) for own in self if own.opcode == "parameter" and own.index == index)

    def _read(self, taken: Instruction) -> int:
        whole, parts = sum(array.bytes for array in taken.arrays), 0
        for user in self.users.get(taken.name, []):
            parts += self._read(user) if user.opcode in VIEWS else self.read(user, taken.name)
        return min(whole, parts)

    @cached_property
    def written_as_fusion(self) -> tuple[int, ...]:
        """New bytes of each of its results."""
        root = self[self.root]
        results = [self[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return tuple(self._written(result) for result in results)

    def _written(self, result: Instruction) -> int:
        while result.opcode in VIEWS:
            result = self[result.operands[0]]
        return self.written(result)


@dataclass(frozen=True)
class Module:
    """A program.

    computations: by name.
    entry: the name of the one that runs.
    files: of the source, for each stack frame, the innermost first.
    """

    computations: Mapping[str, Computation]
    entry: str
    files: Mapping[int, tuple[str, ...]]

    def trips(self, outer: Computation, loop: Instruction) -> int | None:
        """How often a loop of a computation runs, which the compiler does not say of those that it makes of a product
        and its collective: from what its counter begins with, what is added, and what it stays below. None: it has
        no such counter."""
        if (said := loop.trips) is not None:
            return said
        condition, body = (self.computations[loop.called(name)[0]] for name in ("condition", "body"))
        test, initial = condition[condition.root], outer[loop.operands[0]]
        if test.opcode != "compare" or "direction=LT" not in test.rest or initial.opcode != "tuple":
            return None
        counter, end = condition[test.operands[0]], condition.constant(test.operands[1])
        if counter.opcode != "get-tuple-element":
            return None
        after, start = body[body[body.root].operands[counter.index]], outer.constant(initial.operands[counter.index])
        steps = [body.constant(name) for name in after.operands] if after.opcode == "add" else []
        added = [step for step in steps if step is not None]
        if start is None or end is None or len(added) != 1:
            return None
        return max(-(-(end - start) // added[0]), 0)


def parse(text: str) -> Module:
    """A compiled program's text."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    # A kernel's metadata are printed a line each.
    for line in METADATA.sub(lambda found: found[0].replace("\n", ""), text).splitlines():
        if header := HEADER.match(line):
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line == "}":
            computations[name] = Computation(instructions, root)
        elif start := START.match(line):
            instruction = _instruction(start[2], line[start.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root
    return Module(computations, entry, _files(text[: text.find("\n%")]))


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inner = text[opening + 1 : closing]
    shape, opcode = text[:end], text[end:opening].strip()
    return Instruction(name, opcode, shape, tuple(NAME.findall(inner)), text[closing + 1 :], inner)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis of a compiled program is not closed: {text[:80]}")


def _array(kind: str, bits: str, dims: str, layout: str) -> Array:
    shape = tuple(int(n) for n in dims.split(",") if n)
    size = 0 if kind == "token" else -(-math.prod(shape) * int(bits or 8) // 8)
    return Array(size, shape, "S(" not in layout)


def _files(text: str) -> dict[int, tuple[str, ...]]:
    def table(name: str, line: str) -> dict[int, list[str]]:
        part = re.search(rf"^{name}\n((?:\d+ .*\n?)*)", text, re.MULTILINE)
        return {int(own): rest for own, *rest in re.findall(line, part[1], re.MULTILINE)} if part else {}

    names = table("FileNames", r'^(\d+) "(.*)"$')
    locations = table("FileLocations", r"^(\d+) \{file_name_id=(\d+)")
    # A frame's parent is the one before the number that it says; the outermost says its own.
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    files: dict[int, tuple[str, ...]] = {}
    for own, (location, parent) in sorted(frames.items()):
        before = files.get(int(parent or 0) - 1, ())
        files[own] = (names[int(locations[int(location)][0])][0], *before)
    return files
