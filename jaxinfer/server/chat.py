"""/v1/chat/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Chunks, Envelope, Json, call_json, chat_choice, chat_logprobs, finish_reason, usage
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.requests import ChatRequest, chat_request
from jaxinfer.server.answers import EventStream, json_answer, while_connected
from jaxinfer.server.completions import failed
from jaxinfer.server.generation import Chat, Turn, begin_chat
from jaxinfer.server.service import Service


async def chat_completions(service: Service, request: Request, body: Json) -> Response:
    """Answers a conversation."""
    model = service.model(body.get("model"), GENERATE)
    defaults, own_template = service.chat_defaults, service.config.trust_request_chat_template
    read = partial(chat_request, defaults=defaults, own_template=own_template)
    with ExitStack() as stack:
        asked, run = await begun_chat(service, request, model, body, read, stack)
        envelope = Envelope(f"chatcmpl-{request.state.name}", int(time.time()), model)
        if not asked.stream:
            return await while_connected(request.receive, _whole(run, asked, envelope))
        frames = _frames(run, asked, envelope, stack.pop_all())
        await anext(frames)
        return EventStream(frames)


async def begun_chat(
    service: Service, request: Request, model: str, body: Json, read: Callable[[Fields], ChatRequest], stack: ExitStack
) -> tuple[ChatRequest, Chat]:
    """The chat on its way, until the stack is closed. model: as `Service.model` has it. read: what is asked for, which
    takes its time, too."""
    key, name = request.state.key, request.state.name
    others = stack.enter_context(service.admitted(key))

    def begin() -> tuple[ChatRequest, Chat]:
        asked = read(Fields(body))
        return asked, begin_chat(service, asked, model, key, others, name)

    return await while_connected(request.receive, service.prepared(begin))


async def _whole(run: Chat, asked: ChatRequest, envelope: Envelope) -> Response:
    choices = []
    for choice, message in await run.messages():
        if not asked.include_reasoning:
            message.reasoning = ""
        entry = chat_choice(choice, message, asked.params.logprobs or 0)
        choices.append(entry | ({"token_ids": choice.token_ids} if asked.return_token_ids else {}))
    body = envelope.around("chat.completion", choices, _usage(run))
    return json_answer(body | ({"prompt_token_ids": run.ids[0]} if asked.return_token_ids else {}))


async def _frames(run: Chat, asked: ChatRequest, envelope: Envelope, stack: ExitStack) -> AsyncGenerator[bytes, None]:
    chunks, taken = Chunks(envelope, "chat.completion.chunk"), False
    calls = [0] * run.n
    with stack:
        try:
            async with contextlib.aclosing(run.turns()) as turns:
                begun = False
                async for arrived in turns:
                    frames = []
                    if arrived and not begun:
                        begun = True
                        first = {"role": "assistant", "content": ""}
                        frames = [chunks.choice(_choice(i, first)) for i in range(run.n)]
                    for turn in arrived:
                        counts = _usage(run) if asked.continuous_usage else None
                        frames += [chunks.choice(entry, counts) for entry in _entries(turn, run, asked, calls)]
                    taken = True
                    yield b"".join(frames)
            yield (chunks.usage(_usage(run)) if asked.include_usage else b"") + Chunks.DONE
        except Exception as error:
            if not taken:
                raise
            yield failed(error)


def _entries(turn: Turn, run: Chat, asked: ChatRequest, calls: list[int]) -> list[Json]:
    """The choices of a turn's chunks: one for each kind of piece, with the log-probabilities in the first one, and the
    end in one of its own."""
    deltas: list[Json] = []
    for piece in turn.pieces:
        if piece.call is not None:
            deltas.append({"tool_calls": [{"index": calls[turn.index]} | call_json(piece.call)]})
            calls[turn.index] += 1
        elif piece.kind == "content":
            deltas.append({"content": piece.text})
        elif asked.include_reasoning:
            deltas.append({"reasoning": piece.text, "reasoning_content": piece.text})
    logprobs = chat_logprobs(turn.delta, asked.params.logprobs or 0)
    if not deltas and (logprobs is not None or asked.return_token_ids) and turn.delta.token_ids:
        deltas.append({})
    entries = [_choice(turn.index, delta) for delta in deltas]
    if entries:
        entries[0] |= {"logprobs": logprobs} | ({"token_ids": turn.delta.token_ids} if asked.return_token_ids else {})
    if turn.delta.finish_reason is not None:
        reason = finish_reason(turn.delta, run.called[turn.index])
        entries.append(_choice(turn.index, {}) | {"finish_reason": reason})
    return entries


def _choice(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _usage(run: Chat) -> Json:
    return usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens)
