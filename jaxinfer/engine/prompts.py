"""The forms that a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.sampling.ids import are_ids, token_ids
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.files import why_only_text

Prompt = str | Sequence[int] | Mapping[str, Any]
BYTES = bytes | bytearray | memoryview  # sequences of integers, which are no token ids


class Encoded(NamedTuple):
    """A prompt as tokens.

    text: None where ids were given.
    ids: the tokens.
    cache_salt: prompts share what they begin with only with those of the same salt, so that nobody learns from times
        what others asked; "" is everybody's.
    adapter: the name of one that is loaded, or vLLM's LoRARequest; None: the model itself.
    """

    text: str | None
    ids: list[int]
    cache_salt: str = ""
    adapter: Any = None


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Encoded:
    """A prompt: text, ids, {"prompt": text} or {"prompt_token_ids": ids}, of which the latter two may have a
    cache_salt and the name of an adapter. Raises RequestError."""
    given, said = plain_prompt(prompt, tokenizer)
    if isinstance(given, str):
        if not given:
            raise RequestError("the prompt is empty: give some text", "prompt")
        return Encoded(given, tokenizer.encode(given), **said)
    if isinstance(given, BYTES):
        kind = type(given).__name__
        raise RequestError(f"a prompt must be a string or a list of token ids, not {kind}: decode it", "prompt")
    return Encoded(None, token_ids(given, "a prompt must be a string or"), **said)


def plain_prompt(prompt: Prompt, tokenizer: Tokenizer) -> tuple[Any, dict[str, Any]]:
    """A prompt's text or ids, and what a dict says beside them: cache_salt and adapter. Raises RequestError."""
    if not isinstance(prompt, Mapping):
        return prompt, {}
    if "multi_modal_data" in prompt:
        why = why_only_text(tokenizer.folder)
        raise UnsupportedError(f"a prompt has multi_modal_data; only text is supported: {why}", "prompt")
    said = {name: prompt[name] for name in ("cache_salt", "adapter") if name in prompt}
    if set(prompt) - set(said) not in ({"prompt"}, {"prompt_token_ids"}):
        raise RequestError(f"a prompt as a dict has either prompt or prompt_token_ids, not {list(prompt)}", "prompt")
    salt = said.pop("cache_salt", None)
    if salt is not None:
        if not isinstance(salt, str) or not salt:
            raise RequestError(f"cache_salt is {salt!r:.100}: it must be a text that is not empty", "cache_salt")
        said["cache_salt"] = salt
    return prompt["prompt" if "prompt" in prompt else "prompt_token_ids"], said


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, in any of its forms, and not a list of prompts."""
    return isinstance(prompts, str | Mapping) or (are_ids(prompts) and len(prompts) > 0)


def is_single_conversation(messages: Any) -> bool:
    """Whether this is one conversation, a list of messages, and not a list of conversations."""
    return not messages or isinstance(messages[0], Mapping)


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, as a list."""
    if not isinstance(prompts, str | Mapping | Sequence | np.ndarray) or isinstance(prompts, BYTES):
        raise RequestError.at("prompts", f"a prompt or a list of them is needed, not {type(prompts).__name__}")
    listed: Any = [prompts] if is_single_prompt(prompts) else prompts
    return list(listed)
