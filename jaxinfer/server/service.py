"""A loaded model and what its server knows: who asks, how much runs, whether it still takes requests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeVar

from jaxinfer.engine.async_engine import AsyncEngine
from jaxinfer.errors import UnsupportedError
from jaxinfer.llm import CAN, LLM
from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.errors import ServerError
from jaxinfer.server.chats import ChatFormats
from jaxinfer.server.config import ServerConfig
from jaxinfer.server.metrics import Metrics

THREADS = 4  # for templates, tokens and models without a cache; more callers wait
Result = TypeVar("Result")


class Service:
    """What routes work with. All but what `prepared` runs is the event loop's."""

    def __init__(self, llm: LLM, config: ServerConfig):
        self.llm, self.config = llm, config
        self.metrics = Metrics()
        self.created = int(time.time())
        self.state: Literal["ready", "draining", "failed"] = "ready"
        self.failure: BaseException | None = None
        self.active = 0
        self.aborting = False
        self.by_key: Counter[int | None] = Counter()
        self._pool = ThreadPoolExecutor(THREADS, "jaxinfer-server")
        self._engine: AsyncEngine | None = None
        if llm.task == GENERATE:
            default = llm.get_default_sampling_params
            self._engine = AsyncEngine.over(llm.engine_thread, default, max_queued=config.max_queued)
            self.formats = ChatFormats(llm.tokenizer, config.tool_call_parser, config.reasoning_parser)

    @property
    def engine(self) -> AsyncEngine:
        """Where text is made. Raises UnsupportedError for a model that makes none."""
        if self._engine is None:
            raise UnsupportedError(f"this model can't do that: {CAN[self.llm.task]}", "model")
        return self._engine

    def model(self, name: object) -> str:
        """The name of the model that a request asks for. Raises ServerError for another one."""
        if name is None or name in self.config.names:
            return self.config.names[0] if name is None else str(name)
        there = ", ".join(self.config.names)
        raise ServerError(404, f"no model {name!r:.80}: here there is {there}", "model", "model_not_found")

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """Done in another thread: the event loop has others to serve."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @contextmanager
    def admitted(self, key: int | None) -> Iterator[int]:
        """While a request runs: how many others its key has. Raises ServerError where no more are taken."""
        if self.state != "ready":
            why = "is shutting down" if self.state == "draining" else "has failed"
            raise ServerError(503, f"the server {why}; try another one", headers={"retry-after": "5"})
        others = self.by_key[key]
        self.active += 1
        self.by_key[key] += 1
        try:
            yield others
        finally:
            self.active -= 1
            self.by_key[key] -= 1
            if not self.by_key[key]:
                del self.by_key[key]

    def salt(self, key: int | None, own: str) -> str:
        """What separates the prefix cache of one key from that of the others."""
        if key is None:
            return own
        return hashlib.sha256(self.config.digests[key] + own.encode(errors="replace")).hexdigest()

    def priority(self, own: int, others: int) -> int:
        """A key that has much running comes after those that have little."""
        return own * 2**20 + (min(others, 2**20 - 1) if len(self.config.api_keys) > 1 else 0)

    def drain(self) -> None:
        """No more requests are taken."""
        if self.state == "ready":
            self.state = "draining"

    def fail(self, error: BaseException) -> None:
        """After an error that is not of a request but of the device."""
        if self.state != "failed":
            self.state, self.failure = "failed", error

    def abort_all(self) -> None:
        """Ends what runs, with what there is so far, and what is about to."""
        self.aborting = True
        if self._engine is not None:
            self._engine.abort_all()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
