"""The forms that a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.text.tokenizer import Tokenizer

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
    if not _is_ids(prompt):
        raise ValueError(f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}")
    return None, [int(i) for i in prompt]


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, in any of its forms, and not a list of prompts."""
    return isinstance(prompts, str | Mapping) or (len(prompts) > 0 and _is_ids(prompts))


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, as a list."""
    if not isinstance(prompts, str | Mapping | Sequence | np.ndarray) or isinstance(prompts, BYTES):
        raise ValueError(f"prompts: a prompt or a list of them is needed, not {type(prompts).__name__}")
    listed: Any = [prompts] if is_single_prompt(prompts) else prompts
    return list(listed)


def _is_ids(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence | np.ndarray)
        and not isinstance(prompt, BYTES)
        and all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in prompt)
    )
