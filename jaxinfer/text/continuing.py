"""Prompts that end inside a conversation's last message, so that the model goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.text.messages import REASONING

__all__ = ["continued"]


def continued(messages: list[dict[str, Any]], field: str, write: Callable[[list[dict[str, Any]]], str]) -> str:
    """What `write` makes of the conversation, up to where the `field` of its last message ends.

    As in transformers, the end is marked before the template writes the message: searching for its text afterwards
    would find it where it happens to be said too. Spaces at its end stay if the template keeps them, which is seen by
    comparing with what it writes without a mark. Raises RequestError if the message has no such text, or the template
    doesn't write it.
    """
    text = messages[-1].get(field)
    if isinstance(text, list):
        text = next((part[part["type"]] for part in reversed(text)), None)
    if not isinstance(text, str):
        raise RequestError.at("continue_final_message", f"the last message has no text in {field!r:.80} to continue")
    unmarked = write(messages)
    mark = "9081726354"  # upper and lower case of it are the same, and no end of it is a beginning of it
    while mark in unmarked:
        mark += "0"
    marked = write([*messages[:-1], _marked(messages[-1], field, mark)])
    if mark not in marked:
        raise RequestError.at(
            "continue_final_message", f"the chat template doesn't write the end of the last {field!r:.80}"
        )
    head, _, tail = marked.rpartition(mark)
    head = head.replace(mark, "")  # of a template that writes the message twice
    dropped = len(head) + len(tail) - len(unmarked)
    if 0 < dropped <= len(text) - len(text.rstrip()) and unmarked == head[:-dropped] + tail:
        return head[:-dropped]
    return head


def _marked(message: dict[str, Any], field: str, mark: str) -> dict[str, Any]:
    value = message[field]
    if isinstance(value, list):
        last = value[-1]
        return message | {field: [*value[:-1], last | {last["type"]: last[last["type"]] + mark}]}
    # Whichever of its names the template reads reasoning by.
    same = [name for name in REASONING if message.get(name) == value] if field in REASONING else [field]
    return message | dict.fromkeys(same, value + mark)
