"""`jaxinfer merge`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Literal

import typer

from jaxinfer.cli.convert import show
from jaxinfer.cli.options import JSON, SOURCE, WRITTEN_DTYPE, Verbosity, engine_option, grouped
from jaxinfer.quantization.schemes import parse_quantization


@grouped
def merge(
    base: SOURCE,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id, as PEFT writes it.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="Folder that is not there yet.")],
    *,
    format: Annotated[
        Literal["hf", "orbax"], typer.Option(help="Safetensors as on the hub; or Orbax, restored straight into shards.")
    ] = "hf",
    quantization: Annotated[str | None, engine_option("quantization")] = None,
    dtype: WRITTEN_DTYPE = "auto",
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Write a model with a low-rank adapter merged into it: LoRA, rsLoRA or DoRA, in PEFT's format.

    The sum is made in float32, rounded to SRC's dtype, and quantized after that if you like. A tokenizer that lies in
    ADAPTER counts.
    """
    with verbosity.apply() as progress:
        from jaxinfer.checkpoint.hub import resolve
        from jaxinfer.checkpoint.output import check_destination

        wanted = None if quantization is None else parse_quantization(quantization)
        check_destination(output, format)
        folder, own = resolve(base), resolve(adapter)
        progress("starting JAX")
        from jaxinfer.convert import convert

        progress.hide()
        shown = not verbosity.quiet
        done = convert(
            folder, output, format=format, dtype=dtype, quantization=wanted, adapter=own, show_progress=shown
        )
    print(json.dumps(dataclasses.asdict(done))) if as_json else show(done)
