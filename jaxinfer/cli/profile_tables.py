"""What `jaxinfer plan --profile` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MB, MICRO = 1e6, 1e6
SHOWN = 0.005  # of a step's time, or of its bytes: what takes less is a line together


def print_profile(console: Console, figures: dict[str, Any], name: str) -> None:
    """A table for each program, and below it the step beside its bound, and what is not known."""
    from rich import box
    from rich.table import Table

    for program in figures["programs"]:
        title = f"{name}, {program['program']} (compiled for {program['compiled_for']} on each shard of rows)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        table.add_column("op", overflow="fold")
        for column in ("n", "k cycles", "µs", "waits", "MB", "bundles", "binds"):
            table.add_column(column, justify="right", no_wrap=True)
        rest: list[dict[str, Any]] = []
        for op in program["ops"]:
            seconds, moved = op["seconds"] + op["waited_seconds"], op["bytes_read"] + op["bytes_written"]
            if seconds < SHOWN * program["seconds"] and moved < SHOWN * program["bytes_moved"]:
                rest.append(op)
                continue
            unit = op["binds"] not in ("memory", "links", "unknown")
            table.add_row(op["op"], *_numbers([op]), op["binds"] + (f" {op['fullest_share']:.0%}" if unit else ""))
        if rest:
            table.add_row(f"{len(rest)} more", *_numbers(rest), "")
        console.print(table)
        for line in _lines(program, figures["libtpu"]):
            console.print(line, highlight=False)


def _numbers(ops: list[dict[str, Any]]) -> list[str]:
    def total(*names: str) -> Any:
        return sum(op[name] for op in ops for name in names)

    cycles = f"{total('cycles') / 1000:,.1f}" + ("+" if total("without_estimate") else "")
    seconds = f"{total('seconds') * MICRO:,.1f}", f"{total('waited_seconds') * MICRO:,.1f}"
    moved = f"{total('bytes_read', 'bytes_written') / MB:,.1f}"
    return [str(total("count")), cycles, *seconds, moved, f"{total('bundles'):,}"]


def _lines(program: dict[str, Any], libtpu: str) -> list[str]:
    """What is below a table."""
    bound, binds = program["bound_seconds"], program["bound_binds"]
    by_bundles = program["seconds_by_bundles"]
    lines = [
        f"a step {1000 * program['seconds']:.3f} ms by the estimates of libtpu {libtpu}; at best {1000 * bound:.3f} "
        f"({binds}): {program['ratio']:.2f}x"
        + (f"; by its bundles {1000 * by_bundles:.3f}: {by_bundles / bound:.2f}x" if by_bundles is not None else "")
    ]
    if not program["fits"]:
        lines.append("the cache has no room for so many rows of this context")
    if program["call_seconds"] is not None:
        lines.append(f"beside its steps, a call takes {1000 * program['call_seconds']:.3f} ms")
    for op in program["ops"]:
        for code in op.get("kernel", ()):
            grid = "unknown" if code["grid"] is None else str(code["grid"])
            depths = ", ".join(f"{bundles:,}" for bundles in code["bundles"])
            lines.append(f"{op['op']}: grid of {grid}; bundles in no loop, in its grid's, in those within: {depths}")
            if code["loops"]:
                runs = ", ".join(f"{times:,} x {bundles:,}" for _, bundles, times in code["loops"])
                lines.append(f"{op['op']}: its loops run {runs}")
    return [*lines, *(f"not known: {note}" for note in program["notes"])]
