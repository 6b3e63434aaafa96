"""OpenAI's batch lines: {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}.

Format: https://platform.openai.com/docs/guides/batch; bodies as in that API's reference of chat/completions,
completions and embeddings, with OpenAI's defaults. Fields of SamplingParams that OpenAI has not (`top_k`, `min_p`,
...) may be there too, as in vLLM. What is not supported is refused by name, unless it asks for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.batch.fields import FORMS, conversation, decoded, kind, text, token_ids, with_int_bias
from jaxinfer.batch.row import Ask, Task
from jaxinfer.sampling.params import SamplingParams

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS: dict[str, tuple[str, ...]] = {
    "generate": (CHAT, COMPLETIONS),
    "chat": (CHAT, COMPLETIONS),
    "embed": (EMBEDDINGS,),
}
COMPLETION_TOKENS = 16  # OpenAI's default there; a chat has none
# What the answer would have no place for, or would be without.
_OWN = {field.name for field in dataclasses.fields(SamplingParams)} - {"prompt_logprobs", "detokenize"}
# Labels, accounting and caching on OpenAI's side: they say nothing about the answer. `model` is the job's.
_LABELS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields with the only values that are supported, besides null.
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}
_REMEDIES = {"tools": '; calls are not parsed here: give rows {"messages", "tools"} and read them in the text'}


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


def ask(line: Mapping[str, Any], task: Task, options: dict[str, Any]) -> Ask:
    """What a line asks for; `options` go before OpenAI's defaults. Raises ValueError."""
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
    body = {name: value for name, value in body.items() if value is not None and name not in _LABELS}
    for name, value in body.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise ValueError(f"{name} is not supported{_REMEDIES.get(name, '')}; leave it out")
    fields = {name: value for name, value in body.items() if name not in _ONLY}
    if url == EMBEDDINGS:
        return _embeddings(fields)
    if url == CHAT:
        messages = conversation(fields.pop("messages", None))
        return Ask(messages=messages, params=_params(_chat_params(fields), {"max_tokens": None} | options))
    prompt = _prompt(fields.pop("prompt", None))
    if fields.pop("best_of", None) not in (None, fields.get("n", 1)):
        raise ValueError("best_of is not supported, unless it is n; leave it out")
    return Ask(prompt=prompt, params=_params(fields, {"max_tokens": COMPLETION_TOKENS} | options))


def _chat_params(fields: dict[str, Any]) -> dict[str, Any]:
    """With the parameters that chat/completions spells in its own way."""
    if "max_completion_tokens" in fields:
        most = fields.pop("max_completion_tokens")
        if fields.setdefault("max_tokens", most) != most:
            raise ValueError("max_tokens and max_completion_tokens differ: leave one out")
    wanted, top = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise ValueError(f"logprobs is {wanted!r:.40}: in a chat it must be true or false")
    if top is not None and not wanted:
        raise ValueError("top_logprobs needs logprobs: true")
    return fields | {"logprobs": 0 if top is None else top} if wanted else fields


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        if len(prompt) != 1:
            raise ValueError(f"prompt is a list of {len(prompt)}: give one prompt a line")
        prompt = prompt[0]
    if isinstance(prompt, list):
        return token_ids("prompt", prompt)
    if not text("prompt", prompt):
        raise ValueError("prompt is empty")
    return prompt


def _embeddings(fields: dict[str, Any]) -> Ask:
    inputs, form = fields.pop("input", None), fields.pop("encoding_format", "float")
    if form not in ("float", "base64"):
        raise ValueError(f"encoding_format is {form!r:.40}: it must be 'float' or 'base64'")
    dimensions = fields.pop("dimensions", None)
    _check_names(fields, set())
    several = isinstance(inputs, list) and inputs and not isinstance(inputs[0], int)
    texts = tuple(map(_input, inputs if several else [inputs]))
    return Ask(texts=texts, dimensions=dimensions, base64=form == "base64")


def _input(value: Any) -> str | list[int]:
    if isinstance(value, list):
        return token_ids("input", value)
    if not text("input", value):
        raise ValueError("input is empty")
    return str(value)


def _check_names(fields: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{unknown[0]!r:.80} is not supported; leave it out")


def _params(fields: dict[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    _check_names(fields, _OWN)
    return SamplingParams(**defaults).with_changes(**with_int_bias(fields))
