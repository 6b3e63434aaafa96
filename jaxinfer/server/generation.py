"""Requests that make text, on their way through the engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.outputs import CompletionOutput, RequestOutput
from jaxinfer.engine.prompts import Encoded
from jaxinfer.errors import ContextLengthError, RequestError
from jaxinfer.openai.errors import ServerError
from jaxinfer.openai.requests import ChatRequest, CompletionRequest, Options
from jaxinfer.server.service import Service
from jaxinfer.text.scanner import Message, Piece, Scanner

# Of lists in sampling parameters that cost time at each token.
MOST = {"stop": 64, "bad_words": 1024, "bad_words_ids": 1024}


class Generation:
    """One request's prompts, all their continuations numbered in one row.

    prompt_tokens, cached_tokens, completion_tokens: so far. ids, texts: of the prompts. firsts: the first output of
    each, which has its log-probabilities.
    """

    def __init__(self, service: Service, groups: Sequence[RequestGroup], texts: Sequence[str | None], name: str):
        self._service, self._groups, self._name = service, groups, name
        self.n = len(groups[0].members)
        self.texts = texts
        self.ids = [group.members[0].request.prompt_token_ids for group in groups]
        self.prompt_tokens = sum(map(len, self.ids))
        self.firsts: dict[int, RequestOutput] = {}
        self.completion_tokens = 0
        self._cached = [0] * len(groups)
        self._generated = [0] * len(groups)
        self._reasons: list[list[str]] = [[] for _ in groups]
        self._last = [0.0] * len(groups)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    async def deltas(self) -> AsyncGenerator[list[CompletionOutput], None]:
        """What has come of each continuation since the last time, the first time nothing. Raises ServerError, too."""
        loop, service = asyncio.get_running_loop(), self._service
        if service.aborting:  # while it was prepared
            raise ServerError(503, "the server is shutting down; try another one")
        limit = loop.call_later(service.config.request_seconds, service.engine.abort, self._name)
        try:
            with service.watched():
                async with contextlib.aclosing(service.engine.deltas(self._groups, request_id=self._name)) as outputs:
                    async for arrived in outputs:
                        parts: dict[int, list[CompletionOutput]] = {}
                        for output in arrived:
                            self._count(output)
                            if output.error is not None:
                                raise ServerError(500, output.error)
                            for choice in output.outputs:
                                parts.setdefault(output.index * self.n + choice.index, []).append(choice)
                        yield [joined(index, choices) for index, choices in parts.items()]
        finally:
            limit.cancel()

    def _count(self, output: RequestOutput) -> None:
        i, now, metrics = output.index, time.perf_counter(), self._service.metrics
        self.firsts.setdefault(i, output)
        tokens = 0
        for choice in output.outputs:
            tokens += len(choice.token_ids)
            if choice.finish_reason is not None:
                self._reasons[i].append(choice.finish_reason)
        if tokens and self._last[i]:
            metrics.between.observe((now - self._last[i]) * len(output.outputs) / tokens, tokens)
        self._last[i] = now
        self._generated[i] += tokens
        self.completion_tokens += tokens
        self._cached[i] = output.metrics.cached_tokens
        if output.finished:
            metrics.end(output, len(self.ids[i]), self._generated[i], self._reasons[i])

    async def whole(self) -> list[CompletionOutput]:
        """All continuations, when they have ended."""
        parts: dict[int, list[CompletionOutput]] = {}
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for arrived in deltas:
                for choice in arrived:
                    parts.setdefault(choice.index, []).append(choice)
        return [joined(index, parts[index]) for index in sorted(parts)]


def joined(index: int, parts: Sequence[CompletionOutput]) -> CompletionOutput:
    """One continuation out of what came of it."""
    end = parts[-1]
    if len(parts) == 1 and index == end.index:
        return end
    logprobs = None if end.logprobs is None else [step for part in parts for step in part.logprobs or ()]
    text, ids = "".join([part.text for part in parts]), [token for part in parts for token in part.token_ids]
    return CompletionOutput(index, text, ids, end.finish_reason, end.stop_reason, None, logprobs)


@dataclass(frozen=True)
class Turn:
    """Some more of one answer.

    index: which. delta: what the engine gave. pieces: what became certain of it.
    """

    index: int
    delta: CompletionOutput
    pieces: list[Piece]


class Chat(Generation):
    """A chat's answers."""

    def __init__(self, service: Service, group: RequestGroup, scanners: list[Scanner], name: str):
        super().__init__(service, [group], [None], name)
        self._scanners = scanners
        self.called = [False] * len(scanners)

    async def turns(self) -> AsyncGenerator[list[Turn], None]:
        """What has come, the first time nothing."""
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for arrived in deltas:
                yield [self._turn(choice) for choice in arrived]

    def _turn(self, choice: CompletionOutput) -> Turn:
        scanner = self._scanners[choice.index]
        pieces = scanner.push(choice.text)
        if choice.finish_reason is not None:
            pieces += scanner.finish(choice.finish_reason == "stop")
        self.called[choice.index] |= any(piece.call is not None for piece in pieces)
        return Turn(choice.index, choice, pieces)

    async def messages(self) -> list[tuple[CompletionOutput, Message]]:
        """All answers, when they have ended."""
        parts: dict[int, list[CompletionOutput]] = {}
        messages = [Message() for _ in self._scanners]
        async with contextlib.aclosing(self.turns()) as turns:
            async for arrived in turns:
                for turn in arrived:
                    parts.setdefault(turn.index, []).append(turn.delta)
                    messages[turn.index].add(turn.pieces)
        return [(joined(i, parts[i]), messages[i]) for i in sorted(parts)]


def begin_completion(
    service: Service, request: CompletionRequest, model: str, key: int | None, others: int, name: str
) -> Generation:
    """Encodes the prompts; takes its time. model: as `Service.model` has it. Raises RequestError."""
    _check(service, request, len(request.prompts))
    groups, texts = [], []
    for prompt in request.prompts:
        text = prompt if isinstance(prompt, str) else None
        ids = service.encode(prompt, request.add_special_tokens) if isinstance(prompt, str) else prompt
        groups.append(_group(service, request, model, ids, key, others))
        texts.append(text)
    return Generation(service, groups, texts, name)


def begin_chat(service: Service, request: ChatRequest, model: str, key: int | None, others: int, name: str) -> Chat:
    """Renders and encodes the conversation; takes its time. model: as `Service.model` has it. Raises RequestError."""
    _check(service, request, 1)
    if len(request.messages) > service.config.max_messages:
        raise RequestError(
            f"{len(request.messages)} messages are given: at most {service.config.max_messages} are taken", "messages"
        )
    prepared = service.formats.prepare(request)
    group = _group(service, replace(request, params=prepared.params), model, prepared.ids, key, others)
    return Chat(service, group, prepared.scanners, name)


def _check(service: Service, request: Options, prompts: int) -> None:
    """Before anything is made of it."""
    sequences, most = prompts * request.params.n, service.config.max_sequences
    if sequences > most:
        param = "n" if prompts == 1 else "prompt"
        raise RequestError(f"{sequences} continuations are asked for: at most {most} are made at once", param)
    for name, most in MOST.items():
        if len(getattr(request.params, name) or ()) > most:
            raise RequestError(
                f"{name} has {len(getattr(request.params, name))} entries: at most {most} are taken", name
            )


def _group(
    service: Service, request: Options, model: str, ids: list[int], key: int | None, others: int
) -> RequestGroup:
    limit, most = service.llm.engine.max_model_len, request.params.max_tokens
    keep = request.truncate_prompt_tokens
    if keep is not None:
        room = limit - min(most or 1, limit - 1)
        ids = ids[-(room if keep == -1 else keep) :]
    if most is not None and len(ids) + most > limit:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens and max_tokens is {most}: together they may be {limit}, the model's "
            "context here; shorten the prompt, or ask for less",
            "max_tokens" if len(ids) < limit else "messages" if isinstance(request, ChatRequest) else "prompt",
        )
    salt = service.salt(key, request.cache_salt)
    priority = service.priority(request.priority, others)
    return service.engine.new_group(Encoded(None, ids, salt, service.adapter(model)), request.params, priority)
