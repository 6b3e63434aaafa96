"""The order of rows within windows."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch import order
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


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=40))
def test_every_row_once(prompts):
    rows = [Work(prompt, len(prompt) + i) for i, prompt in enumerate(prompts)]
    assert sorted(ordered(iter(rows))) == sorted(rows)
