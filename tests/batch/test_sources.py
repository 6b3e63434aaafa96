"""Which files are read: found, named, refused, told apart."""

import os
import subprocess
import sys

import fsspec
import pytest

from jaxinfer.batch.sources import Source, find_sources
from tests.refusals import line


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str, content: bytes = b"{}\n") -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)


def names(*inputs: str) -> list[str]:
    return [source.name for source in find_sources(inputs)]


def test_files_globs_and_folders_in_the_order_given(folder):
    write("b.jsonl", "a.csv", "d/2.txt", "d/1.jsonl.gz", "d/10.JSONL")
    write("d/notes.md", "d/manifest.json", "d/.hidden.jsonl", "d/part.jsonl.tmp", "d/sub/x.jsonl", "d/x.parquet.gz")
    assert names("b.jsonl", "a.csv") == ["b.jsonl", "a.csv"]
    assert names("d") == names("d/") == ["d/1.jsonl.gz", "d/10.JSONL", "d/2.txt"]
    assert names("d/*.t?t", "[ab].*") == ["d/2.txt", "a.csv", "b.jsonl"]
    assert names("**/*.jsonl") == ["b.jsonl", "d/sub/x.jsonl"]
    assert names(f"{folder}/d/2.txt") == [f"{folder}/d/2.txt"]
    assert names("d/manifest.json") == ["d/manifest.json"]  # who names it, means it


def test_a_name_may_look_like_a_glob():
    write("a[1].jsonl", "a1.jsonl")
    assert names("a[1].jsonl") == ["a[1].jsonl"]


def test_a_name_that_is_not_unicode_is_shown_as_well_as_it_can_be():
    write(os.fsdecode(b"a\xff.jsonl"))
    (source,) = find_sources(["*.jsonl"])
    assert source.name == "a?.jsonl"
    assert source.open().read() == b"{}\n"


def test_links_are_the_files_that_they_lead_to(folder):
    write("blobs/x", content=b"12345")
    os.symlink("blobs/x", "rows.jsonl")
    os.mkdir("d")
    os.symlink(folder / "blobs/x", "d/rows.jsonl")
    assert [s.size for s in find_sources(["rows.jsonl", "d"])] == [5, 5]


def test_stdin(monkeypatch, tmp_path):
    write("piped", content=b"one\n")
    with open("piped") as file:
        monkeypatch.setattr(sys, "stdin", file)
        (source,) = find_sources(["-"])
        assert (source.name, source.size, source.fingerprint(), source.format) == ("stdin", 0, "", ("json", ""))
        assert source.open().read() == b"one\n"


def test_urls():
    store = fsspec.filesystem("memory")
    try:
        store.pipe(
            {"/bucket/b.jsonl": b"{}\n", "/bucket/a.txt.gz": b"", "/bucket/sub/c.jsonl": b"", "/bucket/x.md": b""}
        )
        assert names("memory://bucket/b.jsonl") == ["memory:///bucket/b.jsonl"]
        assert names("memory://bucket") == ["memory:///bucket/a.txt.gz", "memory:///bucket/b.jsonl"]
        assert names("memory://bucket/**/*.jsonl") == ["memory:///bucket/b.jsonl", "memory:///bucket/sub/c.jsonl"]
        (source,) = find_sources(["memory://bucket/b.jsonl"])
        assert source.size == 3
        assert source.open().read() == b"{}\n"
        before = source.fingerprint()
        store.pipe("/bucket/b.jsonl", b"[]\n")
        assert source.fingerprint() != before
    finally:
        store.rm("/bucket", recursive=True)


def test_the_fingerprint_is_of_the_content():
    write("a.jsonl", content=b"x" * 3_000_000)
    write("b.jsonl", content=b"x" * 3_000_000)
    write("c.jsonl", content=b"x" * 2_999_999 + b"y")
    a, b, c = (source.fingerprint() for source in find_sources(["a.jsonl", "b.jsonl", "c.jsonl"]))
    assert a == b != c
    os.utime("a.jsonl", (1, 1))
    assert find_sources(["a.jsonl"])[0].fingerprint() == a


def test_a_stores_own_checksum_is_taken(monkeypatch):
    """Instead of downloading everything."""
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(type(store), "info", lambda self, path, **_: {"name": path, "type": "file", "ETag": '"abc"'})
    monkeypatch.setattr(type(store), "open", lambda *_, **__: pytest.fail("downloads the file"))
    assert Source("s3://x/y.jsonl", "memory://x/y.jsonl", 3).fingerprint() == 'etag:"abc"'


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jsonl", ("json", "")),
        ("a.b.ndjson.GZ", ("json", ".gz")),
        ("a.json.zst", ("json", ".zst")),
        ("A.CSV", ("csv", "")),
        ("a.txt.gz", ("text", ".gz")),
        ("a.parquet", ("parquet", "")),
    ],
)
def test_formats(name, form):
    assert Source(name, name, 0).format == form


@pytest.mark.parametrize("name", ["a", "a.gz", "a.md", "a.parquet.gz", "a.jsonl.bz2", "a.tar.zst", ".jsonl", "jsonl"])
def test_unknown_suffixes_are_refused(name):
    write(name)
    problem = line(lambda: find_sources([name]))
    assert name in problem
    assert "*.jsonl" in problem


def test_what_is_not_there_is_refused(folder):
    os.mkdir("empty")
    for pattern in ("nope.jsonl", "nope", "*.jsonl", "empty", "empty/*", "memory://nope/x.jsonl", "nope/"):
        assert pattern in line(lambda pattern=pattern: find_sources([pattern]), FileNotFoundError)
    os.symlink("nowhere", "empty/lost.jsonl")
    for pattern in ("empty", "empty/*", "empty/lost.jsonl"):
        assert "empty/lost.jsonl" in line(lambda pattern=pattern: find_sources([pattern]), FileNotFoundError)
    assert "stdin" in line(lambda: find_sources([]))


def test_what_can_not_be_read_again_is_refused():
    os.mkfifo("pipe.jsonl")
    assert "pipe.jsonl: not a regular file" in line(lambda: find_sources(["pipe.jsonl"]))


def test_a_file_given_twice_is_refused():
    write("a.jsonl", "b.jsonl")
    assert "a.jsonl" in line(lambda: find_sources(["*.jsonl", os.path.abspath("a.jsonl")]))
    assert "stdin" in line(lambda: find_sources(["-", "-"]))


def test_what_is_missing_is_named(monkeypatch):
    write("a.jsonl.zst", "a.parquet", "a.jsonl.gz")
    for package in ("zstandard", "pyarrow", "s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("a.jsonl.zst", "a.parquet"):
        assert "pip install '.[batch]'" in line(lambda name=name: find_sources([name]))
    assert names("a.jsonl.gz") == ["a.jsonl.gz"]
    assert "pip install '.[s3]'" in line(lambda: find_sources(["s3://bucket/a.jsonl"]))
    assert "pip install '.[gcs]'" in line(lambda: find_sources(["gs://bucket/a.jsonl"]))
    assert "nosuch" in line(lambda: find_sources(["nosuch://bucket/a.jsonl"]))
    assert "zip://a.jsonl::x.zip" in line(lambda: find_sources(["zip://a.jsonl::x.zip"]))


def test_what_a_store_raises_becomes_one_line(monkeypatch):
    class DriverError(Exception):
        pass

    def fail(*_, **__):
        raise DriverError("no credentials\nwere found")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    problem = line(lambda: find_sources(["memory://bucket/a.jsonl"]), OSError)
    assert "memory://bucket/a.jsonl" in problem
    assert "no credentials were found" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read():
    write("a.jsonl")
    os.chmod("a.jsonl", 0)
    (source,) = find_sources(["a.jsonl"])
    assert "a.jsonl" in line(source.open, PermissionError)
    assert "a.jsonl" in line(source.fingerprint, PermissionError)


def test_what_is_slow_to_import_is_imported_when_it_is_needed():
    code = "import sys; from jaxinfer.batch import parse, readers, openai; print(*{'jax', 'pyarrow'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"\n"
