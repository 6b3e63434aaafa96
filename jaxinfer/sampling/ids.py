"""What counts as token ids, wherever somebody gives them: integers, numpy's too, and nothing that could be made one."""

from __future__ import annotations

from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

from jaxinfer.errors import RequestError


def is_id(value: Any) -> bool:
    """Whether it is an integer. True, 3.0 and "3" are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def are_ids(value: Any) -> bool:
    """Whether it is a sequence, set or array of one dimension, of integers only. Text and bytes are none."""
    return _is_list(value) and all(map(is_id, _items(value)))


def token_ids(value: Any, what: str, param: str = "prompt") -> list[int]:
    """The ids as a list. Raises RequestError if they are none; `what`: what is said of the value."""
    if not are_ids(value):
        odd = (
            next((f"one with {item!r:.60}" for item in _items(value) if not is_id(item)), "") if _is_list(value) else ""
        )
        raise RequestError(f"{what} a list of token ids, not {odd or type(value).__name__}", param)
    return [int(item) for item in _items(value)]


def _is_list(value: Any) -> bool:
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return bool(value.ndim == 1)
    return isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | bytearray | memoryview)


def _items(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
