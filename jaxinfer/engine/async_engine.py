"""`AsyncEngine`: an engine for many callers at once, in asyncio."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import NamedTuple, Self, Unpack

from jaxinfer.engine.engine import EngineStats
from jaxinfer.engine.generation import Group
from jaxinfer.engine.load import load_engine
from jaxinfer.engine.options import LoadOptions
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.prompts import Prompt, prompt_ids
from jaxinfer.sampling.params import SamplingParams

STREAM_SECONDS = 0.1  # outputs are updated this often, where the device is fast enough


class QueueFullError(RuntimeError):
    """More requests wait than `max_queued` allows: try again later."""


class Stream(NamedTuple):
    """Where a request's outputs go: `put` may be called from any thread."""

    group: Group
    put: Callable[[RequestOutput | BaseException], None]


class AsyncEngine:
    """A model in memory that serves requests as they come, all in one batch.

    max_queued: most requests that may wait for a place in the batch; one more raises QueueFullError.
    Options and errors: as for `LLM`. The engine runs in a thread of its own; `close()` ends it and frees the memory.

        async for output in engine.generate("...", SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)  # all the text so far
    """

    def __init__(self, model: str | os.PathLike[str], *, max_queued: int = 1024, **options: Unpack[LoadOptions]):
        if not isinstance(max_queued, int) or isinstance(max_queued, bool) or max_queued < 1:
            raise ValueError(f"max_queued is {max_queued!r}: it must be an integer of at least 1")
        loaded = load_engine(model, **options)
        self.max_queued = max_queued
        self.tokenizer = loaded.engine.tokenizer
        self._engine = loaded.engine
        self._default_sampling_params = loaded.default_sampling_params
        self._ids = itertools.count()
        self._open: set[str] = set()  # ids of all requests that have not ended
        self._streams: dict[str, Stream] = {}  # those that the engine has
        self._todo: deque[Callable[[], None]] = deque()  # for the engine's thread, between two steps
        self._adding = 0  # requests that are still in _todo
        self._wake = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        return self._engine.stats

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, whenever there is more; the last one is finished.

        Leaving the loop early, or cancelling the task, aborts the request. Raises ValueError for what can't be served
        or an id that is in use, and QueueFullError.
        """
        params = sampling_params or self._default_sampling_params()
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}: it must be SamplingParams")
        text, ids = prompt_ids(prompt, self.tokenizer)
        self._engine.check(ids, params)
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

        def put(output: RequestOutput | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        self._submit(name, lambda: self._engine.add(ids, params, text, priority), put)
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self.abort(name)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; who waits for its outputs gets a last one, with finish_reason "abort". An id
        that is unknown, or has ended, is no error."""

        def end() -> None:
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                self._engine.abort(stream.group)
                stream.put(stream.group.output())
            self._open.discard(request_id)

        if request_id in self._open:
            self._do(end)

    def close(self) -> None:
        """Aborts what runs, ends the thread and frees the memory."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _submit(
        self, name: str, add: Callable[[], Group], put: Callable[[RequestOutput | BaseException], None]
    ) -> None:
        def begin() -> None:
            with self._wake:
                self._adding -= 1
            if name in self._open:  # not aborted before it began
                self._streams[name] = Stream(add(), put)

        with self._wake:
            if self._closed or self._error is not None:
                reason = "was closed" if self._closed else f"has failed: {self._error!r}"
                raise ValueError(f"this AsyncEngine {reason}; load it again")
            if name in self._open:
                raise ValueError(f"request_id {name!r} is in use by a request that has not ended")
            queued = self._adding + self._engine.scheduler.waiting_count
            if queued >= self.max_queued:
                raise QueueFullError(f"{queued} requests are waiting, and max_queued is {self.max_queued}; try later")
            self._open.add(name)
            self._adding += 1
        self._do(begin)

    def _do(self, task: Callable[[], None]) -> None:
        with self._wake:
            self._todo.append(task)
            self._wake.notify()

    def _work(self) -> None:
        """The engine's thread: only here is the engine touched."""
        try:
            while True:
                with self._wake:
                    while not self._todo and self._engine.idle and not self._closed:
                        self._wake.wait()
                    if self._closed:
                        break
                while self._todo:
                    self._todo.popleft()()
                if not self._engine.idle:
                    touched = {generation.request.id for generation in self._engine.step(STREAM_SECONDS)}
                    self._publish(touched)
        except BaseException as error:
            self._error = error
            self._end_all(error)
        else:
            self._end_all(None)

    def _publish(self, touched: set[int]) -> None:
        for name, stream in list(self._streams.items()):
            if any(member.request.id in touched for member in stream.group.members):
                stream.put(stream.group.output())
                if stream.group.finished:
                    del self._streams[name]
                    self._open.discard(name)

    def _end_all(self, error: BaseException | None) -> None:
        for stream in self._streams.values():
            if error is None:
                self._engine.abort(stream.group)
            stream.put(stream.group.output() if error is None else error)
        self._streams.clear()
        self._open.clear()
