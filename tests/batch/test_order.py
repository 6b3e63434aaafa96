"""The order of rows within windows."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import order
from jaxinfer.batch.ahead import LATER
from jaxinfer.batch.order import arranged, ordered


class Work(NamedTuple):
    prompt: list[int]
    length: int


def test_long_ones_first():
    rows = [Work([i], length) for i, length in enumerate([5, 100, 20, 7])]
    assert [work.length for work in arranged(rows)] == [100, 20, 7, 5]


def test_shared_beginnings_stay_together():
    shared = {name: [name] * 10 for name in range(3)}
    rows = [Work([*shared[i % 3], 50 + i], 30 + i) for i in range(9)]
    got = [work.prompt[0] for work in arranged(rows)]
    assert got == [2, 2, 2, 1, 1, 1, 0, 0, 0]  # the group with the longest row comes first
    assert [work.length for work in arranged(rows)][:3] == [38, 35, 32]


def test_the_next_window_is_read_little_by_little():
    read = []

    def source():
        for i in range(4 * order.ROWS):
            read.append(i)
            yield Work([i], 10)

    works = ordered(source())
    for given_out in range(1, 3 * order.ROWS):
        next(works)
        assert len(read) <= order.ROWS + 2 * given_out
        assert len(read) - given_out <= 2 * order.ROWS


def test_windows_of_long_rows_are_small():
    read = []

    def source():
        for i in range(40):
            read.append(i)
            yield Work([i] * (order.TOKENS // 4), 10)

    works = ordered(source())
    next(works)
    assert len(read) <= 4
    assert len(list(works)) == 39


def test_rows_with_nothing_to_run_take_places_too():
    read = []

    def source():
        for i in range(10 * order.ROWS):
            read.append(i)
            yield Work([i], 10) if i in (5, 9 * order.ROWS) else None

    works = ordered(source())
    for window, expected in enumerate([[5], None, None], 1):
        work = next(works)
        assert (work and work.prompt) == expected
        assert len(read) <= window * order.ROWS + 2
    assert [work for work in works if work] == [Work([9 * order.ROWS], 10)]


def test_rows_that_are_slow_to_come_keep_nobody_waiting():
    first, second = Work([1], 1), Work([2], 2)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        return len(waits) < 3

    assert [*ordered(iter([first, LATER, LATER, second]), wait)] == [second, first]  # within a window's patience
    assert all(0 <= seconds <= order.PATIENCE for seconds in waits)
    assert [*ordered(iter([first, LATER, LATER, LATER, second]), wait)] == [first, LATER, second]


@given(st.lists(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=40), st.integers(1, 9))
def test_every_row_once(prompts, size):
    rows = [prompt and Work(prompt, len(prompt) + i) for i, prompt in enumerate(prompts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "ROWS", size)
        got = [work for work in ordered(iter(rows)) if work]
    assert sorted(got) == sorted(work for work in rows if work)
