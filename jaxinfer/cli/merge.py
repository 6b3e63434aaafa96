"""`jaxinfer merge`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Literal

import typer

from jaxinfer.cli.convert import show
from jaxinfer.cli.options import BASE_QUANTIZATION, JSON, SOURCE, WRITTEN_DTYPE, Verbosity, engine_option, grouped
from jaxinfer.quantization.schemes import parse_quantization


@grouped
def merge(
    base: SOURCE,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id, as PEFT writes it.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="Folder that is not there yet.")],
    *,
    onto: Annotated[
        Literal["original", "dequantized"],
        typer.Option(help="BASE's weights as they are; or what is left of them by quantization (QLoRA's base)."),
    ] = "original",
    base_quantization: BASE_QUANTIZATION = None,
    format: Annotated[
        Literal["hf", "orbax"], typer.Option(help="Safetensors as on the hub; or Orbax, restored straight into shards.")
    ] = "hf",
    quantization: Annotated[str | None, engine_option("quantization")] = None,
    dtype: WRITTEN_DTYPE = "auto",
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Write a model with a low-rank adapter merged into it: LoRA, rsLoRA or DoRA, in PEFT's format.

    The sum is made in float32, rounded to BASE's dtype, and quantized after that if you like, each weight to the
    nearest: `jaxinfer compare BASE --adapter ADAPTER` says what that costs. A tokenizer that lies in ADAPTER counts.
    """
    with verbosity.apply() as progress:
        from jaxinfer.checkpoint.hub import resolve
        from jaxinfer.checkpoint.output import check_destination

        wanted, of_base = (
            None if text is None else parse_quantization(text) for text in (quantization, base_quantization)
        )
        check_destination(output, format)
        folder, own = resolve(base), resolve(adapter)
        progress("starting JAX")
        from jaxinfer.convert import convert

        progress.hide()
        shown = not verbosity.quiet
        done = convert(
            folder,
            output,
            format=format,
            dtype=dtype,
            quantization=wanted,
            adapter=own,
            onto=onto,
            base_quantization=of_base,
            show_progress=shown,
        )
    print(json.dumps(dataclasses.asdict(done))) if as_json else show(done)
