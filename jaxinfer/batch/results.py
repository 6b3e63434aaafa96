"""What is written for a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxinfer.batch.formats import Format, is_table
from jaxinfer.batch.openai import embeddings_line, response_line
from jaxinfer.batch.row import Row, Task
from jaxinfer.batch.tables import Kind
from jaxinfer.batch.values import numbers
from jaxinfer.batch.writer import Result
from jaxinfer.engine.outputs import ClassificationOutput, Logprob, RequestOutput, ScoreOutput
from jaxinfer.sampling.params import SamplingParams

GENERATED: dict[str, Kind] = {
    "generated_text": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "generated_tokens": "int64",
}
SCORED: dict[str, Kind] = {
    "logprob": "float64",
    "is_greedy": "bool",
    "tokens": "int64",
    "perplexity": "float64",
    "word_perplexity": "float64",
    "byte_perplexity": "float64",
}
RANKED: dict[str, Kind] = {"ranking": "list<int64>", "relevance_scores": "list<float64>", "tokens": "int64"}
LOGPROBS: dict[str, Kind] = {"logprobs": "json", "prompt_logprobs": "json"}
OTHERS = "other_columns"


@dataclass(frozen=True)
class Results:
    """Makes them.

    task: of the job.
    params: those of the job, or None.
    token_ids: also the ids, and each one's log-probability when scoring.
    format: of the output; in a table (CSV, Parquet) all rows have the same columns.
    model: its name.
    prefix: of the names of the result columns.
    size: of vectors, and how many classes there are, once a model is loaded.
    logits: of classes, and not probabilities.
    """

    task: Task
    params: SamplingParams | None = None
    token_ids: bool = False
    format: Format = "jsonl"
    model: str = ""
    prefix: str = ""
    size: int = 0
    logits: bool = False

    @property
    def n(self) -> int:
        return 1 if self.params is None else self.params.n

    @property
    def table(self) -> bool:
        return is_table(self.format)

    @property
    def others(self) -> str:
        """The column of what has no column of its own."""
        return self.prefix + OTHERS

    def kinds(self, logprobs: Collection[str] = ()) -> dict[str, Kind]:
        """The result columns, with those of LOGPROBS that some rows ask for."""
        if self.task == "score":
            ids: dict[str, Kind] = {"token_ids": "list<int32>", "token_logprobs": "list<float64>"}
            kinds = {**SCORED, **(ids if self.token_ids else {})}
        elif self.task == "embed":
            kinds = {"embedding": self.size, "tokens": "int64"}
        elif self.task == "classify":
            kinds = {"label": "string", self._probs: self.size, "tokens": "int64"}
        elif self.task == "rerank":
            kinds = dict(RANKED)
        else:
            kinds = dict(GENERATED)
            if self.n > 1:
                kinds |= {"generated_text": "list<string>", "finish_reason": "list<string>"}
            if self.token_ids:
                kinds["token_ids"] = "list<int32>" if self.n == 1 else "json"
            kinds |= {name: kind for name, kind in LOGPROBS.items() if name in logprobs}
        return self._named({**kinds, "error": "string"})

    def logprobs(self, rows: Iterable[Row]) -> set[str]:
        """Which of LOGPROBS the job or one of these rows asks for."""
        params = [self.params, *(row.ask.params for row in rows if row.ask is not None)]
        return {
            name
            for name in LOGPROBS
            for sampling in params
            if sampling is not None and getattr(sampling, name) is not None
        }

    def taken(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Columns of a row that the results have no place beside. A null, or the empty text that CSV has for it, says
        nothing that would be lost: the `error` of rows that another job has served."""
        names = {*self.kinds(LOGPROBS), self.others}
        return {name: value for name, value in columns.items() if name in names and value not in (None, "")}

    def refuse(self, row: Row) -> str | None:
        """Why a row that was understood can't be written, or None."""
        if row.openai and self.table:
            kind = self.format.split(".")[0]
            return f"{row.where}: an OpenAI batch line comes back as a JSON line, not as {kind}; write JSONL"
        if taken := self.taken(row.columns):
            return f"{row.where}: {clash(next(iter(taken)))}"
        n = row.ask.params.n if row.ask is not None and row.ask.params is not None else self.n
        if self.format == "parquet" and (n > 1) != (self.n > 1):
            return f"{row.where}: n is {n}, the job's {self.n}: a Parquet column is of texts or of lists; write JSONL"
        return None

    def failed(self, row: Row, error: str) -> Result:
        """The result of a row that was not served. Columns that are called like results are in `other_columns`."""
        if row.openai and not self.table:
            return Result(response_line(replace(row, error=error), None, model=self.model), error)
        columns = row.columns | dict.fromkeys(self.kinds()) | self._named({"error": error})
        if taken := self.taken(row.columns):
            columns[self.others] = taken
        return Result(columns, error, origin=row.origin)

    def scored(self, row: Row, output: ScoreOutput) -> Result:
        """The result of a row that was scored."""
        results: dict[str, Any] = {"logprob": output.logprob, "is_greedy": output.is_greedy}
        results |= {"tokens": len(output.token_ids), "perplexity": output.perplexity}
        results |= {"word_perplexity": output.word_perplexity, "byte_perplexity": output.byte_perplexity}
        if self.token_ids:
            results |= {"token_ids": output.token_ids, "token_logprobs": output.logprobs}
        columns = row.columns | self._named(results | {"error": None})
        return Result(columns, None, output.num_prompt_tokens + len(output.token_ids), origin=row.origin)

    def embedded(self, row: Row, vectors: Sequence[np.ndarray], tokens: int) -> Result:
        """The result of a row with a vector, or several where it is an OpenAI line. tokens: of all its texts."""
        if row.openai:
            return Result(embeddings_line(row, vectors, tokens, model=self.model), None, tokens)
        return self._counted(row, {"embedding": self._vector(vectors[0])}, tokens)

    def classified(self, row: Row, output: ClassificationOutput, tokens: int) -> Result:
        """The result of a row with classes."""
        return self._counted(row, {"label": output.label, self._probs: self._vector(output.probs)}, tokens)

    def ranked(self, row: Row, ranking: Sequence[tuple[int, float]], tokens: int) -> Result:
        """The result of a row with documents: the numbers of the best ones, the best first, and how they fit."""
        places, scores = [place for place, _ in ranking], [score for _, score in ranking]
        return self._counted(row, {"ranking": places, "relevance_scores": scores}, tokens)

    def generated(self, row: Row, output: RequestOutput) -> Result:
        """The result of a row that was continued. Of several continuations, texts, reasons, ids and log-probabilities
        are lists, and the tokens are counted together."""
        prompt = len(output.prompt_token_ids)
        generated = sum(len(completion.token_ids) for completion in output.outputs)
        if row.openai:
            model = (row.ask.adapter if row.ask is not None else None) or self.model
            return Result(response_line(row, output, model=model), None, prompt, generated)
        first = output.outputs[0]
        results: dict[str, Any] = {
            "generated_text": [completion.text for completion in output.outputs],
            "finish_reason": [completion.finish_reason for completion in output.outputs],
        }
        if self.token_ids:
            results["token_ids"] = [completion.token_ids for completion in output.outputs]
        if first.logprobs is not None:
            results["logprobs"] = [_logprobs(completion.logprobs or ()) for completion in output.outputs]
        if len(output.outputs) == 1:
            results = {name: values[0] for name, values in results.items()}
        if output.prompt_logprobs is not None:
            results["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
        results |= {"prompt_tokens": prompt, "generated_tokens": generated, "error": None}
        return Result(row.columns | self._named(results), None, prompt, generated, row.origin)

    def _counted(self, row: Row, results: Mapping[str, Any], tokens: int) -> Result:
        columns = row.columns | self._named({**results, "tokens": tokens, "error": None})
        return Result(columns, None, tokens, origin=row.origin)

    @property
    def _probs(self) -> str:
        return "logits" if self.logits else "probs"

    def _vector(self, vector: np.ndarray) -> Any:
        return vector if self.format == "parquet" else numbers(vector)

    def _named(self, results: Mapping[str, Any]) -> dict[str, Any]:
        return {self.prefix + name: value for name, value in results.items()}


def clash(column: str) -> str:
    """What to say of a column that is called like a result."""
    return f"has a column {column!r}, which is a result's name; rename it, or give --output-prefix"


def _logprobs(steps: Iterable[Mapping[int, Logprob] | None]) -> list[list[dict[str, Any]] | None]:
    """Of each token: itself first, then the likeliest ones. None of the prompt's first token."""
    return [
        None
        if step is None
        else [
            {"token_id": i, "token": logprob.decoded_token, "logprob": logprob.logprob, "rank": logprob.rank}
            for i, logprob in step.items()
        ]
        for step in steps
    ]
