"""A batch job from its files to its parts: `run`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

from jaxinfer import distributed
from jaxinfer.batch.begin import begin_anew, check_apart, open_job, tidy
from jaxinfer.batch.columns import check_columns
from jaxinfer.batch.formats import Format, packing_of
from jaxinfer.batch.identity import model_fingerprint
from jaxinfer.batch.join import clean, finish
from jaxinfer.batch.manifest import AnotherJob, Manifest
from jaxinfer.batch.parquet import common_schema, parquet_modules
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.parts import Output
from jaxinfer.batch.progress import Progress
from jaxinfer.batch.readers import count_rows, records
from jaxinfer.batch.results import Results
from jaxinfer.batch.row import POOLING, Task, check_pooling
from jaxinfer.batch.shards import parse_shard
from jaxinfer.batch.sources import find_sources, need
from jaxinfer.batch.summary import Summary
from jaxinfer.batch.writer import Writer
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.engine.option import check_adapters
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.structured import StructuredOutputsParams
from jaxinfer.text.tokenizer import has_tokenizer

if TYPE_CHECKING:
    from jaxinfer.engine.config import EngineConfig
    from jaxinfer.llm import LLM


def run(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | LLM,
    task: Task = "generate",
    sampling_params: SamplingParams | Mapping[str, Any] | None = None,
    pooling_params: Mapping[str, Any] | None = None,
    prompt_template: str | None = None,
    adapter: str | None = None,
    truncate: bool = False,
    token_ids: bool = False,
    output_prefix: str = "",
    format: Format | None = None,
    overwrite: bool = False,
    rows_per_part: int = 1000,
    shard: str | None = None,
    max_errors: int | None = None,
    show_progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    **options: Unpack[EngineConfig],
) -> Summary:
    """Runs all rows of some files through a model, and writes a result for each, in their order.

    Killed at any moment and called again with the same arguments, it goes on after the last part that it wrote; the
    output is then what it would have been. Rows that can't be served become rows with an `error`.

    inputs: files, globs, folders, URLs, "-" for stdin: see `sources`. output: a folder, or a file *.jsonl, *.csv (each
    also as .gz or .zst), *.parquet; format: of a folder's parts, jsonl by default. overwrite: what another job has
    written there is removed; the same job goes on. model: a folder or hub id (`options` as for LLM), or an LLM.
    sampling_params: of rows that have none of their own; as a mapping, what differs from the checkpoint's (and from 256
    max_tokens; OpenAI's lines have OpenAI's defaults).
    pooling_params: of embed, classify and rerank, arguments of LLM's methods of these names (see `row.POOLING`).
    prompt_template: makes prompts of columns, "Translate: {text}".
    adapter: the name of one of the model's `adapters`, for rows that say nothing of it; None: the model itself.
    option seed: rows that sample and have no seed of their own get one that is made of it and their number.
    truncate: of prompts that are too long, keep BOS and the last tokens, so that max_tokens (at most half of the
    context) fit; of texts to embed, to classify and to rank, the first ones.
    token_ids: write them too; when scoring, also each one's log-probability. output_prefix: of the names of the result
    columns, where the input has such columns itself.
    rows_per_part: a part is in memory until it is complete. shard: "I/N", to do every N-th part (see `merge`).
    max_errors: raise TooManyErrors beyond so many rows with an error.
    stop: asked all the time; once it is true, the part that is the next one is finished, and no more.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line.
    """
    _check(task, rows_per_part, max_errors)
    pooling = check_pooling(task, pooling_params, token_ids)
    out = Output(os.fspath(output), format)
    if out.format == "parquet":
        parquet_modules()
    elif packing_of(out.format) == ".zst":
        need("zstandard", f"output {out.name}")
    changes = dataclasses.asdict(sampling_params) if isinstance(sampling_params, SamplingParams) else sampling_params
    wanted = SamplingParams().with_changes(**changes or {})
    if changes and "structured_outputs" in changes:  # as JSON has it, whatever class it is
        changes = {**changes, "structured_outputs": _as_given(wanted)}
    checker = Parser(task, SamplingParams(), changes, prompt_template)  # mistakes show before a model is loaded
    seed = 0 if task in POOLING else options.pop("seed", 0)
    group = distributed.group()
    if group is None or group.leads:
        out.check()  # before a model is downloaded
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(show_progress))
        folder = _folder(model, options)
        if group is not None and not group.leads:
            _load(folder, options)  # and no further: input and output are process 0's
        if task in ("generate", "chat") and not token_ids and not _gives_text(model, folder, options):
            raise ValueError(f"model {folder}: without a tokenizer there is no text to write; ask for token_ids too")
        sources = find_sources([os.fspath(path) for path in _listed(inputs)])
        check_apart(out, sources)
        logits = pooling.get("use_activation") is False
        results = Results(task, wanted, token_ids, out.format, folder.name, output_prefix, logits=logits)
        schema = common_schema(sources) if out.format == "parquet" else None
        shard_of = parse_shard(shard, {} if group is not None else os.environ)
        adapters = _adapters(model, options)
        names = {folder.name, *([os.fspath(model)] if isinstance(model, str | os.PathLike) else ())}
        if adapter is not None and (adapter not in adapters or task in POOLING):
            raise ValueError(f"adapter is {adapter!r:.80}: there are {', '.join(sorted(adapters)) or 'none'}")
        job = {
            "inputs": [{"name": s.name, "size": s.size, "fingerprint": s.fingerprint()} for s in sources],
            "model": _fingerprint(model, folder, options),
            "task": task,
            "sampling_params": dict(changes or {}),
            "pooling_params": pooling,
            "prompt_template": prompt_template,
            "adapters": {name: model_fingerprint(path) for name, path in adapters.items()},
            "adapter": adapter,
            "seed": seed,
            "truncate": truncate,
            "token_ids": token_ids,
            "output_prefix": output_prefix,
            "format": out.format,
            "rows_per_part": rows_per_part,
            "schema": None if schema is None else {field.name: str(field.type) for field in schema},
        }

        def begin(locked: bool = False) -> Manifest:
            try:
                return open_job(out, *shard_of, job)
            except AnotherJob:
                if not overwrite:
                    raise
                return begin_anew(out, shard_of[1], job) if locked else Manifest(*shard_of)

        manifest = begin()
        if not manifest.complete:
            check_columns(sources, checker, results)
            stack.enter_context(out.lock(manifest.name))
            manifest = begin(locked=True)  # another process may have gone on meanwhile
        if manifest.complete:
            clean(out, manifest)
            return Summary.of(out, manifest)
        tidy(out, manifest)
        manifest.save(out)  # before the model is loaded, which may take long: an output that can't be written shows now
        if manifest.finished:  # killed when there was only the end to do
            finish(out, manifest)
            return Summary.of(out, manifest)

        from jaxinfer.batch.loop import Loop  # JAX comes with it
        from jaxinfer.batch.workers import WORKERS
        from jaxinfer.llm import LLM

        if not isinstance(model, LLM):
            options.setdefault("on_progress", progress.say)
            if task in POOLING:
                options.setdefault("runner", "pooling")
            model = stack.enter_context(_load(folder, options))
        worker = WORKERS[task](model, results, seed=seed, truncate=truncate, params=pooling)
        try:
            manifest.take(worker.facts, out)
        except AnotherJob:
            if not overwrite:
                raise
            manifest = begin_anew(out, shard_of[1], job | worker.facts)
        if stop():
            return Summary.of(out, manifest)
        parser = Parser(task, worker.defaults, changes, prompt_template, adapters, adapter, names)
        writer = Writer(out, manifest, max_errors, others=results.others, schema=schema)
        progress.begin(writer, count_rows(sources) if show_progress and manifest.shards == 1 else None)
        before, rows, tokens, start = model.stats, writer.rows, writer.tokens, time.perf_counter()
        first = 0 if results.table and manifest.columns is None else manifest.next_part * rows_per_part
        loop = Loop(worker, parser, writer, progress, stop=stop)
        loop.run(records(sources, first, empty_lines=True))
        if manifest.finished:
            finish(out, manifest)
        seconds, after = max(time.perf_counter() - start, 1e-9), model.stats
        busy = after.prefill_seconds + after.decode_seconds - before.prefill_seconds - before.decode_seconds
        asked = after.queried_tokens - before.queried_tokens
        return Summary.of(
            out,
            manifest,
            rows_now=manifest.rows - rows,
            seconds=seconds,
            tokens_per_second=(writer.tokens - tokens) / seconds,
            device_share=busy / seconds,
            cache_hit_rate=(after.hit_tokens - before.hit_tokens) / asked if asked else 0.0,
        )


def _check(task: str, rows_per_part: int, max_errors: int | None) -> None:
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}: it must be one of {', '.join(get_args(Task))}")
    for name, value, low in (("rows_per_part", rows_per_part, 1), ("max_errors", max_errors, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ValueError(f"{name} is {value!r}: it must be an integer of at least {low}")


def _listed(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Sequence[str | os.PathLike[str]]:
    return [inputs] if isinstance(inputs, str | os.PathLike) else inputs


def _load(folder: Path, options: EngineConfig) -> LLM:
    from jaxinfer.llm import LLM

    options.pop("revision", None)  # of the folder
    return LLM(folder, **options)


def _gives_text(model: str | os.PathLike[str] | LLM, folder: Path, options: EngineConfig) -> bool:
    """Whether there will be a tokenizer."""
    if not isinstance(model, str | os.PathLike):
        return model.tokenizer.missing is None
    own = has_tokenizer(folder) and not options.get("skip_tokenizer_init")
    return own or options.get("tokenizer") is not None


def _fingerprint(model: str | os.PathLike[str] | LLM, folder: Path, options: EngineConfig) -> str:
    """Of weights and tokenizer."""
    other = None
    if not isinstance(model, str | os.PathLike):
        other = model.tokenizer.folder
    elif (named := options.get("tokenizer")) is not None:
        other = resolve(named, token=options.get("token"), weights=False)
    digest = model_fingerprint(folder)
    if has_tokenizer(folder) and not _gives_text(model, folder, options):
        digest += " without its tokenizer"
    return digest if other in (None, folder) else f"{digest} {model_fingerprint(other, weights=False)}"


def _adapters(model: str | os.PathLike[str] | LLM, options: EngineConfig) -> dict[str, Path]:
    """Folders of low-rank adapters, by name."""
    if not isinstance(model, str | os.PathLike):
        return {name: Path(own.folder) for name, own in model.list_adapters().items()} if model.loaded is None else {}
    check_adapters(given := options.get("adapters"))
    return {name: resolve(folder, token=options.get("token")) for name, folder in (given or {}).items()}


def _folder(model: str | os.PathLike[str] | LLM, options: EngineConfig) -> Path:
    if isinstance(model, str | os.PathLike):
        return resolve(model, options.get("revision"), options.get("token"))
    if options:
        raise ValueError(f"option {next(iter(options))!r} is for loading a model, and this one is an LLM already")
    return model.folder


def _as_given(params: SamplingParams) -> dict[str, Any] | None:
    """What its outputs must look like."""
    asked = params.structured_outputs
    fields = {} if asked is None else dataclasses.asdict(StructuredOutputsParams.of(asked))
    return {name: value for name, value in fields.items() if value} or None
