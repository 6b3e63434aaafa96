"""`jaxinfer plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxinfer.cli.options import JSON, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.plan.compile import Plan

GIB = 2**30
BATCHES = (1, 4, 16, 64, 256)


@grouped
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a config.json, or a config.json.")],
    *,
    topology: Annotated[str, typer.Option(metavar="NAME", help="A TPU slice: v5e-8, v6e-4, v5p-8, v4-8, tpu7x-4 ...")],
    mesh: Annotated[
        str | None, typer.Option(metavar="SPEC", help="tensor=4; without it, as many chips as the heads allow.")
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and cache.")] = "bfloat16",
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of prompt and answer together.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", min=1, help="Most sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of a call.")] = 2048,
    context: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each sequence, for the bounds of speed.")
    ] = 1024,
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Say whether a model fits a TPU slice, and how fast it can be at best. No TPU and no weights are needed.

    The engine's programs are compiled by the real TPU compiler (pip install 'jaxinfer[tpu]'), which says how much
    memory they need. Exit code 1, and what would fit, if the model does not.
    """
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # there may be a TPU, and somebody at work on it
    from jaxinfer.checkpoint.files import read_config
    from jaxinfer.models.registry import REGISTRY

    path = Path(model)
    config = read_config(path.parent if path.name == "config.json" else path, REGISTRY)
    with verbosity.apply() as progress:
        progress(f"compiling for {topology}, which may take a minute")
        from jaxinfer.plan.compile import DoesNotFit, make_plan
        from jaxinfer.plan.slices import find_slice

        options: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_num_batched_tokens, max_num_seqs),
        }
        try:
            made = make_plan(config, find_slice(topology), mesh=mesh, dtype=dtype, **options)
        except DoesNotFit as error:
            from jaxinfer.cli.console import say_error

            progress.hide()
            say_error(error)
            raise typer.Exit(1) from None
    figures = _figures(made, context)
    if as_json:
        print(json.dumps(figures))
    else:
        _print(made, figures)


def _figures(plan: Plan, context: int) -> dict[str, Any]:
    from jaxinfer.plan.roofline import bound

    chip, sizes = plan.slice.chip, plan.sizes
    bounds = []
    for rows in (*(b for b in BATCHES if b < plan.max_num_seqs), plan.max_num_seqs):
        one = bound(plan.model, chip, plan.tensor, rows, context, rows)
        bounds.append({"rows": rows, "fits": rows * context <= (sizes.num_pages - 1) * sizes.page_size, **_bound(one)})
    prompt = bound(plan.model, chip, plan.tensor, plan.max_num_batched_tokens, plan.max_num_batched_tokens, 1)
    return {
        "topology": plan.slice.name,
        "tensor": plan.tensor,
        "max_model_len": sizes.max_model_len,
        "bytes": {
            "weights": plan.weights,
            "cache": sizes.bytes,
            "slots": plan.slots,
            "temporaries": plan.temporaries,
            "code": plan.code,
            "total": plan.total,
            "memory": chip.memory,
            "free": plan.free,
        },
        "cache_tokens": (sizes.num_pages - 1) * sizes.page_size,
        "programs": [
            {
                "program": f"{p.key[0]}, {p.key[1]} tokens",
                "temporaries": p.temporaries,
                "code": p.code,
                "reductions": p.reductions,
                "reduced_bytes": p.reduced_bytes,
                "compile_seconds": p.seconds,
            }
            for p in plan.programs
        ],
        "context": context,
        "decode": bounds,
        "prefill": {"tokens": plan.max_num_batched_tokens, **_bound(prompt)},
    }


def _bound(bound: Any) -> dict[str, Any]:
    return {
        "seconds": bound.seconds,
        "binds": bound.binds,
        "tokens_per_second": bound.tokens_per_second,
        "compute_seconds": bound.compute,
        "memory_seconds": bound.memory,
        "links_seconds": bound.links,
    }


def _print(plan: Plan, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    memory = Table("of each chip", title=f"{plan.slice.name}, tensor={plan.tensor}", title_justify="left")
    memory.add_column("GiB", justify="right")
    names = {"cache": f"KV cache, {figures['cache_tokens']:,} tokens of context", "total": "all", "memory": "there is"}
    for name, count in figures["bytes"].items():
        memory.add_row(names.get(name, name), f"{count / GIB:.3f}")
    console.print(memory)
    programs = Table("compiled program", title_justify="left")
    for column in ("temporaries MiB", "code MiB", "reductions", "reduced MiB", "compiled in s"):
        programs.add_column(column, justify="right")
    for one in figures["programs"]:
        sizes = (f"{one[name] / 2**20:.1f}" for name in ("temporaries", "code", "reduced_bytes"))
        temporaries, code, reduced = sizes
        cells = temporaries, code, str(one["reductions"]), reduced, f"{one['compile_seconds']:.1f}"
        programs.add_row(one["program"], *cells)
    console.print(programs)
    speed = Table(f"at best, {figures['context']} tokens of context", title_justify="left")
    for column in ("step ms", "tokens/s", "tokens/s a chip", "what binds"):
        speed.add_column(column, justify="right")
    lines = [(f"decode, {one['rows']} rows", one) for one in figures["decode"]]
    lines.append((f"prefill, a prompt of {figures['prefill']['tokens']}", figures["prefill"]))
    for name, one in lines:
        rate = one["tokens_per_second"]
        full = "" if one.get("fits", True) else " (cache too small)"
        speed.add_row(
            name + full, f"{1000 * one['seconds']:.3f}", f"{rate:,.0f}", f"{rate / plan.tensor:,.0f}", one["binds"]
        )
    console.print(speed)
    unused = len(plan.slice.devices) - plan.tensor
    if unused:
        console.print(f"{unused} of {len(plan.slice.devices)} devices are not used: the heads don't divide further")
