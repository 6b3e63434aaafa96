"""`jaxinfer embed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.console import title
from jaxinfer.cli.options import Verbosity, grouped
from jaxinfer.cli.texts import TEXTS, VECTORS, NumberOptions, TextModelOptions, VectorOptions, rows_of, run

if TYPE_CHECKING:
    from jaxinfer.batch.row import Row
    from jaxinfer.batch.work import Worker

SHOWN = 4  # numbers of a vector


@grouped
def embed(
    texts: TEXTS,
    *,
    numbers: NumberOptions,
    vectors: VectorOptions,
    precision: Annotated[
        str,
        typer.Option(
            metavar="P",
            help="Of the numbers in a *.npy: float32, int8, uint8, binary, ubinary; as sentence-transformers does it.",
            rich_help_panel=VECTORS,
        ),
    ] = "float32",
    load: TextModelOptions,
    verbosity: Verbosity,
) -> None:
    """Make vectors of texts: what is printed is how they begin, a line each, unless they are written.

    A *.npy has the vectors, a row each; *.jsonl and *.parquet have the rows of FILE, too. For many rows:
    jaxinfer batch --task embed.
    """
    rows = rows_of("embed", texts)
    head = " tokens  dimensions  vector"
    column, changes = "embedding", vectors.changes
    run("embed", rows, _line, numbers, load, verbosity, head=head, column=column, precision=precision, **changes)


def _line(worker: Worker, row: Row, new: dict[str, Any]) -> str:
    vector = new["embedding"]
    numbers = ", ".join(f"{number:.4f}" for number in vector[:SHOWN])
    dots = ", ..." if len(vector) > SHOWN else ""
    return f"{new['tokens']:7}  {len(vector):10}  [{numbers}{dots}]  {title(str(row.ask.texts[0]) if row.ask else '')}"
