"""OpenAI's batch lines: {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}.

Format: https://platform.openai.com/docs/guides/batch; bodies are those of `jaxinfer.openai`, with OpenAI's defaults.
What an answer in a line has no place for is refused by name, unless it asks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.batch.fields import FORMS, decoded, text
from jaxinfer.batch.row import Ask, Task
from jaxinfer.errors import UnsupportedError
from jaxinfer.openai.fields import kind
from jaxinfer.openai.pooling import embedding_request
from jaxinfer.openai.requests import COMPLETION_TOKENS, chat_request, completion_request
from jaxinfer.sampling.params import SamplingParams

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS: dict[str, tuple[str, ...]] = {
    "generate": (CHAT, COMPLETIONS),
    "chat": (CHAT, COMPLETIONS),
    "embed": (EMBEDDINGS,),
}
# Fields with the only values that are supported, besides null.
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}
_REMEDIES = {"tools": '; calls are not parsed here: give rows {"messages", "tools"} and read them in the text'}
# What only a server can do with a request.
_SERVERS = (
    *("stream_options", "return_token_ids", "truncate_prompt_tokens", "priority", "cache_salt", "documents"),
    *("chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "include_reasoning", "parallel_tool_calls"),
)


def is_batch_line(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant as an OpenAI batch line, a good one or one that lacks something. A row with a prompt of
    its own may have columns of these names."""
    names = {"custom_id", "method", "url", "body"}
    return len(names & row.keys()) >= 3 and not row.keys() & set(FORMS)


def custom_id(line: Mapping[str, Any]) -> str:
    """Raises ValueError if there is none. That each is there only once is not checked: it would need all of them in
    memory."""
    value = text("custom_id", line.get("custom_id"))
    if not value:
        raise ValueError("custom_id is empty")
    return value


def ask(
    line: Mapping[str, Any], task: Task, options: dict[str, Any], adapter_of: Callable[[object], str | None]
) -> Ask:
    """What a line asks for; `options` go before OpenAI's defaults. adapter_of: that is meant by a model's name. Raises
    ValueError."""
    if task not in URLS:
        raise ValueError(f"an OpenAI batch line is for the tasks {', '.join(URLS)}, and this is {task}")
    if line.get("method") != "POST":
        raise ValueError(f"method is {line.get('method')!r:.40}: it must be 'POST'")
    url = line.get("url")
    if url not in URLS[task]:
        raise ValueError(f"url is {url!r:.80}: the task {task} is for {' and '.join(URLS[task])}")
    body = decoded(line, "body")
    if not isinstance(body, dict):
        raise ValueError(f"body must be an object, and is {kind(body)}")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise ValueError(f"{name} is not supported{_REMEDIES.get(name, '')}; leave it out")
        if name in _SERVERS:
            raise ValueError(f"{name!r:.80} is not supported; leave it out")
    if url == EMBEDDINGS:
        return _embeddings(body)
    adapter = adapter_of(body.get("model"))
    if url == CHAT:
        chat = chat_request(body, SamplingParams(**{"max_tokens": None} | options))
        return Ask(messages=chat.messages, params=chat.params, adapter=adapter)
    completion = completion_request(body, SamplingParams(**{"max_tokens": COMPLETION_TOKENS} | options))
    if len(completion.prompts) > 1:
        raise ValueError(f"prompt is a list of {len(completion.prompts)}: give one prompt a line")
    return Ask(prompt=completion.prompts[0], params=completion.params, adapter=adapter)


def _embeddings(body: dict[str, Any]) -> Ask:
    asked = embedding_request(body)
    for name in ("prompt_name", "prompt", "normalize", "use_activation"):
        if name in body:
            raise UnsupportedError(f"{name!r} is not supported: all lines of a job have the same; leave it out", name)
    return Ask(texts=tuple(asked.texts), dimensions=asked.params.dimensions, base64=asked.base64)
