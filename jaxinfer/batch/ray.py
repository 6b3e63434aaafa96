"""Batch jobs on a Ray cluster (`pip install '.[ray]'`): `Predictor`, for `ray.data`.

ray.data.read_parquet(IN).map_batches(
    Predictor,
    fn_constructor_kwargs={"model": M, "task": "chat", "id_column": "id"},
    batch_format="pyarrow",
    batch_size=1024,
    concurrency=4,
).write_parquet(OUT)
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from jaxinfer.batch.order import arranged
from jaxinfer.batch.parquet import parquet_modules, table
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.readers import table_rows
from jaxinfer.batch.results import LOGPROBS, Results
from jaxinfer.batch.row import POOLING, Record, Row, Task, check_pooling
from jaxinfer.batch.values import to_json
from jaxinfer.batch.writer import Result
from jaxinfer.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine.config import EngineConfig


class Predictor:
    """What `Dataset.map_batches` makes an actor of: it loads the model once, and adds results to each batch.

    Rows, result columns and errors are those of `jaxinfer.batch.run` writing Parquet, and so are the arguments. All
    batches have the same columns: those of log-probabilities are there whoever asks for them, and a column that is
    called like a result is replaced (`output_prefix`). An error says which row by its `id_column`, if there is one.

    A row's result depends on nothing but the row: an actor may die, and Ray does its batches again. A row that samples
    and has no seed of its own gets one that is made of the option `seed` and its id, or, without id_column, of
    everything in it (then equal rows have equal results). Rows that are numbered from 0 get the seeds that
    `jaxinfer.batch.run` gives them.

    The rows of a batch are run together, so batches should be large: hundreds of rows. batch_format "pyarrow" is the
    one that changes no values; in "numpy" and "pandas", null and integers can become floats before they get here.
    model: a folder or hub id that the actor's machine has.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line, which Ray shows as its own error's
    cause.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        task: Task = "generate",
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        pooling_params: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
        adapter: str | None = None,
        truncate: bool = False,
        token_ids: bool = False,
        id_column: str | None = None,
        output_prefix: str = "",
        **options: Unpack[EngineConfig],
    ):
        changes = (
            dataclasses.asdict(sampling_params) if isinstance(sampling_params, SamplingParams) else sampling_params
        )
        Parser(task, SamplingParams(), changes, prompt_template)  # mistakes show before the model is loaded
        parquet_modules()
        pooling = check_pooling(task, pooling_params, token_ids)
        seed = 0 if task in POOLING else options.pop("seed", 0)
        if task in POOLING:
            options.setdefault("runner", "pooling")

        from jaxinfer.batch.workers import WORKERS  # JAX comes with it
        from jaxinfer.llm import LLM

        llm = LLM(model, **options)
        params = SamplingParams().with_changes(**changes or {})
        logits = pooling.get("use_activation") is False
        results = Results(task, params, token_ids, "parquet", llm.folder.name, output_prefix, logits=logits)
        if task in ("generate", "chat") and not token_ids:
            llm.tokenizer.require("text that is generated", "ask for token_ids")
        self.worker = WORKERS[task](llm, results, seed=seed, truncate=truncate, params=pooling)
        self.results = self.worker.results
        names = [] if task in POOLING else list(llm.list_adapters())
        if adapter is not None and adapter not in names:
            raise ValueError(f"adapter is {adapter!r:.80}: there are {', '.join(names) or 'none'}")
        own = {llm.folder.name, os.fspath(model)}
        self.parser = Parser(task, self.worker.defaults, changes, prompt_template, names, adapter, own)
        self.id_column = id_column

    def __call__(self, batch: Any) -> Any:
        """The batch as a pyarrow.Table, with the result columns."""
        inputs = _table(batch)
        if self.id_column not in (None, *inputs.column_names):
            raise ValueError(
                f"id_column is {self.id_column!r}, and there are {', '.join(map(repr, inputs.column_names))}"
            )
        done: dict[int, Result] = {}
        works = []
        for index, (value, error) in enumerate(table_rows(inputs)):
            row, key = self._row(index, value, error)
            work = self.worker.prepare(row, key)
            if isinstance(work, str):
                done[index] = self.results.failed(row, work)
            else:
                works.append(work)
        for work, result in self.worker.run(iter(arranged(works))):
            done[work.row.index] = result
        kinds = self.results.kinds(LOGPROBS)
        outputs = table([{name: done[i].columns.get(name) for name in kinds} for i in range(len(inputs))], kinds)
        kept = [name for name in inputs.column_names if name not in outputs.column_names]
        return parquet_modules()[0].table(
            [*inputs.select(kept).columns, *outputs.columns], names=[*kept, *outputs.column_names]
        )

    def _row(self, index: int, value: dict[str, Any] | None, error: str | None) -> tuple[Row, object]:
        """The row, and by what it is known."""
        if self.id_column is not None:
            key = None if value is None else value[self.id_column]
            if key is None:
                error = error or f"{self.id_column!r}, the id_column, is null"
            return self.parser.parse(Record(index, f"{self.id_column} {key!r:.80}", value, error)), key
        row = self.parser.parse(Record(index, "row", value, error))
        content = to_json(dict(sorted(row.columns.items())))
        return row, hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _table(batch: Any) -> Any:
    """A batch in any of Ray's formats as a pyarrow.Table."""
    pa = parquet_modules()[0]
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, Mapping):  # of NumPy arrays
        return pa.table({name: pa.array(values.tolist()) for name, values in batch.items()})
    return pa.Table.from_pandas(batch, preserve_index=False)
