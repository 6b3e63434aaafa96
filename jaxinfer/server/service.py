"""A loaded model and what its server knows: who asks, how much runs, whether it still takes requests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, TypeVar

from jaxinfer.async_engine import AsyncEngine
from jaxinfer.checkpoint.factors import AdapterInfo
from jaxinfer.errors import ContextLengthError, EngineClosed, QueueFullError, RequestError, UnsupportedError
from jaxinfer.llm import LLM
from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.errors import ServerError
from jaxinfer.openai.requests import COMPLETION_TOKENS
from jaxinfer.pooling import CAN
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.server.chats import ChatFormats
from jaxinfer.server.config import ServerConfig
from jaxinfer.server.metrics import Metrics
from jaxinfer.server.tracing import Tracing

THREADS = 4  # for templates, tokens and models without a cache; more callers wait
LONG = 2**20  # characters, which take seconds to encode
Result = TypeVar("Result")


class Service:
    """What routes work with. All but what `prepared` runs is the event loop's."""

    def __init__(self, llm: LLM, config: ServerConfig):
        self.llm, self.config = llm, config
        if config.adapter_dir is not None and not (self.generates and llm.stats.max_adapters):
            raise ValueError("adapter_dir is given, and there is no room for adapters: load with max_adapters")
        if clash := next((name for name in config.names if name in self.adapters), None):
            raise ValueError(f"{clash!r} is the name of an adapter and of the model itself: give one another name")
        self.changing = asyncio.Lock()  # of adapters, by requests
        self.metrics = Metrics()
        self.created = int(time.time())
        self.state: Literal["ready", "draining", "failed"] = "ready"
        self.failure: BaseException | None = None
        self.active = 0
        self.aborting = False
        self.by_key: Counter[int | None] = Counter()
        self.tracing = None if config.otlp_traces_endpoint is None else Tracing(config.otlp_traces_endpoint)
        self._pool = ThreadPoolExecutor(THREADS, "jaxinfer-server")
        thread, default = (llm.engine_thread, llm.get_default_sampling_params) if self.generates else (None, None)
        self.engine = AsyncEngine.over(llm, thread, default, max_queued=config.max_queued)
        if self.generates:
            self.formats = ChatFormats(llm.tokenizer, self.encode, config.tool_call_parser, config.reasoning_parser)

    @property
    def generates(self) -> bool:
        """Whether the model makes text."""
        return self.llm.task == GENERATE

    @cached_property
    def completion_defaults(self) -> SamplingParams:
        """Of completions: as the checkpoint says, but short."""
        return self.engine.default_sampling_params().with_changes(max_tokens=COMPLETION_TOKENS)

    @cached_property
    def chat_defaults(self) -> SamplingParams:
        """Of chats: as the checkpoint says, and as long as there is room."""
        return self.engine.default_sampling_params().with_changes(max_tokens=None)

    @property
    def max_model_len(self) -> int:
        """Tokens of a text, or of a prompt and what follows it."""
        return self.llm.engine.max_model_len if self.llm.loaded is None else self.llm.loaded.max_model_len

    @property
    def closed(self) -> bool:
        """Whether the model is gone."""
        return self.llm.engine_thread.closed if self.llm.loaded is None else self.llm.loaded.engine.closed

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Those that are loaded, by name."""
        return self.llm.engine.adapters.infos if self.generates else {}

    def adapter(self, model: str) -> str | None:
        """The one that a model's name means, if it does."""
        return model if model not in self.config.names and model in self.adapters else None

    def model(self, name: object, *tasks: str) -> str:
        """The name of the model, or adapter, that a request asks for. Raises ServerError for another one, and
        UnsupportedError where the model does none of these tasks."""
        names = (*self.config.names, *self.adapters)
        if name is not None and name not in names:
            there = ", ".join(names)
            raise ServerError(404, f"no model {name!r:.80}: here there is {there}", "model", "model_not_found")
        if tasks and self.llm.task not in tasks:
            raise UnsupportedError(f"this model can't do that: {CAN[self.llm.task]}", "model")
        return self.config.names[0] if name is None else str(name)

    async def prepared(self, work: Callable[[], Result]) -> Result:
        """Done in another thread: the event loop has others to serve."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text; takes its time. Raises RequestError."""
        self.check_length(text)
        return self.llm.tokenizer.encode(text, add_special_tokens)

    def check_length(self, text: str) -> None:
        """Raises ContextLengthError for a text that would take long to encode, only to have more tokens than it may."""
        if len(text) > LONG and len(text) > self.max_model_len * self.llm.tokenizer.longest_text:
            raise ContextLengthError(
                f"the text has {len(text)} characters: more than {self.max_model_len} tokens (max_model_len) can have; "
                "shorten it",
                "prompt",
            )

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

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the device works: after an error that is its, and not a request's, the server ends."""
        try:
            yield
        except (RequestError, ServerError, EngineClosed, QueueFullError):
            raise
        except Exception as error:
            if self.state != "failed":
                self.state, self.failure = "failed", error
            raise

    def abort_all(self) -> None:
        """Ends what runs, with what there is so far, and what is about to."""
        self.aborting = True
        self.engine.abort_all()

    def close(self) -> None:
        self.engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            self.tracing.close()
