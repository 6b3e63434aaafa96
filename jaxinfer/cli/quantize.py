"""`jaxinfer quantize`."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxinfer.cli.options import JSON, REVISION, SOURCE, WRITTEN_DTYPE, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.calibrate import Text

log = logging.getLogger("jaxinfer")


@grouped
def quantize(
    source: SOURCE,
    output: Annotated[str, typer.Argument(metavar="DST", help="Folder that is not there yet.")],
    *,
    scheme: Annotated[
        str, typer.Option(metavar="SCHEME", help="Of the weights: int4, int4-g128, int8, int8-w8a8, fp8.")
    ],
    method: Annotated[
        Literal["awq", "gptq", "smoothquant"],
        typer.Option(help="gptq: any scheme; awq: weights alone; smoothquant: activations are quantized too."),
    ],
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Texts as the model will see them: rows with text, prompt or messages.")
    ],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Look at no more tokens of them.")] = 65536,
    max_length: Annotated[int, typer.Option(metavar="N", min=2, help="And at no more of each.")] = 512,
    format: Annotated[
        Literal["orbax", "hf"], typer.Option(help="As of jaxinfer convert; hf is compressed-tensors' format.")
    ] = "orbax",
    dtype: WRITTEN_DTYPE = "auto",
    revision: REVISION = None,
    as_json: JSON = False,
    verbosity: Verbosity,
) -> None:
    """Quantize a model by what goes through it when it reads texts of yours; all commands take DST as --model.

    One layer's weights are in memory at a time, and in Orbax's format the result. `jaxinfer compare` says what schemes
    cost without that.
    """
    with verbosity.apply() as progress:
        from jaxinfer.checkpoint.hub import resolve
        from jaxinfer.checkpoint.output import check_destination

        check_destination(output, format)
        folder = resolve(source, revision)
        texts = _texts(data)
        progress("starting JAX")
        from jaxinfer.calibrate import calibrate

        progress.hide()
        done = calibrate(
            folder,
            output,
            texts,
            scheme=scheme,
            method=method,
            format=format,
            dtype=dtype,
            max_length=max_length,
            max_tokens=max_tokens,
            show_progress=not verbosity.quiet,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(
            f"{done.output}: {done.scheme} by {done.method} on {done.tokens:,} tokens of {done.texts:,} texts, "
            f"in {done.seconds:.1f} s"
        )


def _texts(data: str) -> list[Text]:
    """Of a file's rows those that are text, prompts (with their continuation) or conversations."""
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.readers import records
    from jaxinfer.batch.sources import find_sources
    from jaxinfer.sampling.params import SamplingParams

    plain, chat = (Parser(task, SamplingParams()) for task in ("generate", "chat"))
    texts: list[Text] = []
    skipped: list[str] = []
    for record in records(find_sources([data])):
        row = plain.parse(record)
        if row.ask is None:
            row = chat.parse(record)
        if row.ask is None or isinstance(row.ask.prompt, list):
            skipped.append(row.error or f"{row.where}: token ids are no text")
        elif row.ask.messages is not None:
            texts.append(row.ask.messages)
        else:
            continuation = row.columns.get("continuation")
            texts.append(f"{row.ask.prompt}{continuation if isinstance(continuation, str) else ''}")
    if not texts:
        raise ValueError(skipped[0] if skipped else f"{data}: has no rows, and so no text to calibrate with")
    if skipped:
        log.warning("%d of %d rows are left out, the first of them: %s", len(skipped), len(skipped + texts), skipped[0])
    return texts
