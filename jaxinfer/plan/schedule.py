"""What a compiled TPU program takes by the compiler's own estimates: its schedule, run through in order.

An operation takes the cycles that the compiler estimates (the bundles that it has made, where it estimates none), or as
long as the memory takes for what it reads and writes there, if that is more. Copies that were begun before run beside
it at what the memory has left, one after the other; where the schedule waits for one, so does this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.plan.bundles import UNITS, Code, stem
from jaxinfer.plan.collectives import KINDS
from jaxinfer.plan.hlo import Computation, Instruction, Module
from jaxinfer.plan.slices import Chip

FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
PASSING = ("bitcast", "copy", "reshape", "transpose", "convert", "optimization-barrier", "while")
ASYNC = "-start", "-done", "-update"
KERNEL = "tpu_custom_call"
PARTS = "ConcatBitcast"  # of an array that is copied in several; they lie one behind the other
NEIGHBOURS = 4  # of a chip in a torus of two dimensions; those in three have slower links, and more of them
BUSY = 1 / 3  # of a unit's slots: below that, no unit binds, but that each bundle waits for others
# What is not known.
LOOPS = "how often inner loops run: those that the compiler does not know count once"
BRANCHES = "which branches are taken: the ones that take least count, so sampling is greedy"
COLLECTIVES = "when collectives begin: they take what their bytes take on the links, and no more"
KERNELS = (
    "of a kernel that does not say it, how often its inner loops run and what it reads: it takes its bundles with each "
    "loop once, or if that is more what all of its weights take, or what the bound says of keys and values"
)
CONDITIONS = "whether a kernel's conditions hold: it takes its bundles as if each did"
WEIGHT, CACHE = re.compile(r"params\['(.+?)'\]"), "state.cache"


@dataclass
class Op:
    """All that is done in a step for one thing: with a weight, or in a part of the source.

    name: see `name_of`.
    count, cycles: instructions that take time, and the compiler's estimate of them.
    unknown: how many of them it has none for.
    seconds: that they take.
    waited: seconds in which nothing runs, until their operands are there.
    read, written: bytes of memory. prefetched: those of `read` that copies bring, beside what runs before.
    sent: bytes over the links, for collectives.
    run: bundles that run at least.
    kernel: they are kernels.
    codes: of each instruction, and the seconds that it takes.
    loops: of each kernel its loops, if it says how often they run: see `Code.runs`.
    """

    name: str
    count: int = 0
    cycles: int = 0
    unknown: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    read: int = 0
    written: int = 0
    prefetched: int = 0
    sent: int = 0
    run: int = 0
    kernel: bool = False
    codes: dict[str, tuple[Code, float]] = field(default_factory=dict)
    loops: dict[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)

    def add(
        self,
        times: int,
        *,
        count: int = 1,
        cycles: int | None = None,
        seconds: float = 0.0,
        read: int = 0,
        written: int = 0,
        prefetched: int = 0,
        sent: int = 0,
        run: int = 0,
    ) -> None:
        """What an instruction takes that runs so many times."""
        self.count += times * count
        self.cycles += times * (cycles or 0)
        self.unknown += times * count * (cycles is None)
        self.seconds += times * seconds
        self.read += times * read
        self.written += times * written
        self.prefetched += times * prefetched
        self.sent += times * sent
        self.run += times * run

    @property
    def bundles(self) -> int:
        """Of the code, each once."""
        return sum({id(code): code.bundles for code, _ in self.codes.values()}.values())

    @property
    def fullest(self) -> tuple[str, float]:
        """The unit that has most of its slots in use where most of the time is spent, and what share of them."""
        code = max(self.codes.values(), key=lambda entry: entry[1], default=(None, 0.0))[0]
        slots = code.slots if code is not None else {}
        unit = max(slots, key=lambda name: slots[name], default="")
        return (unit, slots[unit]) if unit else ("", 0.0)

    def binds(self, chip: Chip) -> str:
        """The memory, if that takes longer than all of the bundles; else the unit that is fullest."""
        if self.sent:
            return "links"
        moving, seconds = (self.read + self.written) / chip.bandwidth, self.run / chip.clock or self.seconds
        if moving >= max(seconds * 0.99, 1e-12):
            return "memory"
        unit, share = self.fullest
        return UNITS[unit] if share >= BUSY else ("latency" if unit else "unknown")


class Least(NamedTuple):
    """What a kernel that reads the cache takes at least.

    seconds: of time.
    read: bytes of keys and values.
    loops: of each of its loops, in the order of the code, how deep it is and how often it runs in all; none where it
        does not say it.
    """

    seconds: float = 0.0
    read: float = 0.0
    loops: tuple[tuple[int, int], ...] = ()


class Queue:
    """What runs beside the rest, one after the other, at `rate` bytes/s."""

    def __init__(self, rate: float):
        self.rate, self.issued, self.served = rate, 0.0, 0.0

    def add(self, size: float) -> float:
        """What `wait` takes for it."""
        self.issued += size
        return self.issued

    def run(self, seconds: float, taken: float = 0.0) -> None:
        """So long, in which others take so many bytes."""
        self.served = min(self.issued, self.served + max(seconds * self.rate - taken, 0))

    def wait(self, mark: float) -> float:
        """Seconds until it is through."""
        return max(mark - self.served, 0) / self.rate


@dataclass(frozen=True)
class Scope:
    """A computation, and where it was called: the caller's scope, and the name of what it got there."""

    computation: Computation
    caller: Scope | None = None
    argument: tuple[str, ...] = ()


class Schedule:
    """A program that is run through.

    module, chip: what runs, and where.
    codes: of its instructions, where the compiler wrote them down.
    by_bundles: operations take the bundles that run at least, and not the cycles that the compiler estimates.
    kernel: what one takes at least that reads the cache.

    ops: by name. seconds: of all. notes: what was not known, each once.
    """

    def __init__(
        self,
        module: Module,
        chip: Chip,
        codes: Mapping[str, Code],
        by_bundles: bool = False,
        kernel: Callable[[Instruction], Least] = lambda _: Least(),
    ):
        self.module, self.chip, self.codes, self.by_bundles, self.kernel = module, chip, codes, by_bundles, kernel
        self.ops: dict[str, Op] = {}
        self.notes: dict[str, None] = {}
        self.seconds = 0.0
        self.memory, self.links = Queue(chip.bandwidth), Queue(chip.link)
        self.neighbours: dict[str, Queue] = {}  # of permutations, by who sends to whom
        self.marks: dict[str, tuple[Queue, float, Op]] = {}

    @property
    def entry(self) -> Scope:
        return Scope(self.module.computations[self.module.entry])

    def inner(self, scope: Scope, name: str, *argument: str) -> Scope:
        """Of a computation that is called there with these operands."""
        return Scope(self.module.computations[name], scope, argument)

    def run(self, scope: Scope, times: int = 1, skipped: str = "") -> None:
        """All of a computation but what is skipped, in its order. times: how often it happens in all."""
        for own in scope.computation:
            if own.opcode in FREE or own.target == PARTS or own.name == skipped:
                continue
            if own.opcode == "while":
                trips = self.module.trips(scope.computation, own)
                if trips is None:
                    self.notes[LOOPS] = None
                start = self.seconds
                for attribute in ("condition", "body"):
                    name = own.called(attribute)[0]
                    self.run(self.inner(scope, name, own.operands[0]), times * (trips or 1))
                self.seconds += ((trips or 1) - 1) * (self.seconds - start)
            elif own.opcode == "conditional":
                self._branch(scope, own, times)
            elif own.opcode == "call":
                self.run(self.inner(scope, own.called("to_apply")[0], *own.operands), times)
            elif own.opcode.endswith("-start"):
                self._begin(scope, own, times)
            elif own.opcode.endswith(("-done", "-update")):
                self._end(own, times)
            else:
                self._operation(scope, own, times)

    def _branch(self, scope: Scope, own: Instruction, times: int) -> None:
        """The one that takes least: that of greedy sampling, where others have more to do."""
        names = own.called("branch_computations") or own.called("true_computation") + own.called("false_computation")
        branches = []
        for operand, name in zip(own.operands[1:], names, strict=True):
            alone = Schedule(self.module, self.chip, self.codes, self.by_bundles, self.kernel)
            inner = self.inner(scope, name, operand)
            alone.run(inner)
            branches.append((alone.seconds, inner))
        least = min(branches, key=lambda branch: branch[0])
        most = max(seconds for seconds, _ in branches) - least[0]
        if most > 1e-6:
            self.notes[BRANCHES] = None
        self.run(least[1], times)

    def _begin(self, scope: Scope, own: Instruction, times: int) -> None:
        """A copy, or a collective, that runs beside what follows."""
        kind, called = own.opcode.removesuffix("-start"), own.called("calls")
        if called:
            inside = self.module.computations[called[0]]
            kind = inside[inside.root].opcode
        arrays = [array for array in own.arrays if array.dims]
        if kind in KINDS:
            op, sent = self._op(kind), _sent(kind, max(array.bytes for array in arrays))
            op.add(times, sent=sent)
            self.notes[COLLECTIVES] = None
            queue = self._links(own)
            self.marks[own.name] = queue, queue.add(sent), op
            return
        op, size = self._op(self.name_of(scope, own)), min((array.bytes for array in arrays), default=0)
        from_memory = any(array.in_memory for array in scope.computation[own.operands[0]].arrays)
        to_memory = sum(array.in_memory for array in arrays) > from_memory
        read, written = size * from_memory, size * to_memory
        op.add(times, count=0, read=read, written=written, prefetched=read)
        self.marks[own.name] = self.memory, self.memory.add(read + written), op

    def _end(self, own: Instruction, times: int) -> None:
        """What was begun is waited for. What a step before this one has begun is there."""
        if own.operands[0] not in self.marks:
            return
        queue, mark, op = self.marks[own.name] = self.marks[own.operands[0]]
        if own.opcode.endswith("-done"):
            seconds = queue.wait(mark)
            op.waited += times * seconds
            self._pass(seconds)

    def _pass(self, seconds: float, moved: float = 0.0) -> None:
        """Time passes, in which others than copies move so many bytes."""
        self.seconds += seconds
        self.memory.run(seconds, moved)
        for links in (self.links, *self.neighbours.values()):
            links.run(seconds)

    def _links(self, own: Instruction) -> Queue:
        """All of a chip's; of a permutation the one to a neighbour, beside others to another."""
        pairs = own.said(r"source_target_pairs=(\{\S*\})")
        if pairs is None:
            return self.links
        return self.neighbours.setdefault(pairs, Queue(self.chip.link / NEIGHBOURS))

    def _operation(self, scope: Scope, own: Instruction, times: int) -> None:
        code, run = self.codes.get(own.name), 0
        if code is not None:
            run = code.run(code.grid or own.iterations)
        least = self.kernel(own) if own.target == KERNEL and self.reads_cache(scope, own) else Least()
        loops = code.runs(least.loops) if code is not None else ()
        if code is not None and loops:
            run = code.run_as(loops)
        if kind := self._collective(own):
            op, read, written = self._op(kind), 0, 0
            sides = own.operands if kind == "reduce-scatter" else (own.name,)  # the whole of what is sent
            sent = _sent(kind, sum(array.bytes for name in sides for array in scope.computation[name].arrays))
            seconds = sent / self._links(own).rate
            self.notes[COLLECTIVES] = None
        else:
            op, sent = self._op(self.name_of(scope, own)), 0
            read, written = self.moved(scope, own)
            by_code = own.cycles is None or (self.by_bundles and code is not None)
            seconds = max((run if by_code else own.cycles or 0) / self.chip.clock, least.seconds)
            read += int(least.read)
            if own.target == KERNEL:
                op.kernel = True
                self.notes[CONDITIONS if loops else KERNELS] = None
                op.loops[own.name] = loops
            seconds = max(seconds, (read + written) / self.chip.bandwidth)
        op.add(times, cycles=own.cycles, seconds=seconds, read=read, written=written, sent=sent, run=run)
        if code is not None:
            op.codes[own.name] = code, times * seconds
        self._pass(seconds, read + written)

    def _collective(self, own: Instruction) -> str:
        """Its kind; "" of what is none. Of a fusion that sums over chips, and keeps a part, it is a reduce-scatter."""
        inside = [self.module.computations[name] for name in own.called("calls")] if own.opcode == "fusion" else []
        if any(one.opcode in ("all-reduce", "reduce-scatter") for computation in inside for one in computation):
            return "reduce-scatter"
        return own.opcode if own.opcode in KINDS else ""

    def _op(self, name: str) -> Op:
        return self.ops.setdefault(name, Op(name))

    def moved(self, scope: Scope, own: Instruction) -> tuple[int, int]:
        """Bytes of memory that an operation reads, and writes; what a kernel does with the cache is not among them."""
        outer, called = scope.computation, own.called("calls")
        inside = self.module.computations[called[0]] if called else None
        read = written = 0
        for i, operand in enumerate(own.operands):
            in_memory = any(array.in_memory and array.dims for array in outer[operand].arrays)
            if outer[operand].opcode == "constant" or not in_memory or self._kept(scope, own, i):
                continue
            read += outer.read(own, operand) if inside is None else inside.read_as_fusion(i)
        new = (outer.written(own),) if inside is None else inside.written_as_fusion
        if len(new) != len(own.arrays):  # a sort, or the like, gives several
            new = tuple(array.bytes for array in own.arrays)
        for i, array in enumerate(own.arrays):
            kept = i in own.aliases and self._kept(scope, own, own.aliases[i])
            written += new[i] if array.in_memory and array.dims and not kept else 0
        return read, written

    def _kept(self, scope: Scope, own: Instruction, i: int) -> bool:
        """An operand is a kernel's, and the cache."""
        return own.target == KERNEL and self._is_cache(scope, own.operands[i])

    def _is_cache(self, scope: Scope, name: str) -> bool:
        argument = self.origin(scope, name)
        return argument is not None and argument.op_name.startswith(CACHE)

    def reads_cache(self, scope: Scope, own: Instruction) -> bool:
        return any(self._is_cache(scope, operand) for operand in own.operands)

    def name_of(self, scope: Scope, own: Instruction) -> str:
        """Of what an instruction is for: a kernel by its name, what has a matrix for an operand by that of the largest
        one, as `mlp.down_proj`; what has none by its part of the source."""
        if own.target == KERNEL:
            return stem(own.name)
        weights = []
        for operand in own.operands:
            argument = self.origin(scope, operand)
            found = None if argument is None else WEIGHT.search(argument.op_name)
            if argument is not None and found is not None and len(argument.arrays[0].dims) > 1:
                weights.append((sum(array.bytes for array in scope.computation[operand].arrays), found[1]))
        if weights:
            parts = [part for part in max(weights)[1].split(".") if not part.isdigit()]
            return ".".join([part for part in parts if part not in ("weight", "bias", "values", "scales")][-2:])
        files = self.module.files.get(own.frame or 0, ())
        for file in files:
            folder, _, module = file.rpartition("/jaxinfer/")[2].removesuffix(".py").partition("/")
            if "/jaxinfer/" in file and folder not in ("weights", "kernels"):
                return module.rpartition("/")[2] if folder == "layers" else folder
        return "copies" if own.opcode.startswith(("copy", "slice", "dynamic")) else "others"

    def origin(self, scope: Scope | None, name: str) -> Instruction | None:
        """The program's argument that this is, or is a copy or a part of; None if it is none."""
        path: list[int] = []
        while scope is not None:
            own = scope.computation.instructions.get(name)
            if own is None:
                return None
            if own.opcode == "parameter":
                if scope.caller is None:
                    return own
                name, scope = scope.argument[own.index], scope.caller
            elif own.opcode == "get-tuple-element":
                path.append(own.index)
                name = own.operands[0]
            elif own.opcode == "tuple" and path:
                name = own.operands[path.pop()]
            elif own.opcode in PASSING or own.opcode.endswith(ASYNC) or own.target == PARTS:
                name = own.operands[0]
            elif operand := self._changed(own, path):
                name = operand
            else:
                return None
        return None

    def _changed(self, own: Instruction, path: list[int]) -> str:
        """The operand that an instruction changes in place, if that is its result."""
        operand = own.aliases.get(path[-1] if path else 0)
        if operand is None:
            return ""
        if path:
            path.pop()
        return own.operands[operand]


def _sent(kind: str, size: int) -> int:
    """Bytes over a chip's links, for so many of a result, or of what is scattered: at most, of many chips."""
    return 2 * size if kind == "all-reduce" else size
