"""In what order rows are run: not quite that of the input, and never far from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

ROWS = 1024  # of a window
TOKENS = 2**20  # of a window, roughly: a bound of its memory where rows are long


class Work(Protocol):
    """What is to be run. prompt: how it begins, token ids or text. length: tokens that it may have in the end."""

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

    def read(self, rows: Iterator[W | None], count: int) -> bool:
        """Reads up to `count` more, as many as there is room for; returns whether there are any."""
        for one in islice(rows, min(count, ROWS - len(self.rows)) if self._tokens < TOKENS else 0):
            self.rows.append(one)
            self._tokens += len(one.prompt) if one is not None else 0
            if self._tokens >= TOKENS:
                break
        return bool(self.rows)


def ordered(rows: Iterator[W | None]) -> Iterator[W | None]:
    """All of `rows`, window by window, each in the order of `arranged`.

    None stands for a row with nothing to run. It takes a place in a window too, and a window of nothing else gives one
    None: whoever asks can't be led thousands of rows on from those that are still running.
    The next window is read while this one is given out, two rows for one: the device need not wait until a thousand
    prompts are tokenized.
    """
    following = _Window[W]()
    while following.rows or following.read(rows, ROWS):
        window, following = [one for one in following.rows if one is not None], _Window[W]()
        if not window:
            yield None
        for one in arranged(window):
            yield one
            following.read(rows, 2)


def arranged(window: list[W]) -> list[W]:
    """Long rows first, so that none is left running alone in the end; those that share the first half of the shorter
    one's prompt stay together, so that the prefix cache still has it."""
    groups: list[list[W]] = []
    for one in sorted(window, key=lambda work: (type(work.prompt).__name__, work.prompt)):
        last = groups[-1][-1].prompt if groups else []
        half = min(len(last), len(one.prompt)) // 2
        if half and last[:half] == one.prompt[:half]:
            groups[-1].append(one)
        else:
            groups.append([one])
    groups.sort(key=lambda group: -max(work.length for work in group))
    return [one for group in groups for one in sorted(group, key=lambda work: -work.length)]
