"""Reading ahead: what is there, what is not there yet, what goes wrong."""

import threading
import time

import pytest

from jaxinfer.batch import ahead as module
from jaxinfer.batch.ahead import LATER, Ahead
from jaxinfer.batch.row import Record


def record(i, size=1):
    return Record(i, "here", b"x" * size)


def taken(ahead):
    """All that comes, with waiting."""
    while (record := next(ahead, None)) is not None:
        if record is LATER:
            assert ahead.wait(10)
        else:
            yield record.index


def test_nothing_is_waited_for():
    gate = threading.Event()

    def slow():
        yield record(0)
        gate.wait(10)
        yield record(1)
        return 2

    with Ahead(slow()) as ahead:
        assert ahead.wait(10)
        assert next(ahead).index == 0
        assert next(ahead) is LATER
        assert not ahead.wait(0.01)
        gate.set()
        assert list(taken(ahead)) == [1]
        assert ahead.result == 2


@pytest.mark.parametrize(("items", "size"), [(3, 10**6), (10**6, 3)])
def test_no_further_than_it_may(monkeypatch, items, size):
    monkeypatch.setattr(module, "ITEMS", items)
    monkeypatch.setattr(module, "SIZE", size)
    read = []

    def many():
        for i in range(20):
            read.append(i)
            yield record(i)
        return 20

    with Ahead(many()) as ahead:
        for i, got in enumerate(taken(ahead)):
            assert got == i
            time.sleep(0.001)
            assert len(read) <= i + 1 + 3 + 1  # those that wait, and one that has no room yet


def test_an_error_comes_after_what_was_read():
    def broken():
        yield record(0)
        yield record(1)
        raise OSError("cut off")

    with Ahead(broken()) as ahead:
        indices = taken(ahead)
        assert [next(indices), next(indices)] == [0, 1]
        with pytest.raises(OSError, match="cut off"):
            next(indices)


def test_who_leaves_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.1)
    gate, closed = threading.Event(), threading.Event()

    def endless():
        try:
            for i in range(10**9):
                if i == 5000:
                    gate.wait(10)
                yield record(i)
        finally:
            closed.set()

    with Ahead(endless()) as ahead:
        assert ahead.wait(10)
    assert closed.wait(10)
