"""One schema for all parts, whatever comes."""

import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batch.parquet import OTHERS, column_kinds, encode, to_json

pq = pytest.importorskip("pyarrow.parquet")


def read(content):
    return pq.read_table(io.BytesIO(content))


def test_kinds():
    sample = [
        {"i": 1, "f": 0.5, "mixed": 1, "s": "a", "b": True, "list": [1], "null": None, "big": 2**70, "late": None},
        {"i": None, "f": 1, "mixed": "x", "s": "b", "b": False, "list": [], "null": None, "big": 1, "half": "\ud800"},
    ]
    kinds = column_kinds(sample, {"result": "string"})
    assert kinds == {
        "i": "int64",
        "f": "float64",
        "mixed": "json",
        "s": "string",
        "b": "bool",
        "list": "json",
        "null": "json",
        "big": "json",
        "late": "json",
        "half": "json",
        OTHERS: "json",
        "result": "string",
    }


def test_what_does_not_fit_is_kept():
    kinds = column_kinds([{"i": 1, "s": "a", "n": None}], {"ids": "list<int32>"})
    rows = [
        {"i": 2, "s": "b", "n": {"x": [1]}, "ids": [1, 2]},
        {"i": 2.5, "s": 7, "ids": None},
        {"i": True, "s": "\ud800", "new": [None], "n": None},
        {"i": 2**63, "s": None, "new": None, OTHERS: "somebody's"},
    ]
    table = read(encode(rows, kinds))
    assert [str(field.type) for field in table.schema] == [
        "int64",
        "string",
        "string",
        "string",
        "list<element: int32>",
    ]
    got = table.to_pylist()
    assert got[0] == {"i": 2, "s": "b", "n": '{"x": [1]}', OTHERS: None, "ids": [1, 2]}
    assert [row["i"] for row in got[1:]] == [None] * 3
    others = [json.loads(row[OTHERS]) for row in got[1:]]
    assert others[:2] == [{"i": 2.5, "s": 7}, {"i": True, "s": "\ud800", "new": [None]}]
    assert others[2] == {"i": 2**63, OTHERS: "somebody's"}


def test_no_rows():
    assert read(encode([], column_kinds([], {"error": "string"}))).num_rows == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES), max_size=5)


@given(sample=ROWS, rows=ROWS)
@settings(deadline=None, max_examples=100)
def test_nothing_is_lost(sample, rows):
    """Whatever the first part had, each value is in its column, as itself or as JSON, or in `other_columns`."""
    kinds = column_kinds(sample, {})
    for row, got in zip(rows, read(encode(rows, kinds)).to_pylist(), strict=True):
        others = json.loads(got[OTHERS] or "{}")
        for column, value in row.items():
            if value is not None:
                kept = got.get(column)
                found = others[column] if kept is None else json.loads(kept) if kinds[column] == "json" else kept
                assert found == value


def test_json_of_anything():
    assert to_json({"ü": [1, None]}) == '{"ü": [1, null]}'
    assert to_json([math.nan, {"a": -math.inf}, (1.5,)]) == '[null, {"a": null}, [1.5]]'
    assert to_json("\ud800ü") == '"\\ud800\\u00fc"'
    assert to_json("two\nlines").count("\n") == 0
