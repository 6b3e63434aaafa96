"""What the commands share that make numbers of whole texts: which model, which texts, where the numbers go."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.console import say_error
from jaxinfer.cli.options import JSON, MODEL, EngineOptions, ModelOptions, Verbosity
from jaxinfer.demo import CLASSIFIER_DIR, ENCODER_DIR
from jaxinfer.engine.config import EngineConfig

if TYPE_CHECKING:
    from jaxinfer.batch.formats import Format
    from jaxinfer.batch.results import Results
    from jaxinfer.batch.row import Row, Task
    from jaxinfer.batch.work import Work, Worker
    from jaxinfer.batch.writer import Result

VECTORS = "Vectors (what is not given is as the checkpoint says)"
SUFFIXES = (".npy", ".jsonl", ".parquet")
PACKAGED = {"embed": ENCODER_DIR, "classify": CLASSIFIER_DIR, "rerank": ENCODER_DIR}
WRITTEN = tuple(f"*{suffix}" for suffix in SUFFIXES)

TEXTS = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT|FILE",
        help="Texts, or a file of them: .txt (one a line), .jsonl, .csv, .parquet; - is stdin, JSONL.",
    ),
]


@dataclass(frozen=True)
class NumberOptions:
    """Which texts have numbers, and where these go."""

    truncate: Annotated[
        bool, typer.Option("--truncate", help="Of texts that are too long, cut off the end; else they are errors.")
    ] = False
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="F", show_default=False, help=f"Write a file: {', '.join(WRITTEN)}."),
    ] = None
    output_prefix: Annotated[
        str,
        typer.Option(
            metavar="P",
            show_default=False,
            help="Before the names of result columns, where the rows of FILE have such columns.",
        ),
    ] = ""
    as_json: JSON = False

    def suffix(self, column: str | None) -> str | None:
        """Of what is to be written. Raises ValueError if it can't be."""
        if self.output is None:
            return None
        suffixes = SUFFIXES if column else SUFFIXES[1:]
        suffix = os.path.splitext(self.output)[1].lower()
        if suffix not in suffixes:
            raise ValueError(f"--output {self.output}: its name must end in {', '.join(suffixes)}")
        if self.as_json:
            raise ValueError("--json prints what --output writes: give only one of them")
        from jaxinfer.places import check_new, local

        path = local(self.output, "--output")
        if not os.path.isdir(os.path.dirname(path)):
            raise ValueError(f"--output {self.output}: there is no folder {os.path.dirname(path)}")
        check_new(path, f"--output {self.output}")
        if suffix == ".parquet":
            from jaxinfer.batch.parquet import parquet_modules

            parquet_modules()
        return suffix


@dataclass(frozen=True)
class TextModelOptions(ModelOptions):
    """Which model, of those that keep no cache."""

    options: Annotated[
        EngineConfig,
        EngineOptions(
            MODEL, "revision", "tokenizer", "dtype", "quantization", "max_model_len", "mesh", "max_num_batched_tokens"
        ),
    ] = dataclasses.field(default_factory=EngineConfig)


def named(load: ModelOptions, task: Task) -> ModelOptions:
    """With the packaged model that does the task, where none is named."""
    packaged = PACKAGED.get(task)
    return load if packaged is None or load.model or load.config else dataclasses.replace(load, model=str(packaged))


@dataclass(frozen=True)
class VectorOptions:
    """How texts become vectors; None is not given."""

    prompt_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Put this prompt of the checkpoint before each.", rich_help_panel=VECTORS),
    ] = None
    prompt: Annotated[str | None, typer.Option(metavar="P", help="Put this before each.", rich_help_panel=VECTORS)] = (
        None
    )
    dimensions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep only so many.", rich_help_panel=VECTORS)
    ] = None
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="To length 1, after the cut.", rich_help_panel=VECTORS),
    ] = None

    @property
    def changes(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def is_file(argument: str) -> bool:
    """Whether it names rows, and is no text. A name that ends as such files do is one, be it there or not."""
    from jaxinfer.batch.sources import KINDS

    known = os.path.splitext(argument)[1].lower() in (*KINDS, ".gz", ".zst") and not any(map(str.isspace, argument))
    return argument == "-" or known or os.path.exists(argument)


def rows_of(task: Task, arguments: list[str], names: tuple[str, ...] = ("text",)) -> Iterator[Row]:
    """Those of a file, or of arguments: each has so many of them as there are `names`. Raises ValueError and OSError at
    once for a file that is not there."""
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.readers import records
    from jaxinfer.batch.row import Record
    from jaxinfer.batch.sources import find_sources
    from jaxinfer.sampling.params import SamplingParams

    parser = Parser(task, SamplingParams())
    if len(arguments) == 1 and is_file(arguments[0]):
        return map(parser.parse, records(find_sources(arguments)))
    values = [dict(zip(names, arguments[i:], strict=False)) for i in range(0, len(arguments), len(names))]
    return (parser.parse(Record(i, f"text {i}", value)) for i, value in enumerate(values))


def run(
    task: Task,
    rows: Iterable[Row],
    line: Callable[[Worker, Row, dict[str, Any]], str],
    numbers: NumberOptions,
    load: ModelOptions,
    verbosity: Verbosity,
    *,
    head: str = "",
    column: str | None = None,
    precision: str = "float32",
    **params: Any,
) -> None:
    """Prints or writes what a task makes of rows; ends the command with 1 if some have errors.

    line: of what is new of a row, for people. head: the line above them. column: of the numbers that a *.npy has; None:
    there is none. precision: of these, see `tasks.similarity.quantized`. params: see `batch.row.POOLING`. Raises
    ValueError and OSError.
    """
    suffix, as_json, output = numbers.suffix(column), numbers.as_json, numbers.output
    from jaxinfer.tasks.similarity import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"--precision is {precision!r:.100}: it must be one of {', '.join(PRECISIONS)}")
    if precision != PRECISIONS[0] and suffix != ".npy":
        raise ValueError(f"--precision {precision} is for arrays: give --output F.npy, too")
    from jaxinfer.batch.results import Results
    from jaxinfer.batch.row import check_pooling

    if suffix in (None, ".npy"):  # columns of theirs are written nowhere
        rows = (dataclasses.replace(row, columns={}) for row in rows)
    prefix, given = numbers.output_prefix, check_pooling(task, params, token_ids=False)
    # Vectors as lists are for JSON.
    format: Format = "jsonl" if as_json or suffix == ".jsonl" else "parquet"
    results = Results(task, format=format, prefix=prefix, logits=given.get("use_activation") is False)
    with verbosity.apply() as progress, named(load, task).load(progress, runner="pooling") as llm:
        from jaxinfer.batch.workers import WORKERS

        worker = WORKERS[task](llm, results, seed=0, truncate=numbers.truncate, params=given)
        names = [name for name in worker.results.kinds() if name != f"{prefix}error"]
        done: list[dict[str, Any]] = []
        errors = 0
        if head and suffix is None and not as_json:
            progress.hide()
            print(head)
        for row, result in _in_order(worker, rows):
            progress.hide()
            new = {name.removeprefix(prefix): result.columns.get(name) for name in names}
            if suffix is not None:
                done.append(result.columns)
            if result.error is not None:
                errors += 1
                print(json.dumps({"index": row.index, "error": result.error})) if as_json else say_error(result.error)
            elif as_json:
                print(json.dumps({"index": row.index, **new}), flush=True)
            elif suffix is None:
                print(line(worker, row, new), flush=True)
    if output is not None:
        from jaxinfer.checkpoint.output import whole
        from jaxinfer.places import local

        content = _content(suffix, done, worker.results, f"{prefix}{column}", precision)
        with whole(local(output, "--output")) as temporary, open(temporary, "wb") as file:
            file.write(content)
        if not verbosity.quiet:
            typer.echo(f"jaxinfer: {output}: {len(done)} rows{f', {errors} with errors' * bool(errors)}", err=True)
    if errors:
        raise typer.Exit(1)


def _in_order(worker: Worker, rows: Iterable[Row]) -> Iterator[tuple[Row, Result]]:
    """Each with its result."""
    read: deque[tuple[Row, Result | None]] = deque()

    def works() -> Iterator[Work]:
        for row in rows:
            work = worker.prepare(row, row.index)
            read.append((row, worker.results.failed(row, work) if isinstance(work, str) else None))
            if not isinstance(work, str):
                yield work

    for work, result in worker.run(works()):
        while (first := read.popleft())[1] is not None:
            yield first[0], first[1]
        yield work.row, result
    yield from ((row, result) for row, result in read if result is not None)


def _content(suffix: str | None, done: list[dict[str, Any]], results: Results, column: str, precision: str) -> bytes:
    """Of a file. Rows with an error have no numbers: in an array of float32 they are NaN, in others 0."""
    from jaxinfer.batch.parquet import encode
    from jaxinfer.batch.tables import column_kinds, fitting
    from jaxinfer.batch.values import to_json

    if suffix == ".jsonl":
        return "".join(f"{to_json(columns)}\n" for columns in done).encode()
    if suffix == ".parquet":
        kinds = column_kinds(done, results.kinds())
        return encode(fitting(done, kinds, results.others), kinds)
    import numpy as np

    from jaxinfer.tasks.similarity import quantized

    made = np.array([columns[column] is not None for columns in done], bool)
    vectors = [columns[column] for columns in done if columns[column] is not None]
    numbers = quantized(np.stack(vectors) if vectors else np.zeros((0, results.size), np.float32), precision)
    nothing = np.nan if numbers.dtype == np.float32 else 0
    array = np.full((len(done), numbers.shape[1]), nothing, numbers.dtype)
    array[made] = numbers
    np.save(file := io.BytesIO(), array)
    return file.getvalue()
