"""Answers of completions and chats: bodies, and the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.engine.outputs import CompletionOutput, Logprob
from jaxinfer.text.calls import Call
from jaxinfer.text.scanner import Message

LEAST = -9999.0  # what OpenAI writes for a logprob that JSON has no number for

Json = dict[str, Any]
Step = dict[int, Logprob]


@dataclass(frozen=True)
class Envelope:
    """What an answer and all chunks of a stream have in common.

    created: seconds since the epoch.
    model: its name.
    """

    id: str
    created: int
    model: str

    def around(self, kind: str, choices: list[Json], usage: Json | None = None) -> Json:
        """An object of this kind."""
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return body if usage is None else body | {"usage": usage}


class Chunks:
    """The events of a stream: what is the same in all of them is written once."""

    DONE = b"data: [DONE]\n\n"

    def __init__(self, envelope: Envelope, kind: str):
        self._envelope, self._kind = envelope, kind
        self._head = f"data: {json.dumps(envelope.around(kind, []))[:-2]}"

    def choice(self, choice: Json, usage: Json | None = None) -> bytes:
        """One choice, or what has come of it."""
        counts = "" if usage is None else f', "usage": {json.dumps(usage)}'
        return f"{self._head}{json.dumps(choice)}]{counts}}}\n\n".encode()

    def usage(self, usage: Json) -> bytes:
        """The last one."""
        return event(self._envelope.around(self._kind, [], usage))


def event(data: Json, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def usage(prompt: int, completion: int, cached: int | None = None, reasoning: int | None = None) -> Json:
    """Counts of tokens. cached: of the prompt; None: not told."""
    counts: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts if cached is None else counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def text_choice(choice: CompletionOutput, before: Json | None = None) -> Json:
    """Of a completion, or what has come of it. before: log-probabilities that go before its own."""
    logprobs = None if choice.logprobs is None else text_logprobs(list(_steps(choice)))
    if logprobs is not None and before is not None:
        logprobs = {name: before[name] + logprobs[name] for name in logprobs if logprobs[name] is not None}
        logprobs["text_offset"] = None
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


def text_logprobs(steps: Sequence[tuple[Logprob, list[Logprob]]]) -> Json:
    """top_logprobs has the sampled token too. text_offset is null: a token's own text may be without its space."""
    return {
        "tokens": [sampled.decoded_token for sampled, _ in steps],
        "token_logprobs": [_finite(sampled) for sampled, _ in steps],
        # Several tokens can have the same text: the likeliest one stays.
        "top_logprobs": [{x.decoded_token: _finite(x) for x in reversed(ranked)} for _, ranked in steps],
        "text_offset": None,
    }


def prompt_logprobs(ids: Sequence[int], first: str, steps: Sequence[Step | None]) -> Json:
    """Of a prompt that is echoed. first: the first token's text, which has no probability."""
    scored = [(step[token], _ranked(step)) for token, step in zip(ids, steps, strict=True) if step is not None]
    rest = text_logprobs(scored)
    return {
        "tokens": [first, *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
    }


def chat_choice(choice: CompletionOutput, message: Message, wanted: int) -> Json:
    """Of a chat. wanted: how many of the likeliest tokens to report."""
    return {
        "index": choice.index,
        "message": message_json(message),
        "logprobs": chat_logprobs(choice, wanted),
        "finish_reason": finish_reason(choice, bool(message.calls)),
    }


def finish_reason(choice: CompletionOutput, called: bool) -> str | None:
    """OpenAI's word for it."""
    return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason


def message_json(message: Message) -> Json:
    """An assistant's message."""
    body: Json = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        body |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    if message.calls:
        body |= {"content": message.content or None, "tool_calls": [call_json(call) for call in message.calls]}
    return body


def call_json(call: Call) -> Json:
    """A call of a tool."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(choice: CompletionOutput, wanted: int) -> Json | None:
    """As chat/completions has them; None if they were not asked for."""
    if choice.logprobs is None:
        return None
    content = [
        _entry(sampled) | {"top_logprobs": [_entry(x) for x in ranked if x.rank <= wanted][:wanted]}
        for sampled, ranked in _steps(choice)
    ]
    return {"content": content, "refusal": None}


def _steps(choice: CompletionOutput) -> Iterator[tuple[Logprob, list[Logprob]]]:
    """Of each token: itself, and all that are reported, itself too, likeliest first."""
    for token, step in zip(choice.token_ids, choice.logprobs or (), strict=True):
        yield step[token], _ranked(step)


def _ranked(step: Step) -> list[Logprob]:
    return sorted(step.values(), key=lambda x: x.rank)


def _entry(logprob: Logprob) -> Json:
    # Where a token is part of a character, its own bytes are not known here.
    own = None if "\ufffd" in logprob.decoded_token else list(logprob.decoded_token.encode())
    return {"token": logprob.decoded_token, "logprob": _finite(logprob), "bytes": own}


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST)
