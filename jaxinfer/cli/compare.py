"""`jaxinfer compare`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from jaxinfer.cli.console import say_error
from jaxinfer.cli.options import JSON, ModelOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.compare import Price

MB = 1e6


@grouped
def compare(
    base: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As --model: a folder or hub id; else the packaged model.")
    ] = None,
    *,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts to compare on: .txt (one a line), .jsonl, .csv, .parquet."),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of weights, of the cache (kv-int8), dtypes, or folders (./DIR); else all. With a ; between them, "
            "patterns too: 'int4;*.mlp.*=int4,*=int8'.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Compare at most so many tokens.")] = 4096,
    questions: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the packaged model: ask it so many held-out questions too.")
    ] = 500,
    as_json: JSON = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw quality over bytes (pip install '.\\[plot]').")
    ] = None,
    load: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """What quantization costs and saves: each scheme beside the model as it is, on texts of yours.

    Folders are the model in another form, as `jaxinfer convert` and `quantize` write it. KL is the divergence of the
    next token's distribution from the unquantized model's, in nats. Without --data, the packaged model is compared on
    its own held-out questions. A scheme that this model can't have is said, and the others are compared; exit code 1.
    """
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.readers import records
    from jaxinfer.batch.sources import find_sources
    from jaxinfer.checkpoint.hub import resolve
    from jaxinfer.demo import MODEL_DIR
    from jaxinfer.engine.config import KVCacheDType
    from jaxinfer.plan.plot import check_plot, draw
    from jaxinfer.quantization.schemes import SCHEMES, parse_quantization
    from jaxinfer.sampling.params import SamplingParams

    if base is not None:
        if load.model is not None:
            raise ValueError(f"the model is given twice: {base} and --model {load.model}")
        load = dataclasses.replace(load, model=base)
    known = [*SCHEMES, *(f"kv-{name}" for name in get_args(KVCacheDType) if name != "auto")]
    known += ["bfloat16", "float16"]
    separator = ";" if schemes is not None and {";", "="} & set(schemes) else ","
    names = known if schemes is None else [name.strip() for name in schemes.split(separator)]
    for name in names:
        if "/" in name:
            resolve(name)
        elif "=" in name:
            parse_quantization(name)
        elif name not in known:
            raise ValueError(f"--schemes has {name!r}: there are {', '.join(known)}, and folders such as ./{name}")
    if plot is not None:
        check_plot(plot)
    model, options = load.loading()
    for name in ("quantization", "kv_cache_dtype", "compiled"):
        if (value := options.get(name)) is not None:
            raise ValueError(f"{name} is {value!r}, which is of one scheme: here it is --schemes")
    packaged = model == MODEL_DIR
    if data is not None:
        rows = [Parser("score", SamplingParams()).parse(record) for record in records(find_sources([data]))]
        texts = [str(row.ask.prompt) + str(row.ask.continuation or "") for row in rows if row.ask is not None]
        if len(texts) < len(rows):
            raise ValueError(next(row.error for row in rows if row.ask is None))
    elif packaged:
        from jaxinfer.demo.questions import held_out_questions

        texts = [f"{question.text} {question.answer}" for question in held_out_questions(1000, 1)]
    else:
        raise ValueError("there is nothing to compare on: give texts with --data FILE")
    right = _right(questions) if packaged and questions else None
    with verbosity.apply(plain=True) as progress:
        progress("starting JAX")
        from jaxinfer.compare import compare as prices

        results: list[Price] = []
        errors: dict[str, str] = {}

        def failed(scheme: str, error: Exception) -> None:
            errors[scheme] = " ".join(str(error).split())
            progress.hide()
            say_error(f"{scheme}: {error}")

        options["on_progress"] = progress
        try:
            for price in prices(model, names, texts, max_tokens=max_tokens, right=right, on_error=failed, **options):
                results.append(price)
                progress(f"compared {price.scheme or 'the model as it is'}")
        finally:  # what is known is said, after Ctrl-C too
            progress.hide()
            if as_json and results:
                figures = [dataclasses.asdict(price) for price in results]
                print(json.dumps({"model": str(model), "prices": figures, "errors": errors}))
            elif results:
                _print(results)
        if plot is not None:
            draw(lambda axes: _draw(results, axes), plot)
    if errors:
        raise typer.Exit(1)


def _right(questions: int) -> Any:
    def right(llm: Any) -> float:
        from jaxinfer.demo.evaluate import ask
        from jaxinfer.demo.questions import held_out_questions

        answers = ask(llm, held_out_questions(questions, 1), use_tqdm=False)
        return sum(answers) / len(answers)

    return right


def _print(prices: list[Price]) -> None:
    from rich.console import Console
    from rich.table import Table

    exact = prices[0].exact_match is not None
    heads = ["KL mean", "KL p99", "same top-1", "perplexity", "weights MB", "cache B/token", "decode tokens/s"]
    table = Table("", *heads, *(["right answers"] if exact else []), title=f"on {prices[0].tokens} tokens")
    for column in table.columns[1:]:
        column.justify = "right"
    for price in prices:
        table.add_row(
            (price.scheme or "as it is").rstrip("/").rsplit("/", 1)[-1],
            f"{price.kl_mean:.2e}",
            f"{price.kl_p99:.2e}",
            f"{price.top1:.2%}",
            f"{price.perplexity:.4f}",
            f"{price.weight_bytes / MB:.1f}",
            str(price.cache_bytes_per_token),
            f"{price.decode_rate:.1f}",
            *([f"{price.exact_match:.2%}"] if exact else []),
        )
    Console().print(table)


def _draw(prices: list[Price], axes: Any) -> None:
    for price in prices[1:]:
        axes.scatter(price.weight_bytes / MB, max(price.kl_mean, 1e-9))
        axes.annotate(price.scheme, (price.weight_bytes / MB, max(price.kl_mean, 1e-9)))
    axes.axvline(prices[0].weight_bytes / MB, color="grey", ls=":", label="as it is")
    axes.set(yscale="log", xlabel="weights, MB", ylabel="mean KL divergence, nats")
    axes.grid(alpha=0.3)
    axes.legend()
