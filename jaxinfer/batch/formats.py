"""What a job can write: the formats, and rows as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from jaxinfer.batch.values import to_json

Format = Literal["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.zst", "parquet"]
FILES = "*.jsonl, *.csv (each also as .gz or .zst) and *.parquet"
_STRANGE = re.compile(r"\.(json|txt|tsv|xlsx?|arrow|feather|orc|avro|gz|zst|bz2|xz|zip|tar|tgz)$")


def file_format(path: str, folder: bool = False) -> Format | None:
    """What a file of this name has in it; None for a name that does not say. Raises ValueError for a suffix that
    promises what is not written here, unless it is a folder's."""
    name = re.sub(r"\.ndjson(\.gz|\.zst)?$", r".jsonl\1", path.lower())
    formats: tuple[Format, ...] = get_args(Format)
    named = next((format for format in formats if name.endswith(f".{format}")), None)
    if not named and not folder and (strange := _STRANGE.search(name)):
        raise ValueError(
            f"output {path}: no *{strange[0]} is written; known are {FILES}, and folders, with / at the end"
        )
    return named


def packing_of(format: str) -> str:
    """How files of a format are packed: "", .gz or .zst."""
    match = re.search(r"\.\w+$", format)
    return match[0] if match else ""


def is_table(format: str) -> bool:
    """Whether all rows have the same columns."""
    return not format.startswith("jsonl")


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Header and rows (RFC 4180, UTF-8). Lists and objects are JSON; null is nothing, and empty text is ""."""
    lines = [columns, *([row.get(column) for column in columns] for row in rows)]
    return "".join(",".join(map(_field, line)) + "\n" for line in lines).encode()


def csv_rows(content: bytes) -> int:
    """How many lines there are below the header: line ends that are not in quotes."""
    return sum(piece.count(b"\n") for piece in content.split(b'"')[::2]) - 1


def csv_body(content: bytes, columns: Sequence[str], wanted: Sequence[str]) -> bytes:
    """The lines below the header, with an empty field for each of the `wanted` columns that comes after `columns`."""
    body = content.removeprefix(to_csv([], columns))
    more = b"," * (len(wanted) - len(columns))
    pieces = body.split(b'"')
    pieces[::2] = [piece.replace(b"\n", more + b"\n") for piece in pieces[::2]]
    return b'"'.join(pieces)


def _field(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else to_json(value)
    return '"' + text.replace('"', '""') + '"' if not text or re.search(r'[,"\r\n]|^\s|\s$', text) else text
