"""`AsyncEngine`: an engine for many callers at once, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from jaxinfer.aliases import takes
from jaxinfer.aliases.sampling import CALL
from jaxinfer.checkpoint.factors import AdapterInfo
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.load import load_opened
from jaxinfer.engine.loading import open_model
from jaxinfer.engine.mail import Box, Mail
from jaxinfer.engine.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from jaxinfer.engine.pooling.load import load_pooling
from jaxinfer.engine.prompts import Encoded, Prompt
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.thread import EngineThread, Submission
from jaxinfer.errors import EngineClosed, QueueFullError, RequestError, UnsupportedError, placed
from jaxinfer.models.tasks import CLASSIFY, GENERATE
from jaxinfer.pooling import CAN, ClassifyText, PoolingMethods, given
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.generate import adapted
from jaxinfer.tasks.pairs import paired
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
        methods = PoolingMethods()
        methods.task, methods.folder = opened.task, opened.folder
        if opened.task == GENERATE:
            loaded = load_opened(opened)
            thread = EngineThread(loaded.engine, "AsyncEngine")
            self._begin(methods, thread, loaded.default_sampling_params, max_queued)
        else:
            methods.take(load_pooling(opened))
            self._begin(methods, None, None, max_queued)
        self._owns = True

    @classmethod
    def over(
        cls,
        methods: PoolingMethods,
        thread: EngineThread | None,
        default: Callable[[], SamplingParams] | None,
        *,
        max_queued: int = 1024,
    ) -> AsyncEngine:
        """On a model that others use, too, and close: an LLM. thread, default: of one that generates; default makes the
        parameters where none are given."""
        engine = cls.__new__(cls)
        engine._begin(methods, thread, default, max_queued)
        engine._owns = False
        return engine

    def _begin(
        self,
        methods: PoolingMethods,
        thread: EngineThread | None,
        default: Callable[[], SamplingParams] | None,
        max_queued: int,
    ) -> None:
        self.task, self.pooling, self.max_queued = methods.task, methods, max_queued
        self._thread, self._default = thread, default
        self._stream: Stream | None = None
        if thread is not None:
            self.tokenizer = thread.engine.tokenizer
        else:
            assert methods.loaded is not None
            self.tokenizer = methods.loaded.tokenizer
            self._stream = Stream(methods.loaded.engine, max_queued)
            weakref.finalize(self, self._stream.stop).atexit = False
        self._ids = itertools.count()
        self._open: dict[str, Sequence[RequestGroup]] = {}  # all requests that have not ended
        self._lock = threading.Lock()  # of _open
        self._mails: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mail] = weakref.WeakKeyDictionary()

    @property
    def engine_thread(self) -> EngineThread:
        """Where requests are submitted. Raises UnsupportedError where the model makes no text."""
        if self._thread is None:
            raise UnsupportedError(f"{self.pooling.folder}: {CAN[self.task]}")
        return self._thread

    def default_sampling_params(self) -> SamplingParams:
        """Those of requests that have none. Raises UnsupportedError where the model makes no text."""
        if self._default is None:
            raise UnsupportedError(f"{self.pooling.folder}: {CAN[self.task]}")
        return self._default()

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        if self._stream is not None:
            return dataclasses.replace(self._stream.engine.stats)
        return self.engine_thread.engine.stats

    def new_group(
        self,
        prompt: Prompt | Encoded,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        adapter: Any = None,
    ) -> RequestGroup:
        """A request for `deltas`. Any thread may call it: text becomes tokens here, which takes its time. adapter: of a
        prompt that has none of its own. Raises RequestError."""
        params = sampling_params or self.default_sampling_params()
        if not isinstance(params, SamplingParams):
            kind = type(params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        self.engine_thread.check_open()
        text, ids, salt, adapter = adapted(prompt, self.tokenizer, adapter)
        return self.engine_thread.engine.new_group(ids, params, text, priority, salt, adapter)

    async def load_adapter(self, name: str, adapter: str | os.PathLike[str]) -> None:
        """As `LLM.load_adapter`; requests go on meanwhile."""
        engine = self.engine_thread.engine
        await asyncio.to_thread(lambda: engine.load_adapter(name, resolve(adapter)))

    def unload_adapter(self, name: str) -> None:
        """As `LLM.unload_adapter`."""
        self.engine_thread.engine.unload_adapter(name)

    def list_adapters(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, by name."""
        return self.engine_thread.engine.list_adapters()

    @takes(CALL)
    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        adapter: Any = None,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, whenever there is more; the last one is finished. adapter: as for `LLM.generate`.

        Leaving the loop early, or cancelling the task, aborts the request. Raises RequestError for what can't be served
        or an id that is in use, and QueueFullError. An error of the device ends all requests with it; the next one
        finds the engine in order.
        """
        guided = isinstance(sampling_params, SamplingParams) and sampling_params.structured_outputs is not None
        asked = prompt, sampling_params, priority, adapter
        # A grammar takes its time, and so does an adapter that is loaded first.
        slow = guided or not isinstance(adapter, str | None)
        group = await asyncio.to_thread(self.new_group, *asked) if slow else self.new_group(*asked)
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
        ask = self.pooling.embedding(params, truncate, prompt_name, prompt)
        output: EmbeddingRequestOutput
        (output,) = await self.answers([text], ask)
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
        output: ClassificationRequestOutput
        (output,) = await self.answers([text], self.pooling.classifying(params, truncate))
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
        ask = self.pooling.scoring(given(pooling_params, truncate_prompt_tokens), truncate, chat_template)
        (output,) = await self.scores([query], [document], ask)
        return output

    async def scores(self, queries: list[Any], documents: list[Any], ask: Ask) -> list[ScoringRequestOutput]:
        """Of each query with its document, or of one query with all; ask: what `pooling.scoring` gives. Otherwise as
        `answers`."""
        if self.task == CLASSIFY:
            return await self.answers(paired(queries, documents), ask)
        vectors = await self.answers([*queries, *documents], ask)
        pairs = paired(vectors[: len(queries)], vectors[len(queries) :])
        return [self.pooling.similar(a, b, i) for i, (a, b) in enumerate(pairs)]

    async def answers(self, texts: Sequence[Any], ask: Ask) -> list[Any]:
        """The outputs of texts, in order; ask: what a method of `pooling`, such as `embedding`, gives. They are one
        request to the queue. Raises as `embed` does, for the first that fails."""
        assert self._stream is not None
        futures = [asyncio.wrap_future(future) for future in self._stream.submit(texts, ask)]
        try:
            return await asyncio.gather(*futures)
        except ValueError as error:
            first = next(i for i, future in enumerate(futures) if future.done() and future.exception() is error)
            raise (placed(f"text {first}", error) if len(texts) > 1 else error) from None
        finally:
            for future in futures:
                future.cancel()

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
        """Aborts what runs, ends the thread and frees the memory, where they are nobody else's."""
        if self._owns:
            (self._stream or self.engine_thread).close()
            return
        self.abort_all()
        if self._stream is not None:
            self._stream.stop()

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
