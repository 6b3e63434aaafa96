"""In what order rows are run: not quite that of the input, and never far from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from jaxinfer.batch.ahead import LATER, Later

ROWS = 1024  # of a window
TOKENS = 2**20  # of a window, roughly: a bound of its memory where rows are long
PATIENCE = 0.1  # seconds that a window may take to fill where rows are slow to come


class Work(Protocol):
    """What is to be run.

    prompt: how it begins, token ids or text.
    length: tokens that it may have in the end.
    """

    @property
    def prompt(self) -> list[int] | str: ...
    @property
    def length(self) -> int: ...


W = TypeVar("W", bound=Work)


class _Window(Generic[W]):
    """Rows, up to ROWS of them and roughly TOKENS tokens."""

    def __init__(self) -> None:
        self.rows: list[W | None] = []
        self._tokens = 0

    def read(self, rows: Iterator[W | Later | None], count: int, wait: Callable[[float], bool] | None = None) -> bool:
        """Reads up to `count` more, as many as there are and there is room for; returns whether there will be more.
        wait: for rows that are not there yet, PATIENCE seconds in all."""
        end = time.monotonic() + PATIENCE
        while count > 0 and len(self.rows) < ROWS and self._tokens < TOKENS:
            try:
                row = next(rows)
            except StopIteration:
                return False
            if row is LATER:
                if wait is None or not wait(max(0.0, end - time.monotonic())):
                    break
                continue
            self.rows.append(row)
            self._tokens += len(row.prompt) if row is not None else 0
            count -= 1
        return True


def ordered(
    rows: Iterator[W | Later | None], wait: Callable[[float], bool] = lambda _: False
) -> Iterator[W | Later | None]:
    """All of `rows`, window by window, each in the order of `arranged`.

    None stands for a row with nothing to run. It takes a place in a window too, and a window of nothing else gives one
    None: whoever asks can't be led thousands of rows on from those that are still running. LATER stands for a row that
    is not there yet: a window is then what there is, and LATER comes where there is nothing at all.
    The next window is read while this one is given out, two rows for one: the device need not wait until a thousand
    prompts are tokenized.
    """
    following, more = _Window[W](), True
    while following.rows or more:
        if not following.rows:
            more = following.read(rows, ROWS, wait)
            if not following.rows:
                if more:
                    yield LATER
                continue
        window, following = [row for row in following.rows if row is not None], _Window[W]()
        if not window:
            yield None
        for row in arranged(window):
            yield row
            more = more and following.read(rows, 2)


def arranged(window: list[W]) -> list[W]:
    """Long rows first, so that none is left running alone in the end; those that share the first half of the shorter
    one's prompt stay together, so that the prefix cache still has it."""
    groups: list[list[W]] = []
    for row in sorted(window, key=lambda work: (type(work.prompt).__name__, work.prompt)):
        last = groups[-1][-1].prompt if groups else []
        half = min(len(last), len(row.prompt)) // 2
        if half and last[:half] == row.prompt[:half]:
            groups[-1].append(row)
        else:
            groups.append([row])
    groups.sort(key=lambda group: -max(work.length for work in group))
    return [row for group in groups for row in sorted(group, key=lambda work: -work.length)]
