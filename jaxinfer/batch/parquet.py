"""Parts as Parquet: one schema for all parts of a job, whatever rows come."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Kind = Literal["bool", "int64", "float64", "string", "list<int32>", "list<float64>", "list<string>", "json"]
PLAIN: dict[type, Kind] = {bool: "bool", int: "int64", float: "float64", str: "string"}
OTHERS = "other_columns"  # JSON of what has no column of its own


_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode


def parquet_modules() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises ValueError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install '.[batch]', or write JSONL") from None
    return pyarrow, pyarrow.parquet


def column_kinds(sample: Iterable[Mapping[str, Any]], results: Mapping[str, Kind]) -> dict[str, Kind]:
    """The columns of all parts: those of the sample, `other_columns` and the results.

    sample: the carried columns of the first rows of the input (those of part 0, for every shard). A column of booleans,
    integers, numbers or strings is one; anything else (lists, objects, a mixture, nulls only) is JSON.
    """
    seen: dict[str, set[Kind]] = {}
    for row in sample:
        for column, value in row.items():
            kinds = seen.setdefault(column, set())
            if value is not None:
                plain = PLAIN.get(type(value))
                kinds.add(plain if plain and _fits(value, plain) else "json")
    return {c: _common(kinds) for c, kinds in seen.items() if c not in results} | {OTHERS: "json", **results}


def encode(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind]) -> bytes:
    """A file of these rows: their `table`."""
    file = io.BytesIO()
    parquet_modules()[1].write_table(table(rows, kinds), file)
    return file.getvalue()


def table(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind]) -> Any:
    """These rows as a pyarrow.Table with the columns that `kinds` has.

    What does not fit, a value of another type or in a column that is not there, goes into the row's `other_columns`, an
    object as JSON: nothing is lost and no row fails.
    """
    pa = parquet_modules()[0]
    columns: dict[str, list[Any]] = {column: [] for column in kinds}
    for row in rows:
        others = {c: v for c, v in row.items() if v is not None and not _fits(v, kinds.get(c))}
        for column, kind in kinds.items():
            value = None if column in others else row.get(column)
            if column == OTHERS:
                value = others | ({} if value is None else {OTHERS: value}) or None
            columns[column].append(to_json(value) if kind == "json" and value is not None else value)
    types = {
        "bool": pa.bool_(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "string": pa.string(),
        "json": pa.string(),
        "list<int32>": pa.list_(pa.int32()),
        "list<float64>": pa.list_(pa.float64()),
        "list<string>": pa.list_(pa.string()),
    }
    arrays = [pa.array(columns[column], types[kind]) for column, kind in kinds.items()]
    return pa.table(arrays, names=list(kinds))


def to_json(value: Any) -> str:
    """JSON of anything on one line. What JSON has no form for is a string (times, bytes), or null (NaN, infinity)."""
    try:
        text = _ENCODE(value)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=str)
    return (
        text if _is_text(text) else json.dumps(json.loads(text))
    )  # half of a surrogate pair has no UTF-8, but an escape


def _common(kinds: set[Kind]) -> Kind:
    if kinds == {"int64", "float64"}:
        return "float64"
    return next(iter(kinds)) if len(kinds) == 1 else "json"


def _fits(value: Any, kind: Kind | None) -> bool:
    """Whether a column of this kind can have exactly this value."""
    match kind:
        case "int64":
            return type(value) is int and -(2**63) <= value < 2**63
        case "float64":
            return type(value) is float or (type(value) is int and abs(value) <= 2**53)
        case "string":
            return type(value) is str and _is_text(value)
        case "bool":
            return type(value) is bool
    return kind is not None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
