"""`AsyncEngine`: an engine for many callers at once, in asyncio."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, Unpack

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.load import load_engine
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.prompts import Prompt, encode_prompt
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
        self.max_queued = max_queued
        self.tokenizer = loaded.engine.tokenizer
        self.engine_thread = EngineThread(loaded.engine, "AsyncEngine")
        self._default_sampling_params = loaded.default_sampling_params
        self._ids = itertools.count()
        self._open: dict[str, RequestGroup] = {}  # all requests that have not ended
        self._lock = threading.Lock()  # of _open

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        return self.engine_thread.engine.stats

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
        params = sampling_params or self._default_sampling_params()
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        self.engine_thread.check_open()
        text, ids, salt = encode_prompt(prompt, self.tokenizer)
        make = self.engine_thread.engine.new_group
        if params.structured_outputs is None:
            group = make(ids, params, text, priority, salt)
        else:  # a grammar takes its time
            group = await asyncio.to_thread(make, ids, params, text, priority, salt)
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

        def listener(group: RequestGroup, error: BaseException | None) -> None:
            closed = isinstance(error, EngineClosed)
            if error is not None or group.finished:
                self._forget(name, group)  # before anybody hears of the end, and uses the name again
            output = group.output() if error is None or closed else error
            if not loop.is_closed():
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        self._remember(name, group)
        try:
            self.engine_thread.submit([Submission(group, listener, streams=True)])
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._forget(name, group)
            self.engine_thread.abort(group)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; who waits for its outputs gets a last one, with finish_reason "abort". An id
        that is unknown, or has ended, is no error."""
        group = self._open.get(request_id)
        if group is not None:
            self.engine_thread.abort(group)

    def close(self) -> None:
        """Aborts what runs, ends the thread and frees the memory."""
        self.engine_thread.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _remember(self, name: str, group: RequestGroup) -> None:
        with self._lock:
            if name in self._open:
                raise RequestError(f"request_id {name!r} is in use by a request that has not ended", "request_id")
            waiting = sum(group.waiting for group in self._open.values())
            if waiting >= self.max_queued:
                raise QueueFullError(f"{waiting} requests are waiting, and max_queued is {self.max_queued}; try later")
            self._open[name] = group

    def _forget(self, name: str, group: RequestGroup) -> None:
        """The request, not another one that has its name by now."""
        with self._lock:
            if self._open.get(name) is group:
                del self._open[name]
