"""Rows as CSV, and several files of it as one."""

import csv
import gzip
import io
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch.formats import csv_body, csv_rows, packing_of, to_csv
from jaxinfer.batch.packing import packed, unpacked

ROWS = [
    {"a": "x", "b, c": None, "d": 1.5},
    {"a": 'two\n"lines",', "b, c": "", "d": True},
    {"a": " é", "b, c": [1, {"x": None}], "e": 1},
]


def read(content: bytes) -> list[list[str]]:
    return [*csv.reader(io.StringIO(content.decode(), newline=""), strict=True)]


def test_csv():
    assert to_csv(ROWS, ["a", "b, c", "d"]).decode() == (
        'a,"b, c",d\nx,,1.5\n"two\n""lines"",","",true\n" é","[1, {""x"": null}]",\n'
    )
    assert csv_rows(to_csv(ROWS, ["a", "b, c", "d"])) == 3
    assert csv_rows(to_csv([], ["a\nb"])) == 0


def test_files_of_which_some_have_another_column():
    few, all_ = ["a", "b, c"], ["a", "b, c", "e"]
    whole = to_csv([], all_) + csv_body(to_csv(ROWS[:2], few), few, all_) + csv_body(to_csv(ROWS[2:], all_), all_, all_)
    assert read(whole) == read(to_csv([{**row, "d": None} for row in ROWS], all_))


@given(
    st.lists(st.fixed_dictionaries({"a": st.text(st.characters(codec="utf-8")), "b": st.none() | st.text('\r\n," ')}))
)
def test_what_is_written_can_be_read(rows):
    content = to_csv(rows, ["a", "b"])
    assert read(content) == [["a", "b"], *([row["a"], row["b"] or ""] for row in rows)]
    assert csv_rows(content) == len(rows)


@pytest.mark.parametrize(("format", "packing"), [("csv", ""), ("jsonl", ""), ("csv.gz", ".gz"), ("jsonl.zst", ".zst")])
def test_packed(format, packing):
    assert packing_of(format) == packing
    content = json.dumps(ROWS).encode() * 100
    both = packed(content, packing) + packed(content, packing)
    assert packed(content, packing) == packed(content, packing)  # no time is in it
    assert b"".join(unpacked(iter([both]), packing, "a")) == 2 * content
    if packing == ".gz":
        assert gzip.decompress(both) == 2 * content
    if packing == ".zst":
        assert zstandard.ZstdDecompressor().stream_reader(both, read_across_frames=True).read() == 2 * content
