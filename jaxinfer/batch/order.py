"""In what order rows are run: not quite that of the input, and never far from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

ROWS = 1024  # of a window
TOKENS = 2**20  # of a window, roughly: a bound of its memory where rows are long


class Work(Protocol):
    """What is to be run. prompt: how it begins, token ids or text. length: tokens that it may have in the end."""

    @property
    def prompt(self) -> list[int] | str: ...
    @property
    def length(self) -> int: ...


W = TypeVar("W", bound=Work)


def ordered(rows: Iterator[W]) -> Iterator[W]:
    """All of `rows`, window by window, each in the order of `arranged`.

    The next window is read while this one is given out, two rows for one: the device need not wait until a thousand
    prompts are tokenized.
    """
    window: list[W] = []
    _read(rows, window, ROWS, TOKENS)
    while window:
        following: list[W] = []
        room = TOKENS
        for one in arranged(window):
            yield one
            room = _read(rows, following, 2, room)
        window = following


def _read(rows: Iterator[W], window: list[W], count: int, room: int) -> int:
    """Adds up to `count` rows to a window that has room for so many tokens; returns how many it has room for then."""
    while count and room > 0 and len(window) < ROWS and (one := next(rows, None)) is not None:
        window.append(one)
        room -= len(one.prompt)
        count -= 1
    return room


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
