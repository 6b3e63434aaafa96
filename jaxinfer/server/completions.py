"""/v1/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.engine.outputs import CompletionOutput
from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Chunks, Envelope, Json, event, prompt_logprobs, text_choice, usage
from jaxinfer.openai.errors import error_body, server_error
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.requests import CompletionRequest, completion_request
from jaxinfer.server.answers import EventStream, json_answer, while_connected
from jaxinfer.server.generation import Generation, begin_completion
from jaxinfer.server.service import Service

SHORT = 4096  # bytes of a body
NUMBERS = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "ignore_eos"}
PLAIN = NUMBERS | {"prompt", "model", "stream", "stream_options", "user"}


async def completions(service: Service, request: Request, body: Json) -> Response:
    """Continues prompts."""
    model = service.model(body.get("model"), GENERATE)
    key, name = request.state.key, request.state.name
    with ExitStack() as stack:
        others = stack.enter_context(service.admitted(key))

        def begin() -> tuple[CompletionRequest, Generation]:
            asked = completion_request(Fields(body), service.completion_defaults)
            return asked, begin_completion(service, asked, model, key, others, name)

        at_once = int(request.headers.get("content-length", SHORT)) < SHORT and _is_plain(body)
        asked, run = begin() if at_once else await while_connected(request.receive, service.prepared(begin))
        envelope = Envelope(f"cmpl-{name}", int(time.time()), model)
        if not asked.stream:
            return await while_connected(request.receive, _whole(service, run, asked, envelope))
        frames = _frames(service, run, asked, envelope, stack.pop_all())
        await anext(frames)
        return EventStream(frames)


def _is_plain(body: Json) -> bool:
    """Whether a thread would take longer to wake up than to prepare it: ids and numbers."""
    prompt = body.get("prompt")
    return body.keys() <= PLAIN and isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)


async def _whole(service: Service, run: Generation, asked: CompletionRequest, envelope: Envelope) -> Response:
    choices = [_choice(service, run, asked, choice, True) for choice in await run.whole()]
    return json_answer(envelope.around("text_completion", choices, _usage(run)))


async def _frames(
    service: Service, run: Generation, asked: CompletionRequest, envelope: Envelope, stack: ExitStack
) -> AsyncGenerator[bytes, None]:
    chunks, begun, taken = Chunks(envelope, "text_completion"), set(), False
    with stack:
        try:
            async with contextlib.aclosing(run.deltas()) as deltas:
                async for arrived in deltas:
                    frames = []
                    for choice in arrived:
                        entry = _choice(service, run, asked, choice, choice.index not in begun)
                        begun.add(choice.index)
                        frames.append(chunks.choice(entry, _usage(run) if asked.continuous_usage else None))
                    taken = True
                    yield b"".join(frames)
            yield (chunks.usage(_usage(run)) if asked.include_usage else b"") + Chunks.DONE
        except Exception as error:
            if not taken:
                raise
            yield failed(error)


def _choice(service: Service, run: Generation, asked: CompletionRequest, choice: CompletionOutput, first: bool) -> Json:
    """A continuation, or what has come of it. first: and the prompt before it, where that is to be echoed."""
    index = choice.index // run.n
    text, before = _echo(service, run, index) if asked.echo and first else ("", None)
    entry = text_choice(choice, before)
    if text:
        entry["text"] = text + entry["text"]
    if asked.return_token_ids:
        entry |= {"prompt_token_ids": run.ids[index] if first else None, "token_ids": choice.token_ids}
    return entry


def failed(error: BaseException) -> bytes:
    """The last event of a stream that breaks off. Before the first one the error is the answer."""
    failure = server_error(error)
    return event(error_body(str(failure), failure.status, failure.param, failure.code))


def _usage(run: Generation) -> Json:
    return usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens)


def _echo(service: Service, run: Generation, index: int) -> tuple[str, Json | None]:
    """The prompt's text, and its log-probabilities where they are asked for."""
    tokenizer, ids, text = service.llm.tokenizer, run.ids[index], run.texts[index]
    text, steps = tokenizer.decode(ids) if text is None else text, run.firsts[index].prompt_logprobs
    return text, None if steps is None else prompt_logprobs(ids, tokenizer.token_text(ids[0]), steps)
