"""Parts as Parquet: one schema for all parts of a job, whatever rows come."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxinfer.batch.row import Origin
from jaxinfer.batch.sources import Source, reading
from jaxinfer.batch.tables import Kind
from jaxinfer.batch.values import to_json


def parquet_modules() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises ValueError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install '.[batch]', or write JSONL") from None
    return pyarrow, pyarrow.parquet


def common_schema(sources: Sequence[Source]) -> Any:
    """The pyarrow.Schema that columns keep which are carried from Parquet to Parquet: one that all of the files have,
    but for columns that a file does not have and for integers and the like of other sizes. None where there is none, or
    a file is no Parquet: then columns are as JSON has them."""
    if any(source.format[0] != "parquet" for source in sources):
        return None
    pa, parquet = parquet_modules()
    schemas = []
    for source in sources:
        with reading(source.name), source.open() as file:
            schemas.append(parquet.read_schema(file).remove_metadata())
    try:
        common = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    of_whole = {field.name for schema in schemas for field in schema if pa.types.is_integer(field.type)}
    rounded = any(pa.types.is_floating(field.type) and field.name in of_whole for field in common)
    return None if rounded else common


def encode(
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, Kind],
    origins: Sequence[Origin | None] = (),
    schema: Any = None,
) -> bytes:
    """A file of these rows: their `table`."""
    file = io.BytesIO()
    parquet_modules()[1].write_table(table(rows, kinds, origins, schema), file)
    return file.getvalue()


def table(
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, Kind],
    origins: Sequence[Origin | None] = (),
    schema: Any = None,
) -> Any:
    """These rows, which fit, as a pyarrow.Table with the columns that `kinds` has. origins, schema: of the columns that
    are "as read", where each row was and which types they have."""
    pa = parquet_modules()[0]
    types = {
        "bool": pa.bool_(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "string": pa.string(),
        "json": pa.string(),
        "list<bool>": pa.list_(pa.bool_()),
        "list<int32>": pa.list_(pa.int32()),
        "list<int64>": pa.list_(pa.int64()),
        "list<float64>": pa.list_(pa.float64()),
        "list<string>": pa.list_(pa.string()),
    }
    arrays = []
    for column, kind in kinds.items():
        if kind == "as read":
            type = schema.field(column).type
            arrays.append(pa.chunked_array(_chunks(pa, column, type, origins), type))
            continue
        values = [row.get(column) for row in rows]
        if kind == "json":
            values = [None if value is None else to_json(value) for value in values]
        arrays.append(pa.array(values, pa.list_(pa.float32(), kind) if isinstance(kind, int) else types[kind]))
    return pa.table(arrays, names=list(kinds)).unify_dictionaries()


def _chunks(pa: Any, column: str, type: Any, origins: Sequence[Origin | None]) -> Iterator[Any]:
    """What the column had where the rows were read: a slice for rows that were one after the other."""
    entries = [(i, *(origin or (None, 0))) for i, origin in enumerate(origins)]
    for _, group in groupby(entries, lambda entry: (id(entry[1]), entry[2] - entry[0] if entry[1] is not None else 0)):
        run = list(group)
        _, batch, start = run[0]
        if batch is None or column not in batch.schema.names:
            yield pa.nulls(len(run), type)
        else:
            yield batch.column(column).slice(start, len(run)).cast(type)
