"""/v1/responses and Anthropic's /v1/messages."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Json
from jaxinfer.openai.anthropic import MessageWriter, messages_request
from jaxinfer.openai.blocks import BlockWriter, Counts, Ending
from jaxinfer.openai.errors import server_error
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.requests import ChatRequest
from jaxinfer.openai.responses import ResponseWriter, response_request
from jaxinfer.server.answers import EventStream, json_answer, while_connected
from jaxinfer.server.chat import begun_chat
from jaxinfer.server.generation import Chat
from jaxinfer.server.service import Service


async def messages(service: Service, request: Request, body: Json) -> Response:
    """Answers a conversation, in Anthropic's form."""
    model, defaults, state = service.model(body.get("model"), GENERATE), service.chat_defaults, request.state
    read = partial(messages_request, defaults=defaults)
    make_writer = partial(MessageWriter, state.name, model, state.request_id)
    return await _answer(service, request, model, body, read, lambda _: make_writer())


async def count_tokens(service: Service, request: Request, body: Json) -> Response:
    """How many tokens a conversation has."""
    service.model(body.get("model"), GENERATE)
    defaults = service.chat_defaults
    read = partial(messages_request, defaults=defaults, counting=True)
    prepared = await service.prepared(lambda: service.formats.prepare(read(Fields(body))))
    return json_answer({"input_tokens": len(prepared.ids)})


async def responses(service: Service, request: Request, body: Json) -> Response:
    """Answers what may be a conversation."""
    model, name, defaults = service.model(body.get("model"), GENERATE), request.state.name, service.chat_defaults
    read = partial(response_request, defaults=defaults)
    return await _answer(service, request, model, body, read, lambda asked: ResponseWriter(name, model, asked.repeated))


async def _answer(
    service: Service,
    request: Request,
    model: str,
    body: Json,
    read: Callable[[Fields], ChatRequest],
    make_writer: Callable[[ChatRequest], BlockWriter],
) -> Response:
    with ExitStack() as stack:
        asked, run = await begun_chat(service, request, model, body, read, stack)
        writer = make_writer(asked)
        if asked.stream:
            frames = _frames(service, run, writer, stack.pop_all())
            await anext(frames)
            return EventStream(frames)
        await while_connected(request.receive, _whole(service, run, writer))
        return json_answer(writer.body())


async def _whole(service: Service, run: Chat, writer: BlockWriter) -> None:
    async for _ in _events(service, run, writer):
        pass


async def _frames(service: Service, run: Chat, writer: BlockWriter, stack: ExitStack) -> AsyncGenerator[bytes, None]:
    taken = False
    with stack:
        try:
            async with contextlib.aclosing(_events(service, run, writer)) as events:
                async for frame in events:
                    taken = True
                    yield frame
        except Exception as error:
            if not taken:
                raise
            failure = server_error(error)
            yield writer.failed(str(failure), failure.status)


async def _events(service: Service, run: Chat, writer: BlockWriter) -> AsyncGenerator[bytes, None]:
    """The first one is empty: the request was taken."""
    begun = False
    async with contextlib.aclosing(run.turns()) as turns:
        async for arrived in turns:
            events = b""
            if arrived and not begun:
                begun = True
                events = writer.start(Counts(run.prompt_tokens, run.cached_tokens, 0))
            for turn in arrived:
                events += writer.add(turn.pieces)
                if turn.delta.finish_reason is not None:
                    thought = service.llm.tokenizer.encode(writer.reasoning, False) if writer.reasoning else []
                    counts = Counts(run.prompt_tokens, run.cached_tokens, run.completion_tokens, len(thought))
                    ending = Ending(turn.delta.finish_reason, turn.delta.stop_reason, writer.called)
                    events += writer.end(ending, counts)
            yield events
