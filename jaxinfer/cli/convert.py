"""`jaxinfer convert`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxinfer.cli.options import JSON, REVISION, SOURCE, WRITTEN_DTYPE, Verbosity, grouped

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
    quantization: Annotated[
        str | None, typer.Option(metavar="SCHEME", help="Of weights: int8, int8-w8a8, int4, int4-g128, fp8, fp8-block.")
    ] = None,
    dtype: WRITTEN_DTYPE = "auto",
    mesh: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Devices that share the work; any can restore what was written.")
    ] = None,
    revision: REVISION = None,
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Write a model in another form, quantized if you like: all commands take DST as --model, and load it faster.

    DST is there as a whole or not at all. At the end it is restored once, and how long that took is said.
    """
    with verbosity.apply() as progress:
        from jaxinfer.checkpoint.hub import resolve
        from jaxinfer.quantization.schemes import check_quantization

        check_quantization(quantization)
        folder = resolve(source, revision)
        progress("starting JAX")
        from jaxinfer.convert import convert as run

        progress.hide()
        done = run(
            folder,
            output,
            format=format,
            dtype=dtype,
            quantization=quantization,
            mesh=mesh,
            show_progress=not verbosity.quiet,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        _print(done)


def _print(done: Conversion) -> None:
    print(f"{done.output}: {done.bytes:,} bytes of weights in {done.precision}")
    doing = "loading and quantizing" if "," in done.precision else "loading"
    print(
        f"{doing} took {done.load_seconds:.2f} s, writing {done.write_seconds:.2f} s, restoring "
        f"{done.restore_seconds:.2f} s: {1 / done.restore_ratio:.1f} times as fast as {doing}"
    )
