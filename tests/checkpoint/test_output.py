"""Folders that are written as a whole or not at all, by several at once too."""

import fcntl
import os
import subprocess
import sys

import fsspec
import pytest

from jaxinfer.checkpoint import output
from jaxinfer.checkpoint.output import put, renamed, written
from jaxinfer.places import locate


def make(folder, content, meanwhile=lambda path: None, replaces=False):
    with renamed(str(folder), replaces) as path:
        put(os.path.join(path, "file"), content)
        meanwhile(path)


def fail(path):
    raise RuntimeError


def test_two_at_once(tmp_path):
    """They don't see each other; who is second says so, and the first one's folder stays as it is."""
    folder = tmp_path / "new"
    with pytest.raises(OSError, match=r"new: another process has written it, .* is removed"):
        make(folder, b"slow", lambda _: make(folder, b"fast"))
    assert os.listdir(tmp_path) == ["new"]
    assert (folder / "file").read_bytes() == b"fast"


def test_two_at_once_that_replace(tmp_path):
    folder = tmp_path / "new"
    make(folder, b"old")
    make(folder, b"slow", lambda _: make(folder, b"fast", replaces=True), replaces=True)
    assert os.listdir(tmp_path) == ["new"]
    assert (folder / "file").read_bytes() == b"slow"


def test_what_fails_leaves_what_was_there(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError):
        make(folder, b"half", fail)
    assert os.listdir(tmp_path) == []
    make(folder, b"old")
    with pytest.raises(RuntimeError):
        make(folder, b"half", fail, replaces=True)
    assert os.listdir(tmp_path) == ["new"]
    assert (folder / "file").read_bytes() == b"old"


def test_what_was_killed_is_removed_by_the_next(tmp_path):
    """And what is at work, or only has such a name, is not."""
    script = """
import os, signal, sys
from jaxinfer.checkpoint.output import renamed
with renamed(sys.argv[1]) as path:
    open(os.path.join(path, "file"), "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = tmp_path / "new"
    subprocess.run([sys.executable, "-c", script, folder])
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".new.")
    others = {".new.mine.tmp", ".new.tmp", "new.01234567.tmp", ".newer.01234567.tmp"}
    for name in others:
        (tmp_path / name).mkdir()

    def while_the_fast_one_is_at_work(slow, fast):
        assert {*os.listdir(tmp_path)} == others | {os.path.basename(slow), os.path.basename(fast)}

    with pytest.raises(OSError, match="another process"):
        make(
            folder,
            b"slow",
            lambda slow: make(folder, b"fast", lambda fast: while_the_fast_one_is_at_work(slow, fast)),
        )
    assert {*os.listdir(tmp_path)} == others | {"new"}


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    """Nothing is removed that somebody may be at work on."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="another process"):
        make(tmp_path / "new", b"slow", lambda slow: make(tmp_path / "new", b"fast", lambda _: os.stat(f"{slow}/file")))
    assert os.listdir(tmp_path) == ["new"]


def test_others_may_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        with renamed(str(tmp_path / "new")):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755


def test_in_a_store(tmp_path):
    """Nothing can be renamed there, so who comes second is refused."""
    url = f"memory:/{tmp_path}/new"
    fs = fsspec.filesystem("memory")
    with written(url) as path:
        assert path == url
        with pytest.raises(ValueError, match="is there already"), written(url):
            pass
        put(f"{path}/file", b"1")
    assert [os.path.basename(name) for name in fs.ls(f"{tmp_path}/new", detail=False)] == ["file"]


def test_both_look_into_a_store_before_either_writes(tmp_path, monkeypatch):
    url = f"memory:/{tmp_path}/new"
    fs = fsspec.filesystem("memory")
    with written(url):
        monkeypatch.setattr(output, "check_output", lambda output: locate(output, "output"))
        with pytest.raises(OSError, match="another process has written it, or is about to"), written(url):
            pass
        assert len(fs.ls(f"{tmp_path}/new")) == 1
