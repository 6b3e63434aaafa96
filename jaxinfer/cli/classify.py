"""`jaxinfer classify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.console import title
from jaxinfer.cli.options import Verbosity, grouped
from jaxinfer.cli.texts import TEXTS, NumberOptions, TextModelOptions, is_file, rows_of, run

if TYPE_CHECKING:
    from jaxinfer.batch.row import Row
    from jaxinfer.batch.work import Worker

SHOWN = 5  # classes of a text


@grouped
def classify(
    texts: TEXTS,
    *,
    pair: Annotated[
        bool, typer.Option("--pair", help="Each two TEXTs are one input, for models of pairs of texts.")
    ] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Give logits, and not probabilities.")] = False,
    numbers: NumberOptions,
    load: TextModelOptions,
    verbosity: Verbosity,
) -> None:
    """Say of which class texts are, the likeliest classes first, a line each.

    Rows of FILE are {"text"}, or {"text", "text_pair"} for models of pairs. A *.npy has float32, a row each, in
    the order of the checkpoint's classes; *.jsonl and *.parquet have the rows of FILE, too. For many rows: jaxinfer
    batch --task classify.
    """
    if pair and (len(texts) % 2 or any(map(is_file, texts))):
        raise ValueError("--pair: give two TEXTs for each pair; rows of a file have a column text_pair")
    rows = rows_of("classify", texts, ("text", "text_pair") if pair else ("text",))
    column = "logits" if logits else "probs"
    run("classify", rows, _line, numbers, load, verbosity, column=column, use_activation=False if logits else None)


def _line(worker: Worker, row: Row, new: dict[str, Any]) -> str:
    from jaxinfer.batch.workers import Classification

    values = new["logits" if worker.results.logits else "probs"]
    assert isinstance(worker, Classification)
    best = sorted(zip(worker.labels, values, strict=True), key=lambda entry: -entry[1])[:SHOWN]
    text = row.ask.texts[0] if row.ask else ""
    shown = " | ".join(text) if isinstance(text, tuple) else str(text)
    return f"{', '.join(f'{label} {value:.4f}' for label, value in best)}  {title(shown)}"
