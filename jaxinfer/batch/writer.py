"""From results in any order to parts in order."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxinfer.batch.formats import is_table, packing_of, to_csv
from jaxinfer.batch.manifest import Manifest
from jaxinfer.batch.packing import packed
from jaxinfer.batch.parquet import encode
from jaxinfer.batch.parts import Output
from jaxinfer.batch.row import Origin
from jaxinfer.batch.tables import Kind, fitting
from jaxinfer.batch.values import to_json


class TooManyErrors(ValueError):
    """More rows have errors than were allowed."""


class Result(NamedTuple):
    """What is written for a row.

    columns: the row's own and the results; of an OpenAI line, the answer's fields.
    error: why it failed, or None.
    prompt_tokens, generated_tokens: how many it took.
    origin: where it was read.
    """

    columns: dict[str, Any]
    error: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    origin: Origin | None = None


class _Done(NamedTuple):
    content: bytes | dict[str, Any]  # a line, or the columns of a row of a table
    failed: bool
    prompt_tokens: int
    generated_tokens: int
    origin: Origin | None


class Writer:
    """Holds results until their part has all of its rows and those before it are written, and writes it.

    max_errors: how many rows may have an error; None: all.
    others: the column of what has no other, in a table.
    schema: of Parquet, the types of columns that are as they were read.
    rows, errors, prompt_tokens, generated_tokens: so far, those of the finished parts and those that are held.
    """

    def __init__(
        self,
        output: Output,
        manifest: Manifest,
        max_errors: int | None = None,
        *,
        others: str = "other_columns",
        schema: Any = None,
    ):
        self.output = output
        self.manifest = manifest
        self.rows_per_part = manifest.rows_per_part
        self.max_errors = max_errors
        self.others, self.schema = others, schema
        self.rows, self.errors = manifest.rows, manifest.errors
        self.prompt_tokens, self.generated_tokens = manifest.prompt_tokens, manifest.generated_tokens
        self._parts: dict[int, dict[int, _Done]] = {}

    def part(self, index: int) -> int:
        """The part of row number `index`."""
        return index // self.rows_per_part

    def put(self, index: int, result: Result) -> None:
        """Takes a row's result. Raises OSError if a part can't be written, TooManyErrors."""
        columns, error, prompt_tokens, generated_tokens, origin = result
        content = columns if is_table(self.output.format) else f"{to_json(columns)}\n".encode()
        done = _Done(content, error is not None, prompt_tokens, generated_tokens, origin)
        self._parts.setdefault(self.part(index), {})[index] = done
        self.rows += 1
        self.errors += done.failed
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        self._write_finished()
        if self.max_errors is not None and self.errors > self.max_errors:
            raise TooManyErrors(
                f"{self.errors} rows have errors, and max_errors is {self.max_errors}; the last: {error}"
            )

    def end(self, input_rows: int) -> None:
        """Says that the input has no more rows than so many, and that all of this shard's were put or will be."""
        self.manifest.input_rows = input_rows
        self._write_finished()

    @property
    def tokens(self) -> int:
        """Those that are counted as work: generated ones, and when scoring, read ones."""
        return self.generated_tokens or self.prompt_tokens

    def _size(self, part: int) -> int:
        rest = self.rows_per_part
        if self.manifest.input_rows is not None:
            rest = self.manifest.input_rows - part * self.rows_per_part
        return min(self.rows_per_part, rest)

    def _content(self, done: list[_Done]) -> bytes:
        """Of a part."""
        contents: Any = [result.content for result in done]
        packing = packing_of(self.output.format)
        if not is_table(self.output.format):
            return packed(b"".join(contents), packing)
        kinds: dict[str, Kind] = self.manifest.columns or {}
        if self.output.format == "parquet":
            rows = fitting(contents, kinds, self.others)
        else:  # any value is text
            rows = fitting(contents, dict.fromkeys(kinds, "json"), self.others)
        if any(self.others in row for row in rows):
            kinds = kinds | {self.others: "json"}
            self.manifest.others = self.others
        if self.output.format == "parquet":
            return encode(rows, kinds, [result.origin for result in done], self.schema)
        return packed(to_csv(rows, [*kinds]), packing)

    def _write_finished(self) -> None:
        manifest = self.manifest
        while not manifest.finished and len(self._parts.get(manifest.next_part, ())) == self._size(manifest.next_part):
            rows = self._parts.pop(manifest.next_part, {})
            done = [rows[index] for index in sorted(rows)]
            self.output.write(self.output.part(manifest.next_part), self._content(done))
            manifest.parts += 1
            manifest.rows += len(done)
            manifest.errors += sum(result.failed for result in done)
            manifest.prompt_tokens += sum(result.prompt_tokens for result in done)
            manifest.generated_tokens += sum(result.generated_tokens for result in done)
            manifest.save(self.output)
