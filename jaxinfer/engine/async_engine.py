"""`AsyncEngine`: an engine for many callers at once, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self, Unpack

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.load import load_engine
from jaxinfer.engine.mail import Box, Mail
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.prompts import Encoded, Prompt, encode_prompt
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.thread import EngineThread, Submission
from jaxinfer.errors import EngineClosed, QueueFullError, RequestError
from jaxinfer.sampling.params import SamplingParams


class AsyncEngine:
    """A model in memory that serves requests as they come, all in one batch.

    max_queued: most requests that may wait for a place in the batch; one more raises QueueFullError.
    Options and errors: as for `LLM`. The engine runs in a thread of its own; `close()` ends it and frees the memory.

        async for output in engine.generate("...", SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)  # all the text so far
    """

    def __init__(self, model: str | os.PathLike[str], *, max_queued: int = 1024, **options: Unpack[EngineConfig]):
        if not isinstance(max_queued, int) or isinstance(max_queued, bool) or max_queued < 1:
            raise ValueError(f"max_queued is {max_queued!r}: it must be an integer of at least 1")
        loaded = load_engine(model, **options)
        self._begin(EngineThread(loaded.engine, "AsyncEngine"), loaded.default_sampling_params, max_queued)

    @classmethod
    def over(
        cls, engine_thread: EngineThread, default: Callable[[], SamplingParams], *, max_queued: int = 1024
    ) -> AsyncEngine:
        """On an engine that others may use, too, and close. default: makes the parameters where none are given."""
        engine = cls.__new__(cls)
        engine._begin(engine_thread, default, max_queued)
        return engine

    def _begin(self, engine_thread: EngineThread, default: Callable[[], SamplingParams], max_queued: int) -> None:
        self.max_queued = max_queued
        self.tokenizer = engine_thread.engine.tokenizer
        self.engine_thread = engine_thread
        self.default_sampling_params = default
        self._ids = itertools.count()
        self._open: dict[str, Sequence[RequestGroup]] = {}  # all requests that have not ended
        self._lock = threading.Lock()  # of _open
        self._mails: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mail] = weakref.WeakKeyDictionary()

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        return self.engine_thread.engine.stats

    def new_group(
        self, prompt: Prompt | Encoded, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> RequestGroup:
        """A request for `deltas`. Any thread may call it: text becomes tokens here, which takes its time. Raises
        RequestError."""
        params = sampling_params or self.default_sampling_params()
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        self.engine_thread.check_open()
        text, ids, salt = prompt if isinstance(prompt, Encoded) else encode_prompt(prompt, self.tokenizer)
        return self.engine_thread.engine.new_group(ids, params, text, priority, salt)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, whenever there is more; the last one is finished.

        Leaving the loop early, or cancelling the task, aborts the request. Raises RequestError for what can't be served
        or an id that is in use, and QueueFullError. An error of the device ends all requests with it; the next one
        finds the engine in order.
        """
        group = self.new_group(prompt, sampling_params, priority)
        async with contextlib.aclosing(self._outputs([group], RequestGroup.output, request_id)) as outputs:
            async for arrived in outputs:
                for output in arrived:
                    yield output

    async def deltas(
        self, groups: Sequence[RequestGroup], *, request_id: str | None = None
    ) -> AsyncGenerator[list[RequestOutput], None]:
        """Runs requests of `new_group`, and yields what has come since the last time: for each that got something, a
        `RequestGroup.delta` whose `index` is its place. The first list is empty and says that they were taken; all of
        them have ended after the last one.

        They are one request to `abort` and to the queue; errors are as for `generate`.
        """
        async with contextlib.aclosing(self._outputs(groups, RequestGroup.delta, request_id)) as outputs:
            async for arrived in outputs:
                yield arrived

    async def _outputs(
        self, groups: Sequence[RequestGroup], output: Callable[[RequestGroup, int], RequestOutput], name: str | None
    ) -> AsyncGenerator[list[RequestOutput], None]:
        name = name if name is not None else f"request-{next(self._ids)}"
        loop = asyncio.get_running_loop()
        mail = self._mails.setdefault(loop, Mail(loop))
        box = Box()

        def submission(index: int, group: RequestGroup) -> Submission:
            def listener(group: RequestGroup, error: BaseException | None) -> None:
                closed = isinstance(error, EngineClosed)
                if error is not None or all(group.finished for group in groups):
                    self._forget(name, groups)  # before anybody hears of the end, and uses the name again
                mail.put(box, output(group, index) if error is None or closed else error)

            return Submission(group, listener, streams=True, after=mail.send)

        self._remember(name, groups)
        try:
            self.engine_thread.submit([submission(i, group) for i, group in enumerate(groups)])
            running = len(groups)
            yield []
            while running:
                arrived: list[RequestOutput] = []
                for item in await box.take():
                    if isinstance(item, BaseException):
                        raise item
                    arrived.append(item)
                    running -= item.finished
                yield arrived
        finally:
            self._forget(name, groups)
            for group in groups:
                self.engine_thread.abort(group)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; who waits for its outputs gets a last one, with finish_reason "abort". An id
        that is unknown, or has ended, is no error."""
        for group in self._open.get(request_id, ()):
            self.engine_thread.abort(group)

    def abort_all(self) -> None:
        """Ends all requests as `abort` does."""
        with self._lock:
            names = list(self._open)
        for name in names:
            self.abort(name)

    def close(self) -> None:
        """Aborts what runs, ends the thread and frees the memory."""
        self.engine_thread.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _remember(self, name: str, groups: Sequence[RequestGroup]) -> None:
        with self._lock:
            if name in self._open:
                raise RequestError(f"request_id {name!r} is in use by a request that has not ended", "request_id")
            if len(self._open) >= self.max_queued:
                waiting = sum(all(group.waiting for group in groups) for groups in self._open.values())
                if waiting >= self.max_queued:
                    raise QueueFullError(
                        f"{waiting} requests are waiting, and max_queued is {self.max_queued}; try later"
                    )
            self._open[name] = groups

    def _forget(self, name: str, groups: Sequence[RequestGroup]) -> None:
        """The request, not another one that has its name by now."""
        with self._lock:
            if self._open.get(name) is groups:
                del self._open[name]
