"""The forms that a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.sampling.ids import are_ids, token_ids
from jaxinfer.text.base import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
BYTES = bytes | bytearray | memoryview  # sequences of integers, which are no token ids


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """The text (None where ids were given) and token ids of a prompt: text, ids, {"prompt": text} or
    {"prompt_token_ids": ids}. Raises ValueError."""
    if isinstance(prompt, Mapping):
        if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
            raise ValueError(f"a prompt as a dict has either prompt or prompt_token_ids, not {list(prompt)}")
        (prompt,) = prompt.values()
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty: give some text")
        return prompt, tokenizer.encode(prompt)
    if isinstance(prompt, BYTES):
        raise ValueError(f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}: decode it")
    return None, token_ids(prompt, "a prompt must be a string or")


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, in any of its forms, and not a list of prompts."""
    return isinstance(prompts, str | Mapping) or (are_ids(prompts) and len(prompts) > 0)


def is_single_conversation(messages: Any) -> bool:
    """Whether this is one conversation, a list of messages, and not a list of conversations."""
    return not messages or isinstance(messages[0], Mapping)


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, as a list."""
    if not isinstance(prompts, str | Mapping | Sequence | np.ndarray) or isinstance(prompts, BYTES):
        raise ValueError(f"prompts: a prompt or a list of them is needed, not {type(prompts).__name__}")
    listed: Any = [prompts] if is_single_prompt(prompts) else prompts
    return list(listed)
