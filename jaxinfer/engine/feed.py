"""From an iterable of things asked for to an iterator of outputs, with the engine busy in between."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from jaxinfer.engine.outputs import RequestOutput, ScoreOutput
from jaxinfer.engine.thread import AnyGroup, EngineThread, Submission

OnError = Literal["raise", "return"]
Output = RequestOutput | ScoreOutput

HELD = 1024  # outputs that wait for their turn, at most, where they are wanted in order


class Feed:
    """Outputs of what is asked for, as they are done, or `in_order`. Each thing has an `index`, its output's.

    It is read in a thread of its own, no further ahead than the device needs, and begun as it comes: a slow source
    keeps nobody waiting for the answers that are there. A source that is a sequence is begun together.
    make: the request for one of them. failed: the output of one for which `make` raises ValueError, or it raises what
    is to end the reading, as an error of the source does: that is raised when all that was read before is done.
    """

    def __init__(
        self,
        thread: EngineThread,
        asked: Iterable[Any],
        make: Callable[[Any], AnyGroup],
        failed: Callable[[Any, ValueError], Output],
        in_order: bool = False,
    ):
        self._thread, self._asked, self._make, self._failed, self._in_order = thread, asked, make, failed, in_order
        # Enough to fill every row of the next calls, whatever ends: what is read beyond that only takes memory.
        self._ahead = 2 * thread.engine.scheduler.max_rows
        self._running: dict[int, AnyGroup] = {}
        self._done: dict[int, Output] = {}  # and not taken
        self._turn = 0  # how many were taken
        self._error: BaseException | None = None
        self._reading = True
        self._left = False  # nobody wants the rest
        self._changed = threading.Condition()

    def outputs(self) -> Iterator[Any]:
        """All of them. Who leaves early aborts the rest."""
        context = contextvars.copy_context()
        reader = threading.Thread(target=context.run, args=(self._read,), name="jaxinfer-reader", daemon=True)
        reader.start()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ready or self._over)
                    if not self._ready:
                        break
                    output = self._done.pop(self._turn if self._in_order else next(iter(self._done)))
                    self._turn += 1
                    self._changed.notify_all()
                yield output
            if self._error is not None:
                raise self._error
        finally:
            with self._changed:
                self._left = True
                self._changed.notify_all()
                running = list(self._running.values())
            for group in running:  # an error or Ctrl-C must not leave rows behind
                self._thread.abort(group)

    @property
    def _ready(self) -> bool:
        return self._turn in self._done if self._in_order else bool(self._done)

    @property
    def _over(self) -> bool:
        return not self._running and (not self._reading or self._error is not None)

    @property
    def _room(self) -> bool:
        # Where outputs can be taken, it is the reader of them who is slow.
        return len(self._running) < self._ahead and len(self._done) < (self._ahead if self._ready else HELD)

    def _read(self) -> None:
        together = isinstance(self._asked, Sequence)
        made: list[Submission] = []
        try:
            for entry in self._asked:
                if self._stopped:
                    break
                try:
                    group = self._make(entry)
                except ValueError as error:
                    output = self._failed(entry, error)
                    with self._changed:
                        self._done[entry.index] = output
                        self._changed.notify_all()
                else:
                    with self._changed:
                        self._running[entry.index] = group
                    made.append(Submission(group, partial(self._ended, entry.index)))
                if made and (not together or not self._room):
                    self._submit(made, gather=not together)
                    made = []
                with self._changed:
                    self._changed.wait_for(lambda: self._room or self._stopped)
        except BaseException as error:
            self._stop(error)
        if made and not self._left:
            self._submit(made)
        with self._changed:
            self._reading = False
            self._changed.notify_all()

    @property
    def _stopped(self) -> bool:
        return self._left or self._error is not None

    def _submit(self, made: list[Submission], gather: bool = False) -> None:
        try:
            self._thread.submit(made, gather)
        except ValueError as error:  # closed
            with self._changed:
                self._running.clear()
                self._stop(error)
            return
        if self._left:  # meanwhile, and perhaps before these were among what was running
            for submission in made:
                self._thread.abort(submission.group)

    def _ended(self, index: int, group: AnyGroup, error: BaseException | None) -> None:
        """In the engine's thread."""
        output = group.output(index) if error is None else None
        with self._changed:
            self._running.pop(index, None)
            if output is not None:
                self._done[index] = output
            self._stop(error)

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
