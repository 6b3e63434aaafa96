"""`jaxinfer rerank`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.console import title
from jaxinfer.cli.options import Verbosity, grouped
from jaxinfer.cli.texts import TEXTS, NumberOptions, TextModelOptions, rows_of, run

if TYPE_CHECKING:
    from jaxinfer.batch.row import Row
    from jaxinfer.batch.work import Worker

TOP_N = Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the documents of a query, only the best N.")]


@grouped
def rerank(
    query: Annotated[str, typer.Argument(metavar="QUERY", show_default=False)],
    documents: TEXTS,
    *,
    top_n: TOP_N = None,
    numbers: NumberOptions,
    load: TextModelOptions,
    verbosity: Verbosity,
) -> None:
    """Sort texts by how well they answer a query, the best first: score, place among the texts, text.

    By a model that reads both at once, or by the similarity of their vectors. *.jsonl and *.parquet have one row, with
    all texts. For many queries: jaxinfer batch --task rerank, with rows {"query", "documents"}.
    """
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.row import Record
    from jaxinfer.sampling.params import SamplingParams

    texts: list[Any] = []
    for row in rows_of("embed", documents):
        if row.ask is None:
            raise ValueError(str(row.error))
        texts += row.ask.texts
    record = Record(0, "rerank", {"query": query, "documents": texts})
    rows = [Parser("rerank", SamplingParams()).parse(record)]
    run("rerank", rows, _lines, numbers, load, verbosity, head="   score    place  text", top_n=top_n)


def _lines(worker: Worker, row: Row, new: dict[str, Any]) -> str:
    texts = row.ask.texts if row.ask else ()
    ranking = zip(new["relevance_scores"], new["ranking"], strict=True)
    return "\n".join(f"{score:8.4f} {place:8}  {title(texts[place])}" for score, place in ranking)
