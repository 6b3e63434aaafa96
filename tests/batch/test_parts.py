"""Files that are there whole or not at all."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import fsspec
import pytest

from jaxinfer.batch.parts import Output


def names(folder):
    return sorted(os.listdir(folder))


def break_off(output, path):
    """Ends in the middle of writing."""
    writing = output.whole(path)
    writing.__enter__().write(b"half")
    error = ZeroDivisionError()
    assert not writing.__exit__(ZeroDivisionError, error, None)


def test_a_folder_and_a_file(tmp_path):
    folder = Output(str(tmp_path / "out"))
    assert (folder.format, folder.file, folder.part(3)) == ("jsonl", None, str(tmp_path / "out/part-00003.jsonl"))
    assert Output(str(tmp_path / "out"), "parquet").part(123456).endswith("part-123456.parquet")
    file = Output(str(tmp_path / "out.parquet"))
    assert (file.format, file.file) == ("parquet", str(tmp_path / "out.parquet"))
    assert file.part(0) == str(tmp_path / "out.parquet.parts/part-00000.parquet")


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.csv", "csv"), ("a.CSV.gz", "csv.gz"), ("a.ndjson", "jsonl"), ("a.ndjson.zst", "jsonl.zst"), ("a.b", None)],
)
def test_a_name_says_what_is_in_it(tmp_path, name, format):
    output = Output(str(tmp_path / name))
    assert (output.file, output.format) == (str(tmp_path / name) if format else None, format or "jsonl")


def test_folders_may_be_called_anything(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for name in ("a.csv", "b.csv/"):
        output = Output(f"{tmp_path}/{name}")
        assert (output.file, output.format) == (None, "csv")
    assert Output(f"{tmp_path}/c.json/", "csv").part(0) == f"{tmp_path}/c.json/part-00000.csv"


@pytest.mark.parametrize(
    ("output", "format", "facts"),
    [
        ("out.jsonl", "parquet", ["out.jsonl", "format is parquet"]),
        ("out.csv", "csv.gz", ["format is csv.gz", "the name says csv;"]),
        ("out", "avro", ["'avro'", "jsonl, jsonl.gz, jsonl.zst, csv,", "parquet"]),
        ("out.json", None, ["no *.json is written", "*.csv"]),
        ("out.tar.gz", "csv", ["no *.gz is written"]),
        ("nowhere://out", None, ["nowhere"]),
    ],
)
def test_outputs_that_make_no_sense(output, format, facts):
    with pytest.raises(ValueError) as error:
        Output(output, format)
    assert all(fact in str(error.value) for fact in facts)


def test_a_part_replaces_another(tmp_path):
    output = Output(str(tmp_path))
    for content in (b"first\n", b"second\n"):
        output.write(output.part(0), content)
        assert (tmp_path / "part-00000.jsonl").read_bytes() == content
    assert names(tmp_path) == ["part-00000.jsonl"]
    assert output.numbers() == {0}


def test_nothing_half_is_left(tmp_path):
    output = Output(str(tmp_path))
    output.write(output.part(0), b"old\n")
    break_off(output, output.part(0))
    assert names(tmp_path) == ["part-00000.jsonl"]
    assert (tmp_path / "part-00000.jsonl").read_bytes() == b"old\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(tmp_path, monkeypatch, call):
    output = Output(str(tmp_path))
    output.write(output.part(0), b"old\n")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"part-00000\.jsonl: can't be written \(No space left on device\); what is fin"):
        output.write(output.part(0), b"new\n")
    assert names(tmp_path) == ["part-00000.jsonl"]
    assert (tmp_path / "part-00000.jsonl").read_bytes() == b"old\n"


def test_a_limit_of_the_system(tmp_path):
    """The same with a write that really fails, in a process that may write no more than 100,000 bytes a file."""
    code = f"""
from jaxinfer.batch.parts import Output
output = Output({str(tmp_path)!r})
output.write(output.part(0), b"a" * 90_000)
try:
    output.write(output.part(1), b"b" * 110_000)
except OSError as error:
    print(error)
"""
    command = ["bash", "-c", 'ulimit -f 98 && exec "$0" "$@"', sys.executable, "-B", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "part-00001.jsonl: can't be written (File too large)" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert names(tmp_path) == ["part-00000.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o555)
    output = Output(str(tmp_path))
    with pytest.raises(OSError, match=r"can't be written \(Permission denied\)"):
        output.write(output.part(0), b"new\n")
    with pytest.raises(OSError, match=r"can't be written \(Permission denied\)"):
        Output(str(tmp_path / "below")).make()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("mine")
    output = Output(str(tmp_path / "out"))
    with pytest.raises(NotADirectoryError, match="not a folder"):
        output.names()
    with pytest.raises(OSError, match="can't be written"):
        output.make()


def test_one_process_at_a_time(tmp_path):
    output = Output(str(tmp_path))
    with output.lock("a"), output.lock("b"), pytest.raises(ValueError, match="another process"):
        Output(str(tmp_path)).lock("a").__enter__()
    with output.lock("a"):
        pass
    assert names(tmp_path) == []


def test_a_lock_that_was_removed_is_none(tmp_path, monkeypatch):
    """Two that wait for one lock: who had it removes it, and the second must not have what is not there any more."""
    output = Output(str(tmp_path / "out"))
    flock, removals = (
        fcntl.flock,
        iter([lambda: os.unlink(output.path(".a.lock")), lambda: shutil.rmtree(output.folder)]),
    )

    def late(file, how):
        next(removals, lambda: None)()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with output.lock("a"):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert names(output.folder) == [".a.lock"]
        with pytest.raises(ValueError, match="another process"):
            Output(output.folder).lock("a").__enter__()


def test_a_store_of_objects():
    output = Output("memory://parts-test/out", "jsonl")
    assert output.names() == []
    output.make()
    with output.lock("a"):
        output.write(output.part(0), b"whole\n")
    assert output.names() == ["part-00000.jsonl"]
    with fsspec.open("memory://parts-test/out/part-00000.jsonl") as file:
        assert file.read() == b"whole\n"


def test_a_stream_to_a_store(tmp_path):
    """fsspec's way to write a file that is there only when it is complete, here with its local files."""
    output = Output(str(tmp_path))
    output.local = False
    with output.whole(output.part(0)) as file:
        file.write(b"whole\n")
    break_off(output, output.part(1))
    assert names(tmp_path) == ["part-00000.jsonl"]
    assert (tmp_path / "part-00000.jsonl").read_bytes() == b"whole\n"
