"""What goes through a batch job: a record as it is read, the row that it means, and what the row asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxinfer.sampling.params import SamplingParams

Task = Literal["generate", "chat", "score", "embed", "classify", "rerank"]
# What the tasks that make numbers of whole texts have in place of sampling parameters: arguments of LLM's methods.
POOLING: dict[str, tuple[str, ...]] = {
    "embed": ("prompt_name", "prompt", "dimensions", "normalize"),
    "classify": ("use_activation",),
    "rerank": ("top_n",),
}
Origin = tuple[Any, int]  # a pyarrow.RecordBatch, and which of its rows


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it is in its file, not yet looked at.

    index: its number among all rows of the job, from 0.
    where: for people, such as "rows.jsonl:17" (the line where it begins; of Parquet, the row, from 1).
    value: the bytes of a JSON line, or columns by name.
    error: why there is no value.
    origin: of Parquet, where the row was, for columns that keep their types.
    """

    index: int
    where: str
    value: bytes | dict[str, Any] | None
    error: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Ask:
    """What a row wants from the model.

    prompt: text or token ids, to generate or to score; None in a chat.
    messages, tools: of a chat; tools may be None.
    continuation: of the prompt, what is scored; None: the prompt as a whole.
    params: None where nothing is sampled.
    texts: to embed, to classify (pairs are tuples) or to rank, text or token ids.
    query: what they are ranked for.
    dimensions, base64: of an OpenAI line's vectors.
    adapter: the name of the one beside the weights that it has, if any.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    continuation: str | None = None
    params: SamplingParams | None = None
    texts: tuple[Any, ...] = ()
    query: str | None = None
    dimensions: int | None = None
    base64: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class Row:
    """A row that was understood (`ask`), or was not (`error`: one line that begins with `where`).

    index, where, origin: the record's.
    columns: all columns of the row, the prompt among them, as JSON values (text is valid Unicode; floats may be inf or
        nan). Where the row is broken, what of them could be read.
    ask: what it wants, None if it was not understood.
    error: why it was not.
    openai: the row is an OpenAI batch line and comes back as `openai.response_line` (columns is then empty).
    custom_id: an OpenAI line's, or None if it has none that is valid.
    """

    index: int
    where: str
    columns: dict[str, Any] = field(default_factory=dict)
    ask: Ask | None = None
    error: str | None = None
    openai: bool = False
    custom_id: str | None = None
    origin: Origin | None = None


def check_pooling(task: Task, params: Mapping[str, Any] | None, token_ids: bool) -> dict[str, Any]:
    """What is given of POOLING. Raises ValueError for what a task has not."""
    given = {name: value for name, value in (params or {}).items() if value is not None}
    known = POOLING.get(task, ())
    for name in given:
        if name not in known:
            whose = next((other for other, names in POOLING.items() if name in names), None)
            there = f"it is of the task {whose}" if whose else f"{task} has {', '.join(known) or 'none'}"
            raise ValueError(f"pooling_params: {name} is nothing for the task {task}: {there}; leave it out")
    if not isinstance(given.get("use_activation", True), bool):
        raise ValueError(f"use_activation is {given['use_activation']!r:.80}: it must be true or false")
    if known and token_ids:
        raise ValueError(f"token_ids are not written by the task {task}; leave them out")
    return given
