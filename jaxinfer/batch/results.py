"""What is written for a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.batch.openai import response_line
from jaxinfer.batch.parquet import Kind
from jaxinfer.batch.row import Row, Task
from jaxinfer.batch.writer import Result
from jaxinfer.engine.outputs import CompletionOutput, RequestOutput, ScoreOutput

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


@dataclass(frozen=True)
class Results:
    """Makes them. n: SamplingParams.n of the job. token_ids: also the ids, and each one's log-probability when scoring.
    parquet: columns have one type. model: its name."""

    task: Task
    n: int = 1
    token_ids: bool = False
    parquet: bool = False
    model: str = ""

    @property
    def kinds(self) -> dict[str, Kind]:
        """The result columns. Parquet always has `logprobs`, which only rows of JSON that asked for them have."""
        if self.task == "score":
            ids: dict[str, Kind] = {"token_ids": "list<int32>", "token_logprobs": "list<float64>"}
            return {**SCORED, **(ids if self.token_ids else {}), "error": "string"}
        kinds = dict(GENERATED)
        if self.n > 1:
            kinds |= {"generated_text": "list<string>", "finish_reason": "list<string>"}
        if self.token_ids:
            kinds["token_ids"] = "list<int32>" if self.n == 1 else "json"
        if self.parquet:
            kinds["logprobs"] = "json"
        return {**kinds, "error": "string"}

    def refuse(self, row: Row) -> str | None:
        """Why a row that was understood can't be written, or None."""
        if row.openai and self.parquet:
            return f"{row.where}: an OpenAI batch line comes back as a JSON line, not as Parquet; write JSONL"
        # A null says nothing that is lost: the `error` of rows that another job has served.
        names = {**self.kinds, "logprobs": None}
        taken = next((column for column, value in row.columns.items() if column in names and value is not None), None)
        if taken is not None:
            return f"{row.where}: has a column {taken!r}, which is a result's name; rename it"
        n = row.ask.params.n if row.ask is not None and row.ask.params is not None else self.n
        if self.parquet and (n > 1) != (self.n > 1):
            return f"{row.where}: n is {n}, the job's {self.n}: a Parquet column is of texts or of lists; write JSONL"
        return None

    def failed(self, row: Row, error: str) -> Result:
        """The result of a row that was not served."""
        if row.openai and not self.parquet:
            return Result(response_line(replace(row, error=error), None, model=self.model), error)
        return Result(row.columns | dict.fromkeys(self.kinds) | {"error": error}, error)

    def scored(self, row: Row, output: ScoreOutput) -> Result:
        """The result of a row that was scored."""
        results: dict[str, Any] = {"logprob": output.logprob, "is_greedy": output.is_greedy}
        results |= {"tokens": len(output.token_ids), "perplexity": output.perplexity}
        results |= {"word_perplexity": output.word_perplexity, "byte_perplexity": output.byte_perplexity}
        if self.token_ids:
            results |= {"token_ids": output.token_ids, "token_logprobs": output.logprobs}
        columns = row.columns | results | {"error": None}
        return Result(columns, None, output.num_prompt_tokens + len(output.token_ids))

    def generated(self, row: Row, output: RequestOutput) -> Result:
        """The result of a row that was continued. Of several continuations, texts, reasons, ids and log-probabilities
        are lists, and the tokens are counted together."""
        prompt, generated = len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs)
        if row.openai:
            return Result(response_line(row, output, model=self.model), None, prompt, generated)
        first = output.outputs[0]
        results: dict[str, Any] = {
            "generated_text": [one.text for one in output.outputs],
            "finish_reason": [one.finish_reason for one in output.outputs],
        }
        if self.token_ids:
            results["token_ids"] = [one.token_ids for one in output.outputs]
        if first.logprobs is not None:
            results["logprobs"] = [_logprobs(one) for one in output.outputs]
        if len(output.outputs) == 1:
            results = {name: values[0] for name, values in results.items()}
        results |= {"prompt_tokens": prompt, "generated_tokens": generated, "error": None}
        if "logprobs" not in results and self.parquet:
            results["logprobs"] = None
        return Result(row.columns | results, None, prompt, generated)


def _logprobs(completion: CompletionOutput) -> list[list[dict[str, Any]]]:
    """Of each token: the sampled one first, then the likeliest ones."""
    return [
        [
            {"token_id": i, "token": one.decoded_token, "logprob": one.logprob, "rank": one.rank}
            for i, one in step.items()
        ]
        for step in completion.logprobs or ()
    ]
