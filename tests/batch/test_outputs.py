"""What is written: columns and their types, CSV, Parquet, results as input."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxinfer.batch import merge
from tests.batch.conftest import QUESTIONS, after_a_part, files, read_rows


def test_columns_of_parquet_that_drift(job, rows_file, tmp_path):
    """Columns are those of the first part; what comes later is not lost and ends nothing."""
    rows = [{"prompt": "x", "a": 1} for _ in range(10)] + [{"prompt": "x", "a": 1.5, "b": [2]}, {"prompt": "x"}]
    assert not job(rows_file(rows), format="parquet", stop=after_a_part()).complete
    job(rows_file(rows), format="parquet")
    got = read_rows(tmp_path / "out")
    assert [row["a"] for row in got] == [1] * 10 + [None] * 2
    assert [row.get("other_columns") for row in got] == [None] * 10 + ['{"a": 1.5, "b": [2]}', None]
    assert "other_columns" not in got[0]
    for format in ("parquet", "csv", "csv.gz"):
        job(rows_file(rows), f"out.{format}")
    assert read_rows(tmp_path / "out.parquet") == [{"other_columns": None, **row} for row in got]
    with (
        open(tmp_path / "out.csv", newline="") as plain,
        gzip.open(tmp_path / "out.csv.gz", "rt", newline="") as packed,
    ):
        table, same = (list(csv.DictReader(file, strict=True)) for file in (plain, packed))
    assert table == same
    assert [row["generated_text"] for row in table] == [row["generated_text"] for row in got]
    assert [(row["a"], row["other_columns"]) for row in table] == [("1", "")] * 10 + [("1.5", '{"b": [2]}'), ("", "")]


def test_tables_have_no_columns_that_nobody_asked_for(job, rows_file, tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "x", "params": {"logprobs": 0}}]
    for count in (1, 2):
        for name in (f"{count}.parquet", f"{count}.csv"):
            job(rows_file(rows[:count]), name)
    plain, asked = (read_rows(tmp_path / f"{count}.parquet") for count in (1, 2))
    columns = ["prompt", "generated_text", "finish_reason", "prompt_tokens", "generated_tokens", "error"]
    assert list(plain[0]) == columns
    assert list(asked[0]) == ["prompt", "params", *columns[1:5], "logprobs", "error"]
    assert json.loads(asked[1]["logprobs"])[0][0]["rank"] == 1
    assert (tmp_path / "1.csv").read_text().splitlines()[0] == ",".join(columns)


def test_csv(job, rows_file, tmp_path):
    """What was CSV comes back as CSV, and packed it is the same."""
    texts = ['What is 1 + 2?\n"Yes", or', "What is 2 + 3?"]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "a, b", "prompt"], *([i, "é", text] for i, text in enumerate(texts))])
    for name in ("out.csv", "out.csv.zst", "parts"):
        format = "csv" if name == "parts" else None
        summary = job(tmp_path / "rows.csv", name, format=format, rows_per_part=1, token_ids=True)
        assert (summary.rows, summary.errors) == (2, 0)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert [(row["id"], row["a, b"], row["prompt"], row["error"]) for row in rows] == [
        (str(i), "é", text, "") for i, text in enumerate(texts)
    ]
    job(rows_file([{"prompt": text} for text in texts]), "expected", token_ids=True)
    for row, wanted in zip(rows, read_rows(tmp_path / "expected"), strict=True):
        assert (row["generated_text"], row["finish_reason"]) == (wanted["generated_text"], wanted["finish_reason"])
        assert json.loads(row["token_ids"]) == wanted["token_ids"]
        assert int(row["generated_tokens"]) == wanted["generated_tokens"]
    content = (tmp_path / "out.csv").read_bytes()
    with zstandard.open(tmp_path / "out.csv.zst", "rb") as packed:
        assert packed.read() == content
    parts = [(tmp_path / f"parts/part-0000{i}.csv").read_bytes() for i in (0, 1)]
    header = content[: content.index(b"\n") + 1]
    assert parts[0] + parts[1].removeprefix(header) == content


def test_types_of_parquet(job, tmp_path):
    table = pa.table(
        {
            "id": pa.array(range(6), pa.int16()),
            "when": pa.array([1, None, 3, 4, 5, 6], pa.timestamp("ns")),
            "tags": [["a"], [], None, ["b", None], [], []],
            "prompt": ["What is 1 + 2?", None, "What is 3 + 4?", "", "What is 5?", "What is 6?"],
            "about": [{"a": 1, "b": [0.5]}] * 6,
            "error": pa.nulls(6),
        }
    )
    for i in (0, 3):
        pq.write_table(table.slice(i, 3), tmp_path / f"rows{i}.parquet")
    sources = [tmp_path / "rows0.parquet", tmp_path / "rows3.parquet"]
    assert job(sources, "out.parquet", rows_per_part=2).errors == 2
    got = pq.read_table(tmp_path / "out.parquet")
    results = ["generated_text", "finish_reason", "prompt_tokens", "generated_tokens", "error"]
    assert got.column_names == ["id", "when", "tags", "prompt", "about", *results]
    kept = ["id", "when", "tags", "prompt", "about"]
    assert got.select(kept).equals(table.select(kept))
    assert [(error is None) for error in got["error"].to_pylist()] == [True, False, True, False, True, True]
    assert not job(sources, "out", format="parquet", rows_per_part=2, stop=after_a_part()).complete
    assert job(sources, "out", format="parquet", rows_per_part=2).complete
    assert read_rows(tmp_path / "out") == got.to_pylist()
    for i in range(2):
        job(sources, "shards.parquet", rows_per_part=2, shard=f"{i}/2")
    merge(tmp_path / "shards.parquet")
    assert pq.read_table(tmp_path / "shards.parquet").equals(got)


def test_an_output_as_input(demo, job, rows_file, tmp_path):
    """Columns that are called like results: all rows' are an error of the job, one row's is that row's."""
    job(rows_file(QUESTIONS[:3]), "first.jsonl")
    with pytest.raises(ValueError, match=r"first\.jsonl: has a column 'generated_text', which is a res.*--output-pre"):
        job(tmp_path / "first.jsonl", "second")
    assert not (tmp_path / "second").exists()
    options = {"prompt_template": "{prompt} {generated_text} What is 1 + 1?", "output_prefix": "then_"}
    first = read_rows(tmp_path / "first.jsonl")
    for name in ("second.jsonl", "second.parquet"):
        assert job(tmp_path / "first.jsonl", name, **options).errors == 0
        second = read_rows(tmp_path / name)
        assert [{c: v for c, v in row.items() if c in first[0]} for row in second] == first
        assert all(row["then_generated_tokens"] and row["then_error"] is None for row in second)
    job(rows_file([{"prompt": "x"}, {"prompt": "y", "error": "mine", "finish_reason": "", "id": 1}]), "third")
    assert read_rows(tmp_path / "third")[1] == {
        "prompt": "y",
        "id": 1,
        **dict.fromkeys(["generated_text", "finish_reason", "prompt_tokens", "generated_tokens"]),
        "error": f"{tmp_path}/rows.jsonl:2: has a column 'error', which is a result's name; rename it, or give "
        "--output-prefix",
        "other_columns": {"error": "mine"},
    }


def test_no_rows(job, rows_file, tmp_path):
    for name in ("out", "out.jsonl", "out.parquet"):
        summary = job(rows_file([]), name)
        assert (summary.complete, summary.rows) == (True, 0)
    assert files(tmp_path / "out") == {"part-00000.jsonl": b""}
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert read_rows(tmp_path / "out.parquet") == []


def test_rows_that_were_generated_can_be_scored(job, rows_file, tmp_path):
    """The error of a row that was served is null, and no obstacle."""
    rows = [{"prompt": "one", "continuation": " two", "error": e} for e in (None, "why")]
    summary = job(rows_file(rows), task="score", sampling_params=None)
    assert (summary.rows, summary.errors) == (2, 1)
    right, wrong = read_rows(tmp_path / "out")
    assert right["error"] is None
    assert "has a column 'error'" in wrong["error"]
