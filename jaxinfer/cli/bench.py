"""`jaxinfer bench throughput`, `jaxinfer bench latency` and `jaxinfer bench serve`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from jaxinfer.cli.console import Progress
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import JSON, AdapterOptions, EngineOptions, ModelOptions, Verbosity, grouped
from jaxinfer.engine.config import EngineConfig

if TYPE_CHECKING:
    from jaxinfer.benchmark import Trace, Work
    from jaxinfer.llm import LLM

Run = TypeVar("Run")

REQUESTS, BATCHING = "Requests: random tokens, and no end-of-text ends them", "Batching"
LATENCIES = {
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token (TPOT)",
    "itl": "inter-token latency (ITL)",
    "e2el": "end to end (E2EL)",
}


@dataclass(frozen=True)
class BatchingOptions:
    """How the engine batches, as in `LLM`."""

    options: Annotated[EngineConfig, EngineOptions(BATCHING, "max_num_seqs", "max_num_batched_tokens")] = (
        dataclasses.field(default_factory=EngineConfig)
    )

    def load(self, model: ModelOptions, progress: Progress, **more: Any) -> LLM:
        """The model in memory, with `more` options of `LLM`."""
        return model.load(progress, **self.options, **more)


NumPrompts = Annotated[int, typer.Option(metavar="N", min=1, help="How many.", rich_help_panel=REQUESTS)]
InputLen = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a prompt.", rich_help_panel=REQUESTS)]
OutputLen = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens that continue it.", rich_help_panel=REQUESTS)]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of prompts and arrivals.", rich_help_panel=REQUESTS)]

RequestRate = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Requests a second, at random times (a Poisson process); without it, all come at once.",
        rich_help_panel=REQUESTS,
    ),
]

bench = typer.Typer()


@bench.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure the throughput or the latency of a model on this machine, or of a server."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
@grouped
def throughput(
    num_prompts: NumPrompts = 128,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    seed: Seed = 0,
    as_json: JSON = False,
    *,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: AdapterOptions,
    hosts: HostOptions,
    verbosity: Verbosity,
) -> None:
    """Tokens a second when all requests are there from the beginning.

    Adapters are taken in turns.
    """
    with verbosity.apply(plain=True) as progress:
        hosts.join()
        llm = batching.load(load, progress, **adapters.loading)
        from jaxinfer import benchmark

        benchmark.check_lengths(llm, input_len, output_len)

        def work(i: int) -> list[Work]:
            lengths = [input_len] * num_prompts, [output_len] * num_prompts
            random = benchmark.random_work(llm.model.config.vocab_size, *lengths, [seed, i])
            return benchmark.in_turns(random, list(adapters.folders))

        def run(i: int) -> dict[str, float]:
            progress(f"generating {num_prompts * output_len} tokens")
            return benchmark.throughput(llm, work(i))

        llm.engine.runner.warm_up(benchmark.programs_together(llm, work(0)))
        (figures,) = _measured(llm, run, 1)
    if as_json:
        print(json.dumps(figures))
    else:
        names = {"requests": "requests", "tokens": "total tokens", "output_tokens": "output tokens"}
        rows = [[text, f"{figures[f'{name}_per_second']:.2f}"] for name, text in names.items()]
        _print_table(["", "a second"], rows)


@bench.command()
@grouped
def latency(
    num_prompts: NumPrompts = 8,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    request_rate: RequestRate = None,
    num_iters: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often, after once to warm up.", rich_help_panel=REQUESTS)
    ] = 10,
    seed: Seed = 0,
    as_json: JSON = False,
    *,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: AdapterOptions,
    hosts: HostOptions,
    verbosity: Verbosity,
) -> None:
    """How long requests take: to the first token, per token after it, and to the end.

    Waiting for a place in the batch counts. ITL is the time between pieces of an output, which may be several tokens.
    Adapters are taken in turns.
    """
    with verbosity.apply(plain=True) as progress:
        _check_rate(request_rate)
        hosts.join()
        llm = batching.load(load, progress, **adapters.loading)
        from jaxinfer import benchmark

        benchmark.check_lengths(llm, input_len, output_len)

        def run(i: int) -> list[Trace]:
            progress(f"run {i} of {num_iters}" if i else "run to warm up")
            # Other prompts each time: the prefix cache would know them.
            lengths = [input_len] * num_prompts, [output_len] * num_prompts
            work = benchmark.random_work(llm.model.config.vocab_size, *lengths, [seed, i])
            work = benchmark.in_turns(work, list(adapters.folders))
            arrivals = [0.0] * num_prompts
            if request_rate is not None:
                arrivals = benchmark.poisson_arrivals(num_prompts, request_rate, [seed, i])
            if not i:
                llm.engine.runner.warm_up(benchmark.programs_in_any_order(llm, work))
            return benchmark.serve(llm, work, arrivals)

        run(0)
        runs = _measured(llm, run, num_iters)
        figures: dict[str, Any] = benchmark.latency(runs)
        if request_rate is None:
            figures |= benchmark.batch_latency(runs)
    if as_json:
        print(json.dumps(figures))
    else:
        _print_table(["milliseconds", "mean", "median", "p90", "p99"], _latency_rows(figures))


@bench.command()
@grouped
def serve(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Of a server that speaks OpenAI, as http://127.0.0.1:8000.")
    ],
    num_prompts: NumPrompts = 64,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    request_rate: RequestRate = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="At most so many at a time: others come when one of these is done, and their times begin then.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts have token ids below.", rich_help_panel=REQUESTS)
    ] = 256,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Count requests within limits of ttft, tpot and e2el; may be repeated."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="JAXINFER_API_KEY", help="Of the server.")
    ] = None,
    seed: Seed = 0,
    as_json: JSON = False,
    *,
    verbosity: Verbosity,
) -> None:
    """How long requests to a server take, as its clients see it.

    Requests come at random times whether or not others are done, unless --max-concurrency says so. ITL is the time
    between events of a stream.
    """
    with verbosity.apply(plain=True) as progress:
        _check_rate(request_rate)
        limits = dict(map(_limit, goodput or ()))
        import asyncio

        from jaxinfer import benchmark
        from jaxinfer.server import measure

        server = measure.Server(url, api_key)
        work = benchmark.random_work(vocab_size, [input_len] * num_prompts, [output_len] * num_prompts, seed)
        arrivals = [0.0] * num_prompts
        if request_rate is not None:
            arrivals = benchmark.poisson_arrivals(num_prompts, request_rate, seed)

        async def run() -> list[Trace]:
            async with server:
                model = await server.model()
                progress("one request to warm up")
                await measure.serve(server, model, work[:1], [0.0])
                progress(f"{num_prompts} requests")
                return await measure.serve(server, model, work, arrivals, max_concurrency)

        try:
            traces = asyncio.run(run())
        except* (ValueError, OSError) as errors:
            raise ValueError(f"{url}: {errors.exceptions[0]}") from None
        figures: dict[str, Any] = benchmark.latency([traces])
        if limits:
            figures["request_goodput"] = measure.goodput(traces, figures["duration"], limits)
    if as_json:
        print(json.dumps(figures))
    else:
        _print_table(["milliseconds", "mean", "median", "p90", "p99"], _latency_rows(figures))
        rates = {
            "request_throughput": "requests",
            "output_throughput": "output tokens",
            "request_goodput": "good requests",
        }
        _print_table(["", "a second"], [[text, f"{figures[n]:.2f}"] for n, text in rates.items() if n in figures])


def _limit(text: str) -> tuple[str, float]:
    name, _, milliseconds = text.partition(":")
    try:
        value = float(milliseconds)
    except ValueError:
        value = -1.0
    if name not in ("ttft", "tpot", "e2el") or not value > 0:
        raise ValueError(f"--goodput is {text!r}: it must be as ttft:200, tpot:50 or e2el:2000, in milliseconds")
    return name, value


def _check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"--request-rate is {rate}: it must be a finite number above 0")


def _measured(llm: LLM, run: Callable[[int], Run], count: int) -> list[Run]:
    """Of `run(1)` and so on those in which nothing was compiled."""
    runs: list[Run] = []
    for i in itertools.count(1):
        before = llm.compile_seconds
        measurement = run(i)
        if llm.compile_seconds == before:
            runs.append(measurement)
        if len(runs) == count:
            break
    return runs


def _latency_rows(figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    if "avg_latency" in figures:
        seconds = [figures["avg_latency"], *(figures["percentiles"][p] for p in ("50", "90", "99"))]
        rows.append(["until all are done", *(f"{1000 * s:.2f}" for s in seconds)])
    for name, text in LATENCIES.items():
        if f"mean_{name}_ms" in figures:  # there is no second token with --output-len 1
            statistics = (figures[f"{statistic}_{name}_ms"] for statistic in ("mean", "median", "p90", "p99"))
            rows.append([text, *(f"{ms:.2f}" for ms in statistics)])
    return rows


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
