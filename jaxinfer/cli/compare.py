"""`jaxinfer compare`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from jaxinfer.cli.console import say_error
from jaxinfer.cli.options import BASE_QUANTIZATION, JSON, ModelOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.compare import Price
    from jaxinfer.compare_pooled import ClassPrice, VectorPrice

    AnyPrice = Price | VectorPrice | ClassPrice

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
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A low-rank one, folder or hub id: beside the weights, and merged into them."),
    ] = None,
    base_quantization: BASE_QUANTIZATION = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Compare at most so many tokens.")] = 4096,
    questions: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of a packaged model: ask it so many held-out questions too.")
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
    next token's distribution from the unquantized model's, in nats. Models that make vectors or classes are compared
    with themselves in float32. Without --data, the packaged models are compared on their own held-out questions. A
    scheme that this model can't have is said, and the others are compared; exit code 1.

    With --adapter all is compared with the model and the adapter beside its weights: what merging costs, in floats and
    where the sum is quantized, and what quantized weights with the adapter beside them do. Folders have it merged.
    """
    from jaxinfer.batch.parse import Parser
    from jaxinfer.batch.readers import records
    from jaxinfer.batch.sources import find_sources
    from jaxinfer.checkpoint.hub import resolve
    from jaxinfer.demo import MODEL_DIR, PACKAGED
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
    every = known if adapter is None else list(SCHEMES)
    separator = ";" if schemes is not None and {";", "="} & set(schemes) else ","
    names = every if schemes is None else [name.strip() for name in schemes.split(separator)]
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
    if options.get("adapters"):
        raise ValueError(f"adapters is {options['adapters']!r}: one is compared here, --adapter DIR")
    adapted: dict[str, Any] = {
        "adapter": None if adapter is None else resolve(adapter),
        "base_quantization": None if base_quantization is None else parse_quantization(base_quantization),
    }
    model = next((folder for folder in PACKAGED if folder == Path(model).resolve()), model)
    packaged = model in PACKAGED
    if data is not None:
        rows = [Parser("score", SamplingParams()).parse(record) for record in records(find_sources([data]))]
        texts = [str(row.ask.prompt) + str(row.ask.continuation or "") for row in rows if row.ask is not None]
        if len(texts) < len(rows):
            raise ValueError(next(row.error for row in rows if row.ask is None))
    elif packaged:
        from jaxinfer.demo.questions import held_out_questions

        asked = held_out_questions(1000, 1)
        texts = [q.text if model != MODEL_DIR else f"{q.text} {q.answer}" for q in asked]
    else:
        raise ValueError("there is nothing to compare on: give texts with --data FILE")
    right = _right(questions) if packaged and questions else None
    with verbosity.apply(plain=True) as progress:
        progress("starting JAX")
        from jaxinfer.compare import compare as prices
        from jaxinfer.engine.loading import open_model
        from jaxinfer.models.tasks import GENERATE

        results: list[AnyPrice] = []
        if schemes is None and open_model(model, **options).task != GENERATE:
            names = [name for name in names if not name.startswith("kv-")]
        errors: dict[str, str] = {}

        def failed(scheme: str, error: Exception) -> None:
            errors[scheme] = " ".join(str(error).split())
            progress.hide()
            say_error(f"{scheme}: {error}")

        options["on_progress"] = progress
        wanted = adapted | {"max_tokens": max_tokens, "right": right, "on_error": failed}
        try:
            for price in prices(model, names, texts, **wanted, **options):
                results.append(price)
                progress(f"compared {_named(price)}")
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
        from jaxinfer.demo.evaluate import answered

        _, answers = answered(llm, questions, 1, use_tqdm=False)
        return sum(answers) / len(answers)

    return right


# By the fields of prices: what a column is called, and how a number is shown.
COLUMNS = {
    "kl_mean": ("KL mean", "{:.2e}"),
    "kl_p99": ("KL p99", "{:.2e}"),
    "top1": ("same top-1", "{:.2%}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "cosine_min": ("worst cosine", "{:.6f}"),
    "cosine_mean": ("mean cosine", "{:.6f}"),
    "nearest": ("same nearest", "{:.2%}"),
    "rank": ("rank correlation", "{:.4f}"),
    "same": ("same class", "{:.2%}"),
    "change_max": ("worst change", "{:.2e}"),
    "change_mean": ("mean change", "{:.2e}"),
    "weight_bytes": ("weights MB", "{:.1f}"),
    "cache_bytes_per_token": ("cache B/token", "{}"),
    "decode_rate": ("decode tokens/s", "{:.1f}"),
    "rate": ("texts/s", "{:.0f}"),
    "exact_match": ("right answers", "{:.2%}"),
}


def _named(price: AnyPrice) -> str:
    from jaxinfer.compare import named

    return named(price.scheme and price.scheme.rstrip("/").rsplit("/", 1)[-1], getattr(price, "adapter", None))


def _print(prices: list[AnyPrice]) -> None:
    from rich.console import Console
    from rich.table import Table

    of = [dataclasses.asdict(price) for price in prices]
    names = [name for name in COLUMNS if of[0].get(name) is not None]
    unit = "tokens" if "tokens" in of[0] else "texts"
    table = Table("", *(COLUMNS[name][0] for name in names), title=f"on {of[0][unit]} {unit}")
    for column in table.columns[1:]:
        column.justify = "right"
    for price, fields in zip(prices, of, strict=True):
        values = fields | {"weight_bytes": fields["weight_bytes"] / MB}
        table.add_row(_named(price), *(COLUMNS[name][1].format(values[name]) for name in names))
    Console().print(table)


def _draw(prices: list[AnyPrice], axes: Any) -> None:
    losses = {"kl_mean": "mean KL divergence, nats", "cosine_min": "1 - worst cosine", "change_mean": "mean change"}
    name = next(name for name in losses if hasattr(prices[0], name))
    for price in prices[1:]:
        value = getattr(price, name)
        loss = max(1 - value if name == "cosine_min" else value, 1e-9)
        axes.scatter(price.weight_bytes / MB, loss)
        axes.annotate(_named(price), (price.weight_bytes / MB, loss))
    axes.axvline(prices[0].weight_bytes / MB, color="grey", ls=":", label="as it is")
    axes.set(yscale="log", xlabel="weights, MB", ylabel=losses[name])
    axes.grid(alpha=0.3)
    axes.legend()
