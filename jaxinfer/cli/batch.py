"""`jaxinfer batch`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.console import say_error
from jaxinfer.cli.guided import GuidedOptions
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import ModelOptions, PromptAdapterOptions, SamplingOptions, Verbosity, grouped
from jaxinfer.cli.rerank import TOP_N
from jaxinfer.cli.texts import VectorOptions, named

if TYPE_CHECKING:
    from jaxinfer.batch import Summary

OUTPUT, STOPPING = "Output", "Stopping, and more than one machine"


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and how."""

    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            show_default=False,
            help="A folder for parts, or a file *.jsonl, *.csv (also .gz, .zst), *.parquet; local, gs:// or s3://.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    format: Annotated[
        Literal["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "parquet"] | None,
        typer.Option(help="Of a folder's parts; without it, jsonl.", rich_help_panel=OUTPUT),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Remove what another job has written to OUT; the same job goes on.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    rows_per_part: Annotated[
        int, typer.Option(metavar="N", min=1, help="A part is written when it is complete.", rich_help_panel=OUTPUT)
    ] = 1000
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids", help="Also write token ids (scoring: and their log-probabilities).", rich_help_panel=OUTPUT
        ),
    ] = False
    output_prefix: Annotated[
        str,
        typer.Option(
            metavar="P",
            show_default=False,
            help="Before the names of result columns, where the input has such columns.",
            rich_help_panel=OUTPUT,
        ),
    ] = ""


@dataclass(frozen=True)
class StoppingOptions:
    """When a job ends before its end, and what is its share."""

    max_errors: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="End when more rows have errors; up to N, the exit code is 0. Without it the job ends with all rows "
            "done, and with exit code 1 if any has an error.",
            rich_help_panel=STOPPING,
        ),
    ] = None
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="After SIGTERM: to finish the part that is next.", rich_help_panel=STOPPING
        ),
    ] = 20.0
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do every N-th part, from the I-th on (0/N is the first); by itself on hosts of a TPU slice or Slurm.",
            rich_help_panel=STOPPING,
        ),
    ] = None


@grouped
def batch(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, globs, folders, URLs; - is stdin (JSON Lines).")
    ],
    *,
    task: Annotated[
        Literal["generate", "chat", "score", "embed", "classify", "rerank"], typer.Option(help="What to do with a row.")
    ] = "generate",
    prompt_template: Annotated[
        str | None, typer.Option(metavar="T", help="Makes prompts of columns: 'Translate: {text}'.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Of prompts that are too long, keep the end; else they are errors.")
    ] = False,
    logits: Annotated[bool, typer.Option("--logits", help="When classifying: logits, and not probabilities.")] = False,
    top_n: TOP_N = None,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="Log-probabilities of the tokens, and of the N likeliest ones.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make one output of those of a job's shards, which INPUT... names.")
    ] = False,
    output: OutputOptions,
    stopping: StoppingOptions,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: PromptAdapterOptions,
    hosts: HostOptions,
    sampling: SamplingOptions,
    guided: GuidedOptions,
    vectors: VectorOptions,
    verbosity: Verbosity,
) -> None:
    """Run all rows of files through a model, and write a result for each; killed, the same command goes on.

    Rows: {"prompt"}, {"messages"}, {"text"}, {"prompt", "continuation"}, {"text", "text_pair"} or {"query",
    "documents"}, those that are continued with "params" if they have their own, or OpenAI batch lines; in .jsonl, .csv,
    .txt (also .gz, .zst) and .parquet. Rows that make or score text may name theirs of several --adapter in a column
    "adapter". A JSON summary is printed at the end. Exit codes: 0 all is well, 1 rows have
    errors (see --max-errors), 2 nothing could be done, 143 stopped by SIGTERM.
    """
    from jaxinfer.places import check_kept

    verbosity.apply().hide()
    if merge:
        if output.output is not None:
            raise ValueError("--merge: INPUT... are the outputs of shards, the first of which gets all; no --output")
        from jaxinfer.batch import merge as merge_shards

        _print(merge_shards(*inputs))
        return
    if output.output is None:
        raise ValueError("--output is missing: a folder, or a file *.jsonl, *.csv or *.parquet")
    check_kept(output.output, "output")
    changes = sampling.changes | guided.changes
    model, options = named(load, task).loading(**batching.options, **adapters.loading, seed=changes.pop("seed", None))
    if logprobs is not None:
        changes["logprobs"] = logprobs
    if task not in ("generate", "chat") and changes:
        option = next(iter(changes)).replace("_", "-")
        raise ValueError(f"--{option}: nothing is sampled by the task {task}; leave it out")
    pooling = {**vectors.changes, "use_activation": False if logits else None, "top_n": top_n}
    from jaxinfer.batch import TooManyErrors, run

    with _terminable(stopping.grace) as stop, _to_go_on():
        hosts.join(unasked=False)  # hosts of a TPU pod have their shards, and a model each
        try:
            summary = run(
                inputs,
                output.output,
                model=model,
                task=task,
                sampling_params=changes,
                pooling_params=pooling,
                prompt_template=prompt_template,
                adapter=adapters.of_rows,
                truncate=truncate,
                token_ids=output.token_ids,
                output_prefix=output.output_prefix,
                format=output.format,
                overwrite=output.overwrite,
                rows_per_part=output.rows_per_part,
                shard=stopping.shard,
                max_errors=stopping.max_errors,
                show_progress=not verbosity.quiet,
                stop=stop,
                **options,
            )
        except TooManyErrors as error:
            say_error(error)
            raise typer.Exit(1) from None
        if not summary.complete:
            raise Terminated
    if not summary.seconds and not verbosity.quiet:
        print(f"jaxinfer: {summary.output} is complete already", file=sys.stderr)
    _print(summary)
    if summary.errors > (stopping.max_errors or 0):
        if not verbosity.quiet:
            print(f"jaxinfer: {summary.errors} of {summary.rows} rows have errors", file=sys.stderr)
        raise typer.Exit(1)


class Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminable(grace: float) -> Iterator[Callable[[], bool]]:
    """From now on SIGTERM is a request to stop, which what is given knows of; after `grace` seconds it is an order."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(*_: Any) -> None:
        asked.set()
        signal.setitimer(signal.ITIMER_REAL, max(grace, 1e-3))

    def order(*_: Any) -> None:
        raise Terminated

    def interrupt(*_: Any) -> None:
        # Raised in the middle of garbage collection it is lost: then it comes again.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, order)
    on_interrupt = signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked.is_set
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])


@contextlib.contextmanager
def _to_go_on() -> Iterator[None]:
    """Says how to go on after SIGTERM and Ctrl-C."""
    try:
        yield
    except (Terminated, KeyboardInterrupt) as end:
        print(f"jaxinfer: stopped; to go on: {shlex.join(['jaxinfer', *sys.argv[1:]])}", file=sys.stderr)
        if isinstance(end, Terminated):
            raise typer.Exit(128 + signal.SIGTERM) from None
        raise


def _print(summary: Summary) -> None:
    print(json.dumps(dataclasses.asdict(summary)))
