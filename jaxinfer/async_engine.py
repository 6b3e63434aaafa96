"""`AsyncEngine`: an engine for many callers at once, in asyncio."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import threading
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, Unpack

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.load import load_opened
from jaxinfer.engine.loading import open_model
from jaxinfer.engine.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from jaxinfer.engine.pooling.load import load_pooling
from jaxinfer.engine.prompts import Prompt, encode_prompt
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.thread import EngineThread, Submission
from jaxinfer.errors import EngineClosed, QueueFullError, RequestError, UnsupportedError
from jaxinfer.models.tasks import CLASSIFY, GENERATE
from jaxinfer.pooling import CAN, ClassifyText, PoolingMethods, given
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.params import PoolingParams
from jaxinfer.tasks.pooling import Text
from jaxinfer.tasks.stream import Ask, Stream


class AsyncEngine:
    """A model in memory that serves requests as they come, all in one batch.

    max_queued: most requests that may wait for a place in the batch; one more raises QueueFullError.
    Options and errors: as for `LLM`. The engine runs in a thread of its own; `close()` ends it and frees the memory.

        async for output in engine.generate("...", SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)  # all the text so far

    Of a model that keeps no cache `embed`, `classify` and `score` are awaited, any number of them at once.
    """

    def __init__(self, model: str | os.PathLike[str], *, max_queued: int = 1024, **options: Unpack[EngineConfig]):
        if not isinstance(max_queued, int) or isinstance(max_queued, bool) or max_queued < 1:
            raise ValueError(f"max_queued is {max_queued!r}: it must be an integer of at least 1")
        opened = open_model(model, **options)
        self.max_queued, self.task, self._methods = max_queued, opened.task, PoolingMethods()
        self._methods.task, self._methods.folder = opened.task, opened.folder
        self._stream: Stream | None = None
        self._thread: EngineThread | None = None
        if opened.task != GENERATE:
            pooling = load_pooling(opened)
            self._methods.take(pooling)
            self.tokenizer, self._pooling = pooling.tokenizer, pooling.engine
            self._stream = Stream(pooling.engine, max_queued)
            weakref.finalize(self, self._stream.stop).atexit = False
            return
        loaded = load_opened(opened)
        self.tokenizer = loaded.engine.tokenizer
        self._thread = EngineThread(loaded.engine, "AsyncEngine")
        self._default_sampling_params = loaded.default_sampling_params
        self._ids = itertools.count()
        self._open: dict[str, RequestGroup] = {}  # all requests that have not ended
        self._lock = threading.Lock()  # of _open

    @property
    def engine_thread(self) -> EngineThread:
        """Where requests are submitted. Raises UnsupportedError where the model makes no text."""
        if self._thread is None:
            raise UnsupportedError(f"{self._methods.folder}: {CAN[self.task]}")
        return self._thread

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        if self._stream is not None:
            return dataclasses.replace(self._pooling.stats)
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
        thread = self.engine_thread
        params = sampling_params or self._default_sampling_params()
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        thread.check_open()
        text, ids, salt = encode_prompt(prompt, self.tokenizer)
        group = thread.engine.new_group(ids, params, text, priority, salt)
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
            thread.submit([Submission(group, listener, streams=True)])
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._forget(name, group)
            thread.abort(group)

    async def embed(
        self,
        text: Text,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
    ) -> EmbeddingRequestOutput:
        """The vector of a text, as `LLM.embed` has it. Raises what that raises, and QueueFullError. Cancelled, a text
        is left out that has not been read."""
        params = given(pooling_params, truncate_prompt_tokens, dimensions=dimensions, use_activation=normalize)
        ask = self._methods.embedding(params, truncate, prompt_name, prompt)
        output: EmbeddingRequestOutput = await self._answer(text, ask)
        return output

    async def classify(
        self,
        text: ClassifyText,
        *,
        use_activation: bool | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
    ) -> ClassificationRequestOutput:
        """The classes of a text or pair, as `LLM.classify` has them. Raises as `embed` does."""
        params = given(pooling_params, truncate_prompt_tokens, use_activation=use_activation)
        output: ClassificationRequestOutput = await self._answer(text, self._methods.classifying(params, truncate))
        return output

    async def score(
        self,
        query: Text,
        document: Text,
        *,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        chat_template: str | None = None,
    ) -> ScoringRequestOutput:
        """How well a document answers a query, as `LLM.score` has it. Raises as `embed` does."""
        ask = self._methods.scoring(given(pooling_params, truncate_prompt_tokens), truncate, chat_template)
        if self.task == CLASSIFY:
            output: ScoringRequestOutput = await self._answer((query, document), ask)
            return output
        vectors = await asyncio.gather(self._answer(query, ask), self._answer(document, ask))
        return self._methods.similar(*vectors)

    async def _answer(self, text: Any, ask: Ask) -> Any:
        assert self._stream is not None
        return await asyncio.wrap_future(self._stream.submit(text, ask))

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; who waits for its outputs gets a last one, with finish_reason "abort". An id
        that is unknown, or has ended, is no error."""
        group = self._open.get(request_id)
        if group is not None:
            self.engine_thread.abort(group)

    def close(self) -> None:
        """Aborts what runs, ends the thread and frees the memory."""
        (self._stream or self.engine_thread).close()

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
