"""`jaxinfer convert`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxinfer.cli.options import JSON, REVISION, SOURCE, WRITTEN_DTYPE, Verbosity, engine_option, grouped
from jaxinfer.quantization.schemes import parse_quantization

if TYPE_CHECKING:
    from jaxinfer.convert import Conversion


@grouped
def convert(
    source: SOURCE,
    output: Annotated[str, typer.Argument(metavar="DST", help="Folder or gs:// URL that is not there yet.")],
    *,
    format: Annotated[
        Literal["orbax", "hf"], typer.Option(help="Orbax, restored straight into shards; or safetensors as on the hub.")
    ] = "orbax",
    quantization: Annotated[str | None, engine_option("quantization")] = None,
    dtype: WRITTEN_DTYPE = "auto",
    mesh: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Devices that share the work; any can restore what was written.")
    ] = None,
    revision: REVISION = None,
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Write a model in another form, quantized if you like: all commands take DST as --model.

    Nothing is quantized then, and a mesh's devices read their own parts alone, which for a model of some size is
    faster; at the end DST is restored once, and how long that took is said. It is there as a whole or not at all.
    """
    with verbosity.apply() as progress:
        from jaxinfer.checkpoint.hub import resolve
        from jaxinfer.checkpoint.output import check_destination

        wanted = None if quantization is None else parse_quantization(quantization)
        check_destination(output, format)
        folder = resolve(source, revision)
        progress("starting JAX")
        from jaxinfer.convert import convert as run

        progress.hide()
        done = run(
            folder,
            output,
            format=format,
            dtype=dtype,
            quantization=wanted,
            mesh=mesh,
            show_progress=not verbosity.quiet,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        show(done)


def show(done: Conversion) -> None:
    """For people."""
    merged = f", an adapter merged onto base weights: {done.merged_onto}" if done.merged_onto else ""
    if merged and "," in done.precision:
        merged += ", and the sum rounded to the nearest"
    print(f"{done.output}: {done.bytes:,} bytes of weights in {done.precision}{merged}")
    doing = "loading and quantizing" if "," in done.precision else "loading"
    ratio = done.restore_ratio
    compared = f"{1 / ratio:.1f} times as fast as" if ratio <= 1 else f"{ratio:.1f} times as long as"
    print(
        f"{doing} took {done.load_seconds:.2f} s, writing {done.write_seconds:.2f} s, restoring "
        f"{done.restore_seconds:.2f} s: {compared} {doing}"
    )
