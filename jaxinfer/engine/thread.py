"""The one thread that an engine belongs to. All others submit, and are told; it steps."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.scoring import Scoring
from jaxinfer.errors import EngineClosed

log = logging.getLogger("jaxinfer")

NAME = "jaxinfer-engine"  # of all such threads
STREAM_SECONDS = 0.1  # who reads as it comes is told something this often, where the device is fast enough
GATHER_SECONDS = 0.005  # an idle engine waits so long for the next of several requests, to begin with all of them
EXIT_SECONDS = 60.0  # the program's end waits so long for a call of the device to end

AnyGroup = RequestGroup | Scoring
Listener = Callable[[Any, BaseException | None], None]  # Any: the group that was submitted


class Submission(NamedTuple):
    """A request for the engine.

    group: what is asked for.
    listener: called in the engine's thread when the request has ended, and where it `streams`, whenever there is more;
        with an error if the engine has failed or was closed. It must be quick.
    streams: whether the listener is told on the way.
    after: called, once for all that have the same one, when the listeners of a step have been told.
    """

    group: AnyGroup
    listener: Listener
    streams: bool = False
    after: Callable[[], None] | None = None


class EngineThread:
    """Owns an engine: any thread may `submit` and `abort`. Requests are made by who asks for them
    (`Engine.new_group`), so that what is wrong with one is raised there, and reaches nobody else.

    An error in a step ends all requests with it; the engine begins anew with the next one.
    name: of what was closed, in errors. `close` ends the thread; so do the garbage collector and the program's end.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine = engine
        self._name = name
        self._owner = Owner(engine)  # all that the thread holds: it must not keep this object alive
        self._lock = threading.Lock()
        self.closed = False
        self._freed = False
        self._thread = threading.Thread(target=self._owner.run, name=NAME, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._owner.tasks.put, None).atexit = False
        _threads.add(self)

    def submit(self, submissions: Sequence[Submission], gather: bool = False) -> None:
        """Queues requests, all of them before the next step. gather: more may follow at once, and an idle engine waits
        a moment for them. Raises EngineClosed."""

        def begin(owner: Owner) -> bool:
            owner.begin(submissions)
            return gather

        with self._lock:  # nothing comes after the end, where nobody would hear of it
            self.check_open()
            self._owner.tasks.put(begin)

    def abort(self, group: AnyGroup) -> None:
        """Ends a request, which its listener is told. One that has ended is no error."""

        def end(owner: Owner) -> bool:
            owner.end(group)
            return False

        self._owner.tasks.put(end)

    def complete(self, groups: Sequence[AnyGroup]) -> None:
        """Runs requests to their end. Raises what ends the engine; whatever is raised, nothing is left behind."""
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        try:
            self.submit([Submission(group, lambda _, error: ended.put(error)) for group in groups])
            for _ in groups:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            for group in groups:
                self.abort(group)

    def close(self) -> None:
        """Ends what runs and the thread, and frees the device's memory."""
        self.stop()
        self._thread.join()
        if not self._freed:
            self._freed = True
            self.engine.close()

    def stop(self, timeout: float = 0.0) -> None:
        """Ends the thread after the step that it is in, and waits for that, `timeout` seconds at most."""
        with self._lock:
            self.closed = True
            self._owner.closed = self._error()
            self._owner.tasks.put(None)
            self.engine.runner.abandon()
        self._thread.join(timeout)

    def check_open(self) -> None:
        """Raises EngineClosed after `close`."""
        if self.closed:
            raise self._error()

    def _error(self) -> EngineClosed:
        return EngineClosed(f"this {self._name} was closed: load it again with {self._name}(...)")


class Owner:
    """What the thread does, and all that it knows."""

    def __init__(self, engine: Engine):
        self.engine = engine
        # Its put() may be called at any time, also by the garbage collector in the middle of a get(). None is the end.
        self.tasks: queue.SimpleQueue[Callable[[Owner], bool] | None] = queue.SimpleQueue()
        self.closed: BaseException = EngineClosed("nobody holds the engine any more")
        self._submissions: dict[int, Submission] = {}  # by the request ids of all members
        self._streaming = 0

    def run(self) -> None:
        """Until the end."""
        while self._tasks():
            if not self.engine.idle:
                self._step()
        self._fail(self.closed)

    def begin(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            self._streaming += submission.streams
            for member in submission.group.members:
                self._submissions[member.request.id] = submission
        try:
            for submission in submissions:
                self.engine.queue(submission.group)
        except BaseException as error:
            self._fail(error)

    def end(self, group: AnyGroup) -> None:
        submission = self._submissions.get(group.members[0].request.id)
        if submission is None:
            return
        try:
            self.engine.abort(group)
        except BaseException as error:
            self._fail(error)
        else:
            self._tell([submission])

    def _tasks(self) -> bool:
        """Does what was submitted; waits for something if there is nothing to run. False at the end."""
        idle = block = self.engine.idle
        seconds = None
        while True:
            try:
                task = self.tasks.get(block, seconds)
            except queue.Empty:
                return True
            if task is None:
                return False
            block = task(self) and idle
            seconds = GATHER_SECONDS if block else None

    def _step(self) -> None:
        try:
            touched = self.engine.step(STREAM_SECONDS if self._streaming else None)
        except BaseException as error:
            self._fail(self.closed if self.engine.runner.abandoned else error)
            return
        submissions = (self._submissions.get(generation.request.id) for generation in touched)
        told = {id(s.group): s for s in submissions if s is not None}.values()
        self._tell([s for s in told if s.streams or s.group.finished])

    def _fail(self, error: BaseException) -> None:
        """Ends all that there is."""
        self.engine.drop_all("abort" if error is self.closed else "error")
        self._tell(list({id(s.group): s for s in self._submissions.values()}.values()), error)

    def _tell(self, submissions: Sequence[Submission], error: BaseException | None = None) -> None:
        for submission in submissions:
            if error is not None or submission.group.finished:
                for member in submission.group.members:
                    self._submissions.pop(member.request.id, None)
                self._streaming -= submission.streams
            _call(submission.listener, submission.group, error)
        for after in {submission.after for submission in submissions} - {None}:
            assert after is not None
            _call(after)


def _call(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception:  # of one caller, say one whose event loop has just been closed: the others must not suffer
        log.exception("a request's output could not be delivered")


_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register  # after JAX's own, so before them: a thread that is in JAX while JAX is taken down would crash
def _stop_all() -> None:
    for engine_thread in list(_threads):
        engine_thread.stop()
    for thread in threading.enumerate():  # those too that the garbage collector has ended: they free what they had
        if thread.name == NAME:
            thread.join(EXIT_SECONDS)
