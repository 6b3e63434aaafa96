"""`jaxinfer score`."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.console import title
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import JSON, ModelOptions, PromptAdapterOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.batch.row import Row
    from jaxinfer.engine.outputs import ScoreOutput
    from jaxinfer.llm import LLM

AT_ONCE = 256  # texts that --rolling scores together


@grouped
def score(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Texts: .txt (one a line), .jsonl, .csv, .parquet; - is stdin, JSONL.")
    ],
    *,
    rolling: Annotated[
        bool,
        typer.Option("--rolling", help="Score first tokens too, and texts longer than the context, in windows."),
    ] = False,
    as_json: JSON = False,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: PromptAdapterOptions,
    hosts: HostOptions,
    verbosity: Verbosity,
) -> None:
    """Say how likely texts are: log-likelihood and perplexity, a line each.

    Rows are {"text"}, or {"prompt", "continuation"}, where only the continuation is scored. The last line, on stderr,
    is of all together. For many rows, and results in a file: jaxinfer batch --task score.
    """
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.readers import records
    from jaxinfer.batch.sources import find_sources
    from jaxinfer.cli.console import say_error
    from jaxinfer.sampling.params import SamplingParams

    adapter = adapters.used
    if hosts.join():
        with verbosity.apply() as progress:
            batching.load(load, progress, **adapters.loading)
    sources = find_sources([file])
    parser = Parser("score", SamplingParams())
    with verbosity.apply() as progress, batching.load(load, progress, **adapters.loading) as llm:
        llm.engine.check_adapter(adapter)
        rows = map(parser.parse, records(sources))
        outputs = _rolling(llm, rows, adapter) if rolling else _scored(llm, rows, adapter)
        if not as_json:
            progress.hide()
            print("log-likelihood   tokens  perplexity  text")
        logprob, tokens, errors = 0.0, 0, 0
        for row, output in outputs:
            progress.hide()
            if isinstance(output, str):
                errors += 1
                print(json.dumps({"index": row.index, "error": output})) if as_json else say_error(output)
                continue
            logprob, tokens = logprob + output.logprob, tokens + len(output.token_ids)
            text = row.ask.continuation or row.ask.prompt if row.ask else ""
            line = f"{output.logprob:14.4f} {len(output.token_ids):8} {output.perplexity:11.4f}  {title(str(text))}"
            print(json.dumps({"index": row.index, **_record(output)}) if as_json else line, flush=True)
        if tokens and not verbosity.quiet:
            perplexity = math.exp(min(-logprob / tokens, 700))
            total = f"{logprob:.4f} in {tokens} tokens, perplexity {perplexity:.4f}"
            typer.echo(f"jaxinfer: all: {total}; {errors} errors" if errors else f"jaxinfer: all: {total}", err=True)
    if errors:
        raise typer.Exit(1)


def _scored(llm: LLM, rows: Iterator[Row], adapter: str | None) -> Iterator[tuple[Row, ScoreOutput | str]]:
    """Each row with its output, or why there is none, in order."""
    read: deque[Row] = deque()

    def scorables() -> Iterator[Any]:
        for row in rows:
            read.append(row)
            if row.ask is not None:
                ask = row.ask
                yield ask.prompt if ask.continuation is None else (ask.prompt, ask.continuation)

    for output in llm.score_iter(scorables(), in_order=True, adapter=adapter, on_error="return"):
        while read[0].error is not None:
            row = read.popleft()
            yield row, str(row.error)
        row = read.popleft()
        yield row, _or_error(row, output)
    yield from ((row, str(row.error)) for row in read)


def _rolling(llm: LLM, rows: Iterator[Row], adapter: str | None) -> Iterator[tuple[Row, ScoreOutput | str]]:
    while some := list(islice(rows, AT_ONCE)):
        for row in some:
            if row.ask is not None and row.ask.continuation is not None:
                raise ValueError(f"{row.where}: --rolling scores whole texts, and this row has a continuation")
        texts = [row.ask.prompt for row in some if row.ask is not None and row.ask.prompt]
        outputs = iter(llm.loglikelihood_rolling(texts, adapter=adapter, use_tqdm=False)) if texts else iter(())
        for row in some:
            if row.ask is None:
                yield row, str(row.error)
            else:
                yield row, _or_error(row, next(outputs)) if row.ask.prompt else f"{row.where}: the text is empty"


def _or_error(row: Row, output: ScoreOutput) -> ScoreOutput | str:
    return output if output.error is None else f"{row.where}: {output.error}"


def _record(output: ScoreOutput) -> dict[str, Any]:
    return {
        "logprob": output.logprob,
        "tokens": len(output.token_ids),
        "is_greedy": output.is_greedy,
        "perplexity": output.perplexity,
        "word_perplexity": output.word_perplexity,
        "byte_perplexity": output.byte_perplexity,
    }
