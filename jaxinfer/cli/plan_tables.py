"""What `jaxinfer plan` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxinfer.cli.profile_tables import print_profile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jaxinfer.plan.sweep import Candidate

GIB, MIB = 2**30, 2**20
SHOWN = 20  # of a sweep


def print_plan(figures: dict[str, Any]) -> None:
    """The figures of a plan as tables."""
    console = _print_programs(figures)
    console.print(_speed(figures))
    if figures["experts_over"]:
        console.print(_busiest(figures))
    if "profile" in figures:
        print_profile(console, figures["profile"], figures["topology"])


def print_pooled(figures: dict[str, Any]) -> None:
    """The same of a model that makes vectors or classes."""
    title = f"calls of {figures['max_num_batched_tokens']:,} tokens at best; GFLOP and GB of each device"
    table = _table(title, "tokens a text", "GFLOP", "GB", "ms", "texts/s", "a chip", "binds")
    for step in figures["texts"]:
        work = f"{step['flops'] / 1e9:,.0f}", f"{step['bytes_moved'] / 1e9:.2f}", f"{1000 * step['seconds']:.3f}"
        rates = f"{step['texts_per_second']:,.0f}", f"{step['texts_per_second_per_chip']:,.0f}"
        table.add_row(f"{step['tokens']:,}", *work, *rates, step["binds"])
    _print_programs(figures).print(table)


def print_pooled_sweep(candidates: list[dict[str, Any]], refused: int) -> None:
    """What fits, most texts/s a chip first: of each place its best mesh, or all of the only place."""
    from rich.console import Console

    best: dict[str, dict[str, Any]] = {}
    for entry in candidates:
        best.setdefault(entry["topology"], entry)
    title = f"from shapes alone, texts of {candidates[0]['tokens']:,} tokens" if candidates else "nothing fits"
    table = _table(title, "where", "mesh", "texts/s", "a chip", "binds")
    for entry in list(best.values() if len(best) > 1 else candidates)[:SHOWN]:
        rates = f"{entry['texts_per_second']:,.0f}", f"{entry['texts_per_second_per_chip']:,.0f}"
        table.add_row(entry["topology"], entry["mesh"], *rates, entry["binds"])
    Console().print(table)
    Console().print(f"of {len(candidates) + refused} meshes {refused} do not fit")


def _print_programs(figures: dict[str, Any]) -> Console:
    """What there is to say of any model; what is speed comes after it."""
    from rich.console import Console

    console = Console()
    if not figures["compiled"]:
        console.print(f"{figures['topology']}: from shapes alone, as no compiler is at hand for it")
    console.print(_memory(figures))
    if figures["programs"]:
        console.print(_programs(figures))
        console.print(_collectives(figures))
    return console


def _table(title: str, first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory(figures: dict[str, Any]) -> Table:
    of = "of each chip" if figures["devices_per_chip"] == 1 else "of each device, half of a chip"
    table = _table(f"{figures['topology']}, {figures['mesh']}, {figures['precision']}", of, "GiB")
    states = figures.get("bytes_per_sequence", 0)
    names = {
        "cache": f"KV cache, {figures.get('cache_tokens', 0):,} tokens of context"
        + (f", {states / MIB:.1f} MiB a sequence beside" if states else ""),
        "hidden_states": "hidden states",
        "adapters": f"{figures.get('max_adapters')} adapters of rank {figures.get('max_lora_rank')}",
        "padding": "padding by the compiler",
        "total": "all",
        "memory": "there is",
    }
    for name, count in figures["bytes"].items():
        table.add_row(names.get(name, name), f"{count / GIB:.3f}")
        if name == "cache" and states:
            kept = figures["snapshots"]
            table.add_row(f"  of it {kept} states to go on from", f"{kept * states / GIB:.3f}")
    return table


def _programs(figures: dict[str, Any]) -> Table:
    table = _table("", "compiled program", "temporaries MiB", "code MiB", "compiled in s")
    for program in figures["programs"]:
        sizes = [f"{program[name] / MIB:.1f}" for name in ("temporaries", "code")]
        table.add_row(program["program"], *sizes, f"{program['compile_seconds']:.1f}")
    return table


def _collectives(figures: dict[str, Any]) -> Table | str:
    table = _table("", "sent between chips", "kind", "count", "MiB")
    for program in figures["programs"]:
        for kind, total in program["collectives"].items():
            table.add_row(program["program"], kind, str(total["count"]), f"{total['bytes'] / MIB:.2f}")
    return table if table.row_count else "nothing is sent between chips"


def _speed(figures: dict[str, Any]) -> Table:
    title = f"each step at best, sequences of {figures['context']:,} tokens; GFLOP and GB of each device"
    table = _table(title, "step", "GFLOP", "GB", "ms", "tokens/s", "a chip", "binds")
    for name, step in _steps(figures):
        work = f"{step['flops'] / 1e9:,.0f}", f"{step['bytes_moved'] / 1e9:.2f}", f"{1000 * step['seconds']:.3f}"
        rates = f"{step['tokens_per_second']:,.0f}", f"{step['tokens_per_second_per_chip']:,.0f}"
        table.add_row(name, *work, *rates, step["binds"] if step.get("fits", True) else "no room")
    return table


def _busiest(figures: dict[str, Any]) -> Table:
    title = (
        f"{figures['experts_over']} devices share experts, and all wait for the one that has most: so many times the\n"
        "mean, as is expected if each token takes any with the same chance\n"
        "(David and Nagaraja, Order Statistics, doi:10.1002/0471722162)"
    )
    table = _table(title, "step", "rows", "experts that are read")
    for name, step in _steps(figures):
        table.add_row(name, f"{step['busiest_rows']:.2f}", f"{step['busiest_experts']:.2f}")
    return table


def _steps(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    decode = [(f"decode, {step['rows']} rows", step) for step in figures["decode"]]
    return [*decode, (f"prefill, {figures['prefill']['tokens']}", figures["prefill"])]


def print_sweep(candidates: list[Candidate], refused: int, context: int) -> None:
    """What fits, the fastest first: of each place its best mesh, or all of the only place."""
    from rich.console import Console

    title = f"from shapes alone, {context:,} tokens of context"
    columns = "mesh", "GiB free", "rows", "tokens/s", "a chip", "binds"
    table = _table(title, "where", *columns)
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.fit.target.name, candidate)
    shown = list(best.values() if len(best) > 1 else candidates)[:SHOWN]
    for candidate in shown:
        fit, bound = candidate.fit, candidate.bound
        free = (fit.target.chip.memory - fit.held) / GIB
        rates = f"{bound['tokens_per_second']:,.0f}", f"{candidate.rate:,.0f}"
        table.add_row(fit.target.name, fit.mesh, f"{free:.2f}", str(candidate.rows), *rates, bound["binds"])
    console = Console()
    console.print(table)
    first = candidates[0].fit
    console.print(
        f"of {len(candidates) + refused} meshes {refused} do not fit; what the compiler says of the first:", end=" "
    )
    console.print(f"--topology {first.target.name} --mesh {first.mesh}")
