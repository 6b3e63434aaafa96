"""What programs take by the TPU compiler's own estimates, as numbers by name: what `jaxinfer plan --profile` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from jaxinfer.attention.pairs import work_of
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.programs import Decode, Forward, Key
from jaxinfer.plan.bundles import Code, stem
from jaxinfer.plan.dumped import dumped
from jaxinfer.plan.figures import step_bound
from jaxinfer.plan.fit import Fit
from jaxinfer.plan.hlo import Instruction, Module, parse
from jaxinfer.plan.roofline import Bound
from jaxinfer.plan.schedule import KERNEL, Least, Op, Schedule, Scope
from jaxinfer.plan.slices import Chip

# What says how often loops of a kernel run, from what the compiled one says of itself, and rows' tokens and lengths.
WORK = {"ragged_paged_attention": work_of}
Rows = Sequence[tuple[int, int]]  # tokens of each row in the step, and in the cache then


def check_profile(held: Fit, rows: list[int], tokens: list[int]) -> None:
    """Raises ValueError for what the engine would not run in one call."""
    if not held.target.compiles:
        raise ValueError(f"profile is of TPUs, and there is no compiler for {held.target.name}: leave it out")
    for wanted, most, name, limit in (
        (rows, held.max_num_seqs, "profile_rows", "max_num_seqs"),
        (tokens, held.max_num_batched_tokens, "profile_tokens", "max_num_batched_tokens"),
    ):
        for own in wanted:
            if own > most:
                raise ValueError(f"{name} is {own}: {limit} is {most}, so give at most that, or more to {limit}")


def profile(
    held: Fit,
    config: Mapping[str, Any],
    options: EngineConfig,
    context: int,
    rows: list[int],
    tokens: list[int],
    on_program: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Of decoding so many rows of `context` tokens each, and of pieces of prompts of so many tokens. Bytes and seconds
    are each device's. Raises ValueError: see `check_profile` and `dumped`."""
    programs = []
    for name, key, bound, fits, each in _steps(held, context, rows, tokens):
        on_program(name)
        made = dumped(config, held.target.name, options, key)
        figures = profiled(made.text, made.codes, key[0] == Decode.kind, bound, each)
        programs.append({"program": name, "compiled_for": key[1], "fits": fits, **figures})
    return {
        "libtpu": version("libtpu"),
        "clock": held.target.chip.clock,
        "context": context,
        "programs": programs,
    }


def _steps(held: Fit, context: int, rows: list[int], tokens: list[int]) -> Iterator[tuple[str, Key, Bound, bool, Rows]]:
    """Names, programs, bounds, whether there is room in the cache, and the rows of a shard."""
    buckets, shards = held.programs.buckets, held.shards
    for own in rows:
        each = -(-own // shards)
        key = Decode.kind, Buckets.fit(buckets.decode, each)
        step = step_bound(held, each, context, each)
        yield f"decode, {own} rows", key, step, own <= held.rows_of(context), [(1, context)] * each
    for own in tokens:
        each = -(-own // shards)
        key = Forward.kind, Buckets.fit(buckets.tokens, each)
        yield f"prefill, {own} tokens", key, step_bound(held, each, each, 1), True, [(each, each)]


def profiled(text: str, codes: Mapping[str, Code], decodes: bool, bound: Bound, rows: Rows = ()) -> dict[str, Any]:
    """Of a compiled program, for these rows, and beside its bound. Of one that decodes, what it does for each token of
    a row. Raises ValueError if the compiler has no estimates in it."""
    module, chip = parse(text), bound.chip
    loop = _main_loop(module) if decodes else None
    own, by_bundles = (_run(Schedule(module, chip, codes, kind), loop, bound, rows) for kind in (False, True))
    if not any(op.cycles for op in own.ops.values()):
        raise ValueError(
            "this libtpu writes no estimated cycles into its programs: leave --profile out, or take 0.0.42"
        )
    around = Schedule(module, chip, codes)
    if loop is not None:
        around.run(around.entry, skipped=loop.name)
    ops = sorted(own.ops.values(), key=lambda op: -(op.seconds + op.waited))
    notes = list(own.notes) + ([] if codes else ["this libtpu does not write its bundles down"])
    return {
        "seconds": own.seconds,
        "seconds_by_bundles": by_bundles.seconds if codes else None,
        "call_seconds": around.seconds if loop is not None else None,
        "waited_seconds": sum(op.waited for op in ops),
        "bound_seconds": bound.seconds,
        "bound_binds": bound.binds,
        "ratio": own.seconds / bound.seconds,
        "bytes_moved": sum(op.read + op.written for op in ops),
        "bound_bytes_moved": bound.moved,
        "cycles": sum(op.cycles for op in ops),
        "unknown": sum(op.unknown for op in ops),
        "notes": notes,
        "ops": [_figures(op, chip) for op in ops],
    }


def _figures(op: Op, chip: Chip) -> dict[str, Any]:
    unit, share = op.fullest
    return {
        "op": op.name,
        "count": op.count,
        "without_estimate": op.unknown,
        "cycles": op.cycles,
        "seconds": op.seconds,
        "waited_seconds": op.waited,
        "bytes_read": op.read,
        "bytes_prefetched": op.prefetched,
        "bytes_written": op.written,
        "bytes_sent": op.sent,
        "bundles": op.bundles,
        "bundles_run": op.run,
        "fullest_unit": unit,
        "fullest_share": share,
        "binds": op.binds(chip),
        **({"kernel": _loops(op)} if op.kernel else {}),
    }


def _loops(op: Op) -> list[dict[str, Any]]:
    """Of each code that a kernel has: how often its outermost loop runs, if that is known, and how many bundles are in
    no loop, in that one, in one within it, and so on; and where it says it, of each loop how deep it is, its bundles,
    and how often it runs."""
    found = {}
    for name, (code, _) in op.codes.items():
        runs = op.loops.get(name, ())
        found[code.grid, code.depths, runs] = {"grid": code.grid, "bundles": list(code.depths), "loops": list(runs)}
    return list(found.values())


def _run(schedule: Schedule, loop: Instruction | None, bound: Bound, rows: Rows) -> Schedule:
    """Through the program, or a step of its loop."""
    step = schedule.entry
    if loop is not None:
        step = schedule.inner(step, loop.called("body")[0], loop.operands[0])
    schedule.kernel = _kernel(schedule, step, bound, rows)
    schedule.run(step)
    return schedule


def _main_loop(module: Module) -> Instruction:
    """That of a decoding call over its steps."""

    def size(loop: Instruction) -> int:
        return len(module.computations[loop.called("body")[0]].instructions)

    return max((own for own in module.computations[module.entry] if own.opcode == "while"), key=size)


def _kernel(schedule: Schedule, step: Scope, bound: Bound, rows: Rows) -> Callable[[Instruction], Least]:
    """What each kernel takes at least that reads the cache: what it says, or its part of the bound's keys, values."""
    count = max(sum(own.target == KERNEL and schedule.reads_cache(step, own) for own in step.computation), 1)
    seconds = max(bound.cached / bound.chip.bandwidth, bound.attended / bound.chip.flops)

    def least(own: Instruction) -> Least:
        work = WORK.get(stem(own.name))
        if work is None or not rows or not own.kernel_metadata:
            return Least(seconds / count, bound.cached / count)
        done = work(own.kernel_metadata, *zip(*rows, strict=True))
        return Least(done.read / bound.chip.bandwidth, done.read, done.loops)

    return least
