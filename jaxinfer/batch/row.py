"""What goes through a batch job: a record as it is read, the row that it means, and what the row asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxinfer.sampling.params import SamplingParams

Task = Literal["generate", "chat", "score"]
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
    params: None when scoring.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    continuation: str | None = None
    params: SamplingParams | None = None


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
