"""One schema for all parts, whatever comes."""

import io
import json
import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batch.parquet import common_schema, encode
from jaxinfer.batch.readers import records
from jaxinfer.batch.sources import find_sources
from jaxinfer.batch.tables import column_kinds, fitting
from jaxinfer.batch.values import to_json

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def written(rows, kinds, *how):
    """What is read of a part of these rows."""
    rows = fitting(rows, kinds, "others")
    kinds = kinds | {"others": "json"} if any("others" in row for row in rows) else kinds
    return pq.read_table(io.BytesIO(encode(rows, kinds, *how)))


def test_kinds():
    sample = [
        {"i": 1, "f": 0.5, "mixed": 1, "s": "a", "b": True, "null": None, "big": 2**70, "late": None},
        {"i": None, "f": 1, "mixed": "x", "s": "b", "b": False, "null": None, "big": 1, "half": "\ud800"},
        {"l": [1], "fs": [1], "ss": [None, "a"], "none": [], "deep": [[1]], "mix": [1, "a"], "o": {"a": 1}, "or": [1]},
        {"l": [], "fs": [1.5], "ss": None, "none": [None], "deep": [], "mix": [], "o": {}, "or": 1},
    ]
    kinds = column_kinds(sample, {"result": "string"})
    assert kinds == {
        "i": "int64",
        "f": "float64",
        "mixed": "json",
        "s": "string",
        "b": "bool",
        "null": "json",
        "big": "json",
        "late": "json",
        "half": "json",
        "l": "list<int64>",
        "fs": "list<float64>",
        "ss": "list<string>",
        "none": "json",
        "deep": "json",
        "mix": "json",
        "o": "json",
        "or": "json",
        "result": "string",
    }


def test_what_does_not_fit_is_kept():
    kinds = column_kinds([{"i": 1, "s": "a", "n": None, "l": [1]}], {"ids": "list<int32>"})
    rows = [
        {"i": 2, "s": "b", "n": {"x": [1]}, "ids": [1, 2], "l": [3, None]},
        {"i": 2.5, "s": 7, "ids": None, "l": [0.5]},
        {"i": True, "s": "\ud800", "new": [None], "n": None},
        {"i": 2**63, "s": None, "new": None, "others": {"i": "somebody's"}},
    ]
    table = written(rows, kinds)
    assert [str(field.type) for field in table.schema] == [
        "int64",
        "string",
        "string",
        "list<element: int64>",
        "list<element: int32>",
        "string",
    ]
    got = table.to_pylist()
    assert got[0] == {"i": 2, "s": "b", "n": '{"x": [1]}', "l": [3, None], "ids": [1, 2], "others": None}
    assert [row["i"] for row in got[1:]] == [None] * 3
    others = [json.loads(row["others"]) for row in got[1:]]
    assert others[:2] == [{"i": 2.5, "s": 7, "l": [0.5]}, {"i": True, "s": "\ud800", "new": [None]}]
    assert others[2] == {"i": "somebody's"}


def test_there_are_no_other_columns_where_nothing_is_in_them():
    assert written([{"a": 1}, {}], column_kinds([{"a": 1}], {"error": "string"})).column_names == ["a", "error"]
    assert written([], column_kinds([], {"error": "string"})).num_rows == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES), max_size=5)


@given(sample=ROWS, rows=ROWS)
@settings(deadline=None, max_examples=100)
def test_nothing_is_lost(sample, rows):
    """Whatever the first part had, each value is in its column, as itself or as JSON, or in the column of others."""
    kinds = column_kinds(sample, {})
    for row, got in zip(rows, written(rows, kinds).to_pylist() if kinds else [], strict=bool(kinds)):
        others = json.loads(got.get("others") or "{}")
        for column, value in row.items():
            if value is not None:
                kept = got.get(column)
                restored = others[column] if kept is None else json.loads(kept) if kinds[column] == "json" else kept
                assert restored == value
                assert isinstance(value, bool) == isinstance(restored, bool)


def typed(start=0):
    """A table of types that JSON does not have."""
    return pa.table(
        {
            "id": pa.array([start, start + 1, None], pa.int32()),
            "big": pa.array([2**64 - 1, 2**63, 5], pa.uint64()),
            "when": pa.array([1, None, 10**18 + 1], pa.timestamp("ns", "UTC")),
            "price": [Decimal("1.50"), None, Decimal("2.25")],
            "tags": [["a", None], [], None],
            "messages": [[{"role": "user", "content": "x"}], None, []],
            "image": [b"\xff", None, b""],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "small": pa.array([1.5, float("nan"), float("inf")], pa.float32()),
        }
    )


def test_columns_of_parquet_keep_their_types(tmp_path):
    tables = [typed(), typed(10)]
    for i, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=2)
    sources = find_sources([str(tmp_path)])
    schema = common_schema(sources)
    inputs = [*records(sources)]
    kinds = dict.fromkeys(schema.names, "as read") | {"error": "string"}
    wanted = pa.concat_tables(tables)
    for rows in ([0, 1, 2, 3, 4, 5], [1, 2], [4], []):
        got = written([{"error": "e"}] * len(rows), kinds, [inputs[i].origin for i in rows], schema)
        assert got.column_names == [*kinds]
        for name in schema.names:
            assert got.schema.field(name).type == schema.field(name).type
            assert str(got[name].to_pylist()) == str(
                wanted[name].take(pa.array(rows, pa.int64())).to_pylist()
            )  # nan is not nan
    got = written([{}, {}], kinds, [inputs[0].origin, None], schema)
    assert got["id"].to_pylist() == [0, None]  # of a row that could not be read


def test_files_of_several_schemas(tmp_path):
    def schema(*tables):
        for i, table in enumerate(tables):
            pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
        sources = find_sources([str(tmp_path)])
        return common_schema(sources), [*records(sources)]

    wide, inputs = schema({"a": pa.array([1], pa.int32())}, {"a": [2**40], "b": ["x"]}, {"a": pa.nulls(1)})
    assert [str(field.type) for field in wide] == ["int64", "string"]
    got = written([{}, {}, {}], {"a": "as read", "b": "as read"}, [record.origin for record in inputs], wide)
    assert got.to_pylist() == [{"a": 1, "b": None}, {"a": 2**40, "b": "x"}, {"a": None, "b": None}]
    assert schema({"a": [1]}, {"a": ["x"]})[0] is None
    assert schema({"a": [2**60 + 1]}, {"a": [0.5]})[0] is None  # no number is rounded
    (tmp_path / "a.jsonl").write_text("{}")
    assert schema({"a": [1]})[0] is None


def test_json_of_anything():
    assert to_json({"ü": [1, None]}) == '{"ü": [1, null]}'
    assert to_json([math.nan, {"a": -math.inf}, (1.5,)]) == '[null, {"a": null}, [1.5]]'
    assert to_json("\ud800ü") == '"\\ud800\\u00fc"'
    assert to_json("two\nlines").count("\n") == 0
