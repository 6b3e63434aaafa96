"""Input that is slow to come, or breaks off."""

import queue
import threading

import pytest

from jaxinfer.batch.parts import Output
from jaxinfer.batch.row import Record
from tests.batch.conftest import QUESTIONS, files, read_rows


class Slowly:
    """Records that come as they are let go."""

    def __init__(self, monkeypatch, rows):
        self.go = queue.Queue()

        def records(sources, start, **_):
            for i, row in enumerate(rows):
                self.go.get(timeout=60)
                if isinstance(row, Exception):
                    raise row
                yield Record(i, f"here:{i + 1}", dict(row))
            return len(rows)

        monkeypatch.setattr("jaxinfer.batch.job.records", records)


def test_a_source_that_waits_for_an_answer(job, rows_file, tmp_path, monkeypatch):
    """Each row comes when the answer to the one before is written: what is there is run."""
    slowly = Slowly(monkeypatch, QUESTIONS[:4])
    write = Output.write

    def watched(self, path, content):
        write(self, path, content)
        if "part-" in path:
            slowly.go.put(None)

    monkeypatch.setattr(Output, "write", watched)
    slowly.go.put(None)
    assert job(rows_file(QUESTIONS[:4]), rows_per_part=1).complete
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 3]


def test_a_source_that_breaks_off(job, rows_file, tmp_path, monkeypatch):
    """What was read before is run and written."""
    slowly = Slowly(monkeypatch, [*QUESTIONS[:23], OSError("the line is dead")])
    for _ in range(24):
        slowly.go.put(None)
    with pytest.raises(OSError, match="the line is dead"):
        job(rows_file(QUESTIONS))
    assert sorted(files(tmp_path / "out")) == ["part-00000.jsonl", "part-00001.jsonl"]
    monkeypatch.undo()
    assert job(rows_file(QUESTIONS)).rows_now == 5


def test_stopping_while_nothing_comes(job, rows_file, tmp_path, monkeypatch):
    slowly = Slowly(monkeypatch, QUESTIONS)
    for _ in range(10):
        slowly.go.put(None)
    asked = threading.Event()
    write = Output.write

    def watched(self, path, content):
        write(self, path, content)
        if "part-" in path:
            asked.set()

    monkeypatch.setattr(Output, "write", watched)
    summary = job(rows_file(QUESTIONS), stop=asked.is_set)
    assert (summary.rows, summary.complete) == (10, False)
    for _ in QUESTIONS:
        slowly.go.put(None)
