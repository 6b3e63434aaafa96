"""Rows of files: every format, every way of being broken, every place to start from."""

import base64
import csv
import gzip
import io
import json
import os
import sys
import tracemalloc
from decimal import Decimal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batch import packing, readers
from jaxinfer.batch.arrays import elements
from jaxinfer.batch.readers import count_rows, records
from jaxinfer.batch.row import Record
from jaxinfer.batch.sources import Source, find_sources
from tests.refusals import line

ROWS = b'{"prompt": "a"}\n\n \t\r\n{"prompt": "b"}\r\nbroken\n{"prompt": "c"}'
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def read(folder, name: str, content: bytes, **options: bool) -> list[Record]:
    (folder / name).write_bytes(content)
    return [*records(find_sources([str(folder / name)]), **options)]


def values(folder, name: str, content: bytes) -> list[object]:
    """What the rows are, or why they are none."""
    return [record.error or record.value for record in read(folder, name, content)]


def places(records: list[Record]) -> list[str]:
    return [record.where.rsplit("/", 1)[-1] for record in records]


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines(tmp_path, suffix):
    records = read(tmp_path, f"a.jsonl{suffix}", PACK[suffix](ROWS))
    assert [json.loads(r.value) if r.index != 2 else r.value for r in records] == [
        {"prompt": "a"},
        {"prompt": "b"},
        b"broken",
        {"prompt": "c"},
    ]
    assert places(records) == [f"a.jsonl{suffix}:{n}" for n in (1, 4, 5, 6)]
    assert [r.index for r in records] == [0, 1, 2, 3]


def test_text_is_a_prompt_a_line(tmp_path):
    content = "\ufeffone\r\n\n two \n\x0b\x85\u2028\nlast".encode() + b"\nnot \xff UTF-8\r\n\r\n"
    assert values(tmp_path, "a.txt", content) == [
        {"text": text} for text in ("one", " two ", "\x0b\x85\u2028", "last", "not \udcff UTF-8")
    ]


def test_empty_lines_of_text_are_rows_where_lines_count(tmp_path):
    records = read(tmp_path, "a.txt", b"one\n\n two \r\n\r\nlast\n\n", empty_lines=True)
    assert [record.value["text"] for record in records] == ["one", "", " two ", "", "last", ""]
    assert places(records) == [f"a.txt:{n}" for n in range(1, 7)]
    assert [len(read(tmp_path, "a.jsonl", b"{}\n\n{}\n", empty_lines=flag)) for flag in (False, True)] == [2, 2]


@pytest.mark.parametrize("suffix", PACK)
def test_arrays(tmp_path, suffix):
    rows = [{"a": '}],[{"\\', "b": [[1, {"c": "\\"}], 2]}, {"é\n": "\\\\\\"}, 3, "x,]", {}]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), "\ufeff \r\n" + json.dumps(rows) + "\n\n"):
        records = read(tmp_path, f"a.json{suffix}", PACK[suffix](content.encode()))
        assert [json.loads(record.value) for record in records] == rows
        assert [record.index for record in records] == list(range(5))
    records = read(tmp_path, f"b.json{suffix}", PACK[suffix](json.dumps([{"a": 1}, {"b": 2}], indent=1).encode()))
    assert places(records) == [f"b.json{suffix}:{n}" for n in (2, 5)]
    for none in (b"[]", b" [\n] ", b"", b"\n"):
        assert read(tmp_path, f"b.json{suffix}", PACK[suffix](none)) == []
    assert values(tmp_path, f"b.json{suffix}", PACK[suffix](b'{"a": 1}\n{"a": [2]}\n')) == [b'{"a": 1}', b'{"a": [2]}']


def test_broken_elements_of_arrays_leave_the_others_alone(tmp_path, monkeypatch):
    content = b'[{"a": 1}, {"a" 2}, , {"a": [3}},\n{"a": 4}, %s, {"a": 5},]' % (b'"' + b"x" * 2000 + b'"')
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    contents = values(tmp_path, "a.json", content)
    assert contents == [b'{"a": 1}', b'{"a" 2}', b"", b'{"a": [3}}', b'{"a": 4}', readers.TOO_LONG, b'{"a": 5}', b""]


@pytest.mark.parametrize(
    ("content", "problem"), [(b'[{"a": 1}', "no end"), (b"[1] [2]", "comes after"), (b"[", "no end")]
)
def test_arrays_that_are_cut_off_say_so(tmp_path, content, problem):
    assert problem in line(lambda: read(tmp_path, "a.json", content), OSError)


JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(), of, max_size=3),
)


@given(st.lists(JSON), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_elements_do_not_depend_on_how_they_are_read(rows, size, escaped):
    content = b"\n" + json.dumps(rows, ensure_ascii=escaped, indent=1).encode()
    pieces = iter([content[i : i + size] for i in range(0, len(content), size)])
    numbered = [*elements(pieces, 10**6)]
    assert [json.loads(element) for _, element in numbered] == rows
    assert all(content.split(b"\n")[number - 1].strip()[:1] == element[:1] for number, element in numbered)


def test_a_slow_pipe_gives_what_is_there():
    ends = os.pipe()
    with open(ends[0]) as reading, open(ends[1], "wb", buffering=0) as writing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", reading)
        reader = records(find_sources(["-"]))
        for i in range(3):
            writing.write(b"%d\n" % i)
            assert next(reader).value == b"%d" % i


def test_csv(tmp_path):
    content = '\ufeffid,text,\r\n1,"two\r\nlines, ""quoted""",\n\n2,é,x\n'.encode()
    records = read(tmp_path, "a.csv", content)
    assert [r.value for r in records] == [
        {"id": "1", "text": 'two\r\nlines, "quoted"', "": ""},
        {"id": "2", "text": "é", "": "x"},
    ]
    assert places(records) == ["a.csv:2", "a.csv:5"]


def test_broken_rows_of_csv_leave_the_others_alone(tmp_path):
    content = b'a,b\n1,2\n3\n4,5,6\n"7"x,8\n9,"\xff"\n"long\ntext",10\n11,12\n13,"never closed\n14,15\n'
    contents = values(tmp_path, "a.csv", content)
    assert [i for i, value in enumerate(contents) if isinstance(value, str)] == [1, 2, 3, 7]
    assert "1 fields, where the first row has 2" in contents[1]
    assert "quote" in contents[3]
    assert "quote" in contents[7]
    assert contents[4] == {"a": "9", "b": "\udcff"}
    assert contents[5:7] == [{"a": "long\ntext", "b": "10"}, {"a": "11", "b": "12"}]


@pytest.mark.parametrize("header", [b"a,a\n", b'"a\n'])
def test_csv_whose_columns_have_no_names_is_refused(tmp_path, header):
    assert "a.csv:1" in line(lambda: read(tmp_path, "a.csv", header))


def table() -> pa.Table:
    return pa.table(
        {
            "prompt": pa.array(["a", None, "c"], pa.large_string()),
            "when": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
            "price": [Decimal("1.50"), None, None],
            "image": [b"\xff", None, b""],
            "messages": [[{"role": "user", "content": "x"}], None, []],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "half": pa.array([1.5, None, 2], pa.float16()),
        }
    )


def test_parquet(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=2)
    rows = [*records(find_sources([str(tmp_path / "a.parquet")]))]
    assert places(rows) == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    assert rows[0].value == {
        "prompt": "a",
        "when": "1970-01-01 00:00:00.000000001Z",
        "price": Decimal("1.50"),
        "image": b"\xff",
        "messages": [{"role": "user", "content": "x"}],
        "kind": "x",
        "half": 1.5,
    }
    assert set(rows[1].value.values()) == {None, "y", "1970-01-01 00:00:00.000000002Z"}


def test_one_value_of_parquet_that_is_not_utf8_is_one_bad_row(tmp_path):
    texts = [b"a", b"\xff", *[b"c"] * 600]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
    buffers = [None, pa.py_buffer(pa.array(offsets, pa.int32()).buffers()[1]), pa.py_buffer(b"".join(texts))]
    pq.write_table(
        pa.table({"prompt": pa.Array.from_buffers(pa.string(), len(texts), buffers)}), tmp_path / "a.parquet"
    )
    rows = [*records(find_sources([str(tmp_path / "a.parquet")]))]
    assert [r.index for r in rows if r.error] == [1]
    assert "utf-8" in rows[1].error
    assert [r.value for r in rows if not r.error] == [{"prompt": "a"}] + [{"prompt": "c"}] * 600


@pytest.fixture
def mixed(tmp_path):
    """11 rows in one file of each format, and an empty one."""
    write = {
        "1.jsonl": b"1\n\n2\n",
        "2.jsonl": b"",
        "3.txt.gz": gzip.compress(b"3\n\n4"),
        "4.csv.zst": zstandard.compress(b'a\n"5\n"\n6\n'),
    }
    for name, content in write.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"a": [7, 8, 9, 10, 11]}), tmp_path / "5.parquet", row_group_size=2)
    return find_sources([str(tmp_path)])


def test_any_row_can_be_the_first(mixed):
    assert [r.index for r in records(mixed)] == list(range(11))
    everything = [*records(mixed, empty_lines=True)]
    assert [r.index for r in everything] == list(range(12))
    for start in range(14):
        assert [*records(mixed, start, empty_lines=True)] == everything[start:]
    assert count_rows(mixed) == 12


def test_row_groups_that_are_not_wanted_are_not_read(mixed, monkeypatch):
    read = []
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, row_groups: read.append(row_groups) or whole(self, size, row_groups),
    )
    assert [r.where[-2:] for r in records(mixed, 9)] == [":4", ":5"]
    assert read == [[1], [2]]


def test_rows_from_elsewhere_and_from_stdin(monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.jsonl.gz", gzip.compress(ROWS))
    try:
        sources = find_sources(["memory://bucket/a.jsonl.gz"])
        assert [r.where for r in records(sources, 3)] == ["memory:///bucket/a.jsonl.gz:6"]
        assert count_rows(sources) is None  # it would be downloaded twice
    finally:
        store.rm("/bucket", recursive=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ROWS)))
    sources = find_sources(["-"])
    assert count_rows(sources) is None
    assert [(r.index, r.where) for r in records(sources, 2)] == [(2, "stdin:5"), (3, "stdin:6")]


@given(st.lists(st.binary(max_size=8)), st.integers(1, 5), st.sampled_from(["", ".gz", ".zst"]))
@settings(deadline=None)
def test_lines_do_not_depend_on_how_they_are_read(lines, size, suffix):
    content = b"\n".join(part.replace(b"\n", b"") for part in lines)
    half = len(content) // 2
    packed = PACK[suffix](content[:half]) + (b"\0\0" if suffix == ".gz" else b"") + PACK[suffix](content[half:])
    source = Source(f"a.jsonl{suffix}", f"memory://a.jsonl{suffix}", 0)
    fsspec.filesystem("memory").pipe(f"/a.jsonl{suffix}", packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", size)
        patch.setattr(packing, "PACKED_PIECE", size)
        numbered = [(int(r.where.rsplit(":")[-1]), r.value) for r in records([source])]
    whole = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert numbered == [(i, part) for i, part in enumerate(whole, 1) if part.strip()]


def test_a_line_without_end_is_a_bad_row_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    monkeypatch.setattr(readers, "PIECE", 64)
    long, fine = b"x" * 5000, b"x" * 1000
    content = b"1\n" + long + b"\n2\n" + fine + b"\n" + long
    assert values(tmp_path, "a.jsonl", content) == [b"1", readers.TOO_LONG, b"2", fine, readers.TOO_LONG]
    assert values(tmp_path, "a.txt", content)[1::3] == [readers.TOO_LONG] * 2
    assert "a.csv:2" in line(lambda: read(tmp_path, "a.csv", content))


def test_fields_of_csv_may_be_long(tmp_path):
    assert values(tmp_path, "a.csv", b"a\n" + b"x" * 200_000) == [{"a": "x" * 200_000}]
    assert csv.field_size_limit() >= readers.MAX_LINE


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_that_are_cut_or_damaged_say_where(tmp_path, suffix):
    noise = base64.b64encode(bytes(i * i % 251 for i in range(30_000)))
    packed = PACK[suffix](b"\n".join(noise[i : i + 100] for i in range(0, len(noise), 100)))
    assert len(read(tmp_path, f"a.jsonl{suffix}", packed)) == 400
    for content in (packed[:-1], packed[: len(packed) // 2], packed + packed[:7], packed + b"rubbish", b"{}\n"):
        intact: list[Record] = []
        (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
        reading = records(find_sources([str(tmp_path / f"a.jsonl{suffix}")]))
        problem = line(lambda reading=reading, intact=intact: intact.extend(reading), OSError)
        assert f"a.jsonl{suffix}: can't be read on after line" in problem
        rows = int(intact[-1].where.rsplit(":")[-1]) if intact else 0
        assert f"line {rows}:" in problem
        assert b"".join(r.value for r in intact) == noise[: 100 * rows]  # nothing but whole lines
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0x55
    assert "after line" in line(lambda: read(tmp_path, f"a.jsonl{suffix}", bytes(damaged)), OSError)


def test_parquet_that_is_cut_or_damaged_says_where(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [str(i) * 20 for i in range(9)]}), path, row_group_size=3, use_dictionary=False)
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged = whole[:start] + b"\xff" * 30 + whole[start + 30 :]
    for content, row in ((whole[:-3], 0), (whole[:100], 0), (b"", 0), (b"PAR1", 0), (damaged, 3)):
        problem = line(lambda content=content: read(tmp_path, "a.parquet", content), OSError)
        assert f"a.parquet: can't be read on after row {row}" in problem
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, path)
    assert "same name" in line(lambda: [*records(find_sources([str(path)]))], OSError)


def test_a_file_that_goes_away_says_so(mixed, tmp_path):
    (tmp_path / "3.txt.gz").unlink()
    reading = records(mixed)
    assert [next(reading).index, next(reading).index] == [0, 1]
    assert "3.txt.gz" in line(lambda: next(reading), FileNotFoundError)


def test_memory_does_not_depend_on_how_much_there_is(tmp_path):
    """30 MB of rows each, some of it packed so well that the file is 3 kB."""
    rows = 100_000
    noise = b"".join(b'{"prompt": "%d"}' % i + b" " * 284 + b"\n" for i in range(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(noise, 1))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress((b"y" * 299 + b"\n") * rows))
    (tmp_path / "c.csv").write_bytes(b"a\n" + b"".join(b"%d\n" % i for i in range(rows // 5)))
    sources = find_sources([str(tmp_path)])
    assert sources[1].size < 5000
    tracemalloc.start()
    try:
        assert count_rows(sources) == rows + rows + rows // 5
        assert tracemalloc.get_traced_memory()[1] < 15 * 2**20
    finally:
        tracemalloc.stop()


def test_parquet_is_read_in_pieces(tmp_path):
    """One row group of 64 MB."""
    texts = pa.array([f"{i:064}" * 16 for i in range(1000)])
    pq.write_table(pa.table({"a": pa.chunked_array([texts] * 64)}), tmp_path / "a.parquet", row_group_size=10**6)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in records(find_sources([str(tmp_path)])))
    assert most < 16 * 2**20
