"""The rows of files, one after the other, in constant memory."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from jaxinfer.batch.arrays import elements
from jaxinfer.batch.packing import unpacked
from jaxinfer.batch.row import Record
from jaxinfer.batch.sources import STDIN, Source, need
from jaxinfer.text.files import one_line

MAX_LINE = 64 * 2**20  # bytes: a longer one is no row, but a file of something else
TOO_LONG = f"the line has over {MAX_LINE >> 20} MiB, and no row is that long"
PIECE = 2**18
BATCH = 256  # rows of Parquet at a time
BOM = b"\xef\xbb\xbf"

Split = Callable[[Iterator[bytes]], Iterator[tuple[int, bytes]]]  # a file's pieces to numbered lines
Records = Generator[Record, None, int]  # returns how many rows there were, those before `start` included


def records(sources: Sequence[Source], start: int = 0, *, empty_lines: bool = False) -> Records:
    """The rows of all sources from number `start` on; those before are passed over without being looked at.

    JSON Lines: a row a line, where blank ones are none; *.json may be an array of rows. Text: a row a line; with
    empty_lines those too, so that the n-th row is of the n-th line. CSV: the first row names the columns. Parquet:
    whole row groups are passed over. What is wrong with one row is in its record. Raises ValueError or OSError, naming
    file and place, where a file can't be read on: it is cut off, or damaged.
    """
    first = 0
    for source in sources:
        kind = source.format[0]
        if kind == "text":
            first += yield from _text(source, first, start, empty_lines)
        else:
            first += yield from {"json": _json, "csv": _csv, "parquet": _parquet}[kind](source, first, start)
    return first


def count_rows(sources: Sequence[Source]) -> int | None:
    """How many rows there are, for a progress bar; None where finding out would need stdin or a download."""
    for source in sources:
        if source.url == STDIN or not isinstance(url_to_fs(source.url)[0], LocalFileSystem):
            return None
    counting = records(sources, sys.maxsize, empty_lines=True)
    while True:
        try:
            next(counting)
        except StopIteration as end:
            return int(end.value)


def _json(source: Source, first: int, start: int) -> Records:
    index = first
    array = re.search(r"\.json(\.|$)", source.name.lower()) is not None
    for number, line in _lines(source, _elements_or_lines if array else _filled_lines):
        if index >= start:
            yield Record(index, f"{source.name}:{number}", line, TOO_LONG if line is None else None)
        index += 1
    return index - first


def _text(source: Source, first: int, start: int, empty_lines: bool) -> Records:
    index = first
    for number, line in _lines(source):
        if line in (b"", b"\r") and not empty_lines:
            continue
        if index >= start:
            value = None if line is None else {"text": _str(line.removesuffix(b"\r"))}
            yield Record(index, f"{source.name}:{number}", value, TOO_LONG if line is None else None)
        index += 1
    return index - first


def _csv(source: Source, first: int, start: int) -> Records:
    """RFC 4180, strictly: a lenient reader makes wrong columns of a broken quote."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    rows = csv.reader(_csv_lines(source), strict=True)
    header: list[str] | None = None
    index = first
    while True:
        where = f"{source.name}:{rows.line_num + 1}"
        row, error = [""], None
        try:
            row = next(rows)
        except StopIteration:
            return index - first
        except csv.Error as problem:
            error = f"not CSV, is a quote missing? ({one_line(problem)})"
        if not row:
            continue
        if header is None:
            if error or len(set(row)) < len(row):
                raise ValueError(f"{where}: this row must name the columns: {error or 'a name is there twice'}")
            header = row
            continue
        if error is None and len(row) != len(header):
            error = f"{len(row)} fields, where the first row has {len(header)}"
        if index >= start:
            yield Record(index, where, None if error else dict(zip(header, row, strict=True)), error)
        index += 1


def _csv_lines(source: Source) -> Iterator[str]:
    for number, line in _lines(source):
        if line is None:
            raise ValueError(f"{source.name}:{number}: {TOO_LONG}")
        yield _str(line) + "\n"


def _str(line: bytes) -> str:
    """Bytes that are not UTF-8 become lone surrogates, which the parser finds together with those of JSON."""
    return line.decode("utf-8", "surrogateescape")


def _lines(source: Source, split: Split | None = None) -> Iterator[tuple[int, bytes | None]]:
    """The lines from 1 on, without LF, or what else `split` makes of the file; None for one that is too long."""
    number = 0
    with source.open() as file:
        try:
            pieces = unpacked(iter(lambda: file.read(PIECE), b""), source.format[1], source.name)
            for number, line in (split or _split)(_without_mark(pieces)):
                yield number, line if len(line) <= MAX_LINE else None
        except Exception as error:  # of the file, of its store, of its packing
            raise _damaged(source, f"line {number}", error) from None


def _without_mark(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Without a byte order mark."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= len(BOM) or not BOM.startswith(head):
            break
    return chain(filter(None, [head.removeprefix(BOM)]), pieces)


def _filled_lines(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in _split(pieces) if line.strip())


def _elements_or_lines(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """What a *.json has: an array's elements, or else lines."""
    head = b""
    for piece in pieces:
        head += piece
        if head.strip():
            break
    pieces = chain([head], pieces)
    return elements(pieces, MAX_LINE) if head.lstrip().startswith(b"[") else _filled_lines(pieces)


def _damaged(source: Source, last: str, error: Exception) -> OSError:
    problem = one_line(error) or type(error).__name__
    return OSError(f"{source.name}: can't be read on after {last}: is it cut off or damaged? ({problem})")


def _split(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    rest, number = bytearray(), 1
    for piece in pieces:
        head, *lines = piece.split(b"\n")
        if len(rest) <= MAX_LINE:  # what is too long is only known to be so, and not kept
            rest += head
        if lines:
            yield number, bytes(rest)
            rest = bytearray(lines.pop())
            yield from enumerate(lines, number + 1)
            number += len(lines) + 1
    if rest:
        yield number, bytes(rest)


def _parquet(source: Source, first: int, start: int) -> Records:
    parquet = need("pyarrow.parquet", source.name)
    row = 0
    with source.open() as raw:
        try:
            file = parquet.ParquetFile(raw, buffer_size=PIECE)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if first + end <= start:
                    row = end
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    skipped = min(max(0, start - first - row), len(batch))
                    row += skipped
                    for index, (value, error) in enumerate(table_rows(batch.slice(skipped)), skipped):
                        row += 1
                        origin = (batch, index) if error is None else None
                        yield Record(first + row - 1, f"{source.name}:{row}", value, error, origin)
                if row != end:
                    raise ValueError("a row group has not as many rows as it says")
        except Exception as error:  # pyarrow's errors have no common class
            raise _damaged(source, f"row {row}", error) from None
    return row


def table_rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """The rows of a pyarrow.RecordBatch or Table; one that can't be converted is an error, and the others are rows."""
    types = need("pyarrow", "Parquet").types
    for i, column in enumerate(batch.schema):
        if types.is_temporal(column.type):  # Python has no nanoseconds, and pandas may be there or not
            batch = batch.set_column(i, column.name, batch.column(i).cast("string"))
    try:
        yield from [(value, None) for value in batch.to_pylist()]
    except ValueError as error:
        if len(batch) == 1:
            yield None, f"can't be read ({one_line(error)})"
        else:
            for i in range(len(batch)):
                yield from table_rows(batch.slice(i, 1))
