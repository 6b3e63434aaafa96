"""Bodies of /tokenize and /detokenize, as vLLM has them. All functions raise RequestError."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.errors import RequestError
from jaxinfer.openai.fields import Fields, is_number, prompts
from jaxinfer.openai.requests import ChatRequest, chat_request
from jaxinfer.sampling.params import SamplingParams

MOST_IDS = 2**18  # that are made text of at a time


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """asked: a text, or a conversation. add_special_tokens: around text. strings: the answer has the tokens' texts."""

    asked: str | ChatRequest
    add_special_tokens: bool = True
    strings: bool


def tokenize_request(fields: Fields) -> TokenizeRequest:
    """Of a prompt's ids, or a conversation's."""
    strings = fields.flag("return_token_strs")
    if "messages" in fields:
        return TokenizeRequest(asked=chat_request(fields, SamplingParams()), strings=strings)
    text, special = fields.text("prompt"), fields.flag("add_special_tokens", True)
    fields.skip(("model",))
    fields.end()
    if text is None:
        raise RequestError("prompt must be text: give that, or messages", "prompt")
    return TokenizeRequest(asked=text, add_special_tokens=special, strings=strings)


def detokenize_request(fields: Fields) -> list[int]:
    """The ids."""
    tokens = fields.take("tokens")
    fields.skip(("model",))
    fields.end()
    if not isinstance(tokens, list) or not all(map(is_number, tokens)):
        raise RequestError("tokens must be a list of token ids", "tokens")
    if len(tokens) > MOST_IDS:
        raise RequestError(f"tokens has {len(tokens):,} ids: give {MOST_IDS:,} at most at a time", "tokens")
    ids = prompts("tokens", tokens)[0] if tokens else []
    assert isinstance(ids, list)
    return ids
