"""Threads for what can't be interrupted, XLA's compiler above all: Ctrl-C reaches who waits for them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

NAME = "jaxinfer-compile"

Item = TypeVar("Item")
Made = TypeVar("Made")
P = ParamSpec("P")


@contextlib.contextmanager
def in_background(
    make: Callable[[Item], Made], items: Sequence[Item], threads: int | None = None
) -> Iterator[list[Future[Made]]]:
    """`make(item)` of each item, several at a time (as many as there are cores). When the block is left, by Ctrl-C or
    an error, those that have not begun are dropped, and the others run out: only the program's end waits for them."""
    futures: list[Future[Made]] = [Future() for _ in items]
    waiting = deque(zip(items, futures, strict=True))

    def work() -> None:
        with contextlib.suppress(IndexError):  # nothing waits any more
            while True:
                item, future = waiting.popleft()
                if future.set_running_or_notify_cancel():
                    try:
                        made = make(item)
                    except BaseException as error:
                        future.set_exception(error)
                    else:
                        future.set_result(made)

    try:
        for i in range(min(len(items), threads or os.cpu_count() or 1)):
            # No daemons, though one may start them: a compiler that came back to a Python that is gone would abort it.
            threading.Thread(target=work, name=f"{NAME}-{i}", daemon=False).start()
        yield futures
    finally:
        with contextlib.suppress(IndexError):
            while True:
                waiting.popleft()[1].cancel()


def afterwards(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Calls it in a thread of its own that nobody waits for, but the program's end does."""
    threading.Thread(target=call, name=f"{NAME}-afterwards", args=args, kwargs=kwargs, daemon=False).start()


def running() -> bool:
    """Whether some of it runs still."""
    return any(thread.name.startswith(NAME) for thread in threading.enumerate())
