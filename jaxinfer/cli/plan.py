"""`jaxinfer plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.options import JSON, LoadOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.engine.deployment import Deployment
    from jaxinfer.plan.compile import Plan

GIB = 2**30
BATCHES = (1, 4, 16, 64, 256)


@grouped
def plan(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG.yaml | MODEL]", help="A deployment; or a folder with a config.json, or that."),
    ] = None,
    *,
    topology: Annotated[
        str | None, typer.Option(metavar="NAME", help="A TPU slice: v5e-8, v6e-4, v5p-8, v4-8, tpu7x-4 ...")
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each sequence, for the bounds of speed.")
    ] = 1024,
    as_json: JSON = False,
    batching: BatchingOptions,
    load: LoadOptions,
    verbosity: Verbosity,
) -> None:
    """Say whether a model fits a TPU slice, and how fast it can be at best. No TPU and no weights are needed.

    The engine's programs are compiled by the real TPU compiler (pip install 'jaxinfer[tpu]'), which says how much
    memory they need. Exit code 1, and what would fit, if the model does not. Where nobody says a dtype it is bfloat16.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # there may be a TPU, and somebody at work on it
    load = with_argument(what, load)
    deployment = None
    if load.config is not None:
        from jaxinfer.engine.deployment import read_deployment

        deployment = read_deployment(load.config)
    topology = topology or (deployment.topology if deployment else None)
    if topology is None:
        raise ValueError("topology is missing: give --topology v5e-8, or say it in a deployment's file")
    model, options = load.loading(**dataclasses.asdict(batching))
    with verbosity.apply() as progress:
        progress(f"compiling for {topology}, which may take a minute")
        from jaxinfer.plan.compile import DoesNotFit, make_plan
        from jaxinfer.plan.slices import find_slice

        config = architecture(model, deployment)
        try:
            made = make_plan(config, find_slice(topology), **options)
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


def with_argument(what: str | None, load: LoadOptions) -> LoadOptions:
    """The argument as the option that it stands for."""
    if what is not None:
        is_config = Path(what).suffix in (".yaml", ".yml")
        if (load.config if is_config else load.model) is not None:
            option = "--config" if is_config else "--model"
            raise ValueError(f"both {what} and {option} are given: give only one of them")
        load = dataclasses.replace(load, config=what) if is_config else dataclasses.replace(load, model=what)
    if load.config is None and load.model is None:
        raise ValueError("no model is named: give CONFIG.yaml, or a model's folder and --topology")
    return load


def architecture(model: str | os.PathLike[str], deployment: Deployment | None) -> Mapping[str, Any]:
    """The content of a config.json: the deployment's, or of the model's folder. Nothing is downloaded."""
    from jaxinfer.checkpoint.files import read_config
    from jaxinfer.engine.load import check_architecture
    from jaxinfer.models.registry import REGISTRY, parse_config

    said = deployment.architecture if deployment else None
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if said is None or folder.is_dir():
        if deployment is not None and not folder.exists():
            raise ValueError(f"{deployment.path}: architecture is missing, and {model} is no folder with a config.json")
        config = read_config(folder, REGISTRY)
        if said is not None:
            check_architecture(said, config, folder / "config.json")
        return config
    assert deployment is not None
    try:
        parse_config(said)
    except ValueError as error:
        raise deployment.wrong_architecture(error) from None
    return said


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
