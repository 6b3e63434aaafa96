"""Messages of a conversation in the one form that chat templates are given, whoever sends them.

It is the form that transformers 5.24 and vLLM bring them into: fields that are null are left out, a tool call's
arguments are an object where the API sends JSON in text, and reasoning is there under all three of its names.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.text.files import why_only_text
from jaxinfer.text.template_takes import Takes

__all__ = ["REASONING", "normalize_messages", "plain"]

# What a message's reasoning is called: by DeepSeek's API and most templates, by gpt-oss, by vLLM and OpenRouter.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Parts that are text, and the field that it is in.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}

TEXT = Takes()


class _NoText(UnsupportedError):
    """A part is no text, whatever the model."""


def normalize_messages(messages: object, takes: Takes = TEXT, folder: Path | None = None) -> list[dict[str, Any]]:
    """A copy of `messages`, a list of {"role": ..., "content": text or typed parts, ...}, for a template that `takes`
    these forms. Messages may also be dataclasses or pydantic models. Given its own result it returns the same. Folder:
    the checkpoint's, of which errors say what it does not take.

    Raises RequestError for what is no such list, for values that are not plain JSON, and for parts other than text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        kind = type(messages).__name__
        raise RequestError.at(
            "messages", f'expected a list such as [{{"role": "user", "content": "..."}}], found {kind}'
        )
    if not messages:
        raise RequestError.at("messages", 'the list is empty; start with {"role": "user", "content": "..."}')
    try:
        return [
            _message(plain(message, f"messages[{i}]"), f"messages[{i}]", takes) for i, message in enumerate(messages)
        ]
    except _NoText as error:
        raise UnsupportedError(f"{error}: {why_only_text(folder)}", error.param) from None


def _message(original: Any, where: str, takes: Takes) -> dict[str, Any]:
    if not isinstance(original, dict):
        raise RequestError.at(where, f"expected a dict with role and content, found {type(original).__name__}")
    message = _without_nulls(original)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError.at(where, f"role must be a string such as 'user' or 'assistant', found {role!r:.80}")
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message |= {name: reasoning for name in REASONING if name not in message} | {REASONING[0]: reasoning}
    calls = message.get("tool_calls")
    if calls == []:
        del message["tool_calls"]  # some templates ask only whether there is such a field
    elif isinstance(calls, list):
        message["tool_calls"] = [_tool_call(call, takes) if isinstance(call, dict) else call for call in calls]
    if "content" in message:
        message["content"] = _content(message["content"], where, takes, role)
    elif not original.keys() & {"content", "tool_calls", *REASONING}:
        raise RequestError.at(where, "content must be a string or a list of typed parts, found nothing")
    elif takes.null:
        message["content"] = None
    return message


def _content(content: Any, where: str, takes: Takes, role: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content if takes.text else [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise RequestError.at(where, f"content must be a string or a list of typed parts, found {content!r:.80}")
    parts = [_part(part, where) for part in content]
    # What a tool said is printed as text even where the other roles' parts are looped over.
    if takes.parts and not (takes.text and role == "tool"):
        return parts
    return "\n".join(part[part["type"]] for part in parts)


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    """A part as templates know it: {"type": "text", "text": ...}, or {"type": "thinking", "thinking": ...}."""
    kind = part["type"]
    name = _TEXTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise _NoText.at(where, f"content has a part of type {kind!r:.40}; only text is supported")
    if not isinstance(part.get(name), str):
        raise RequestError.at(where, f"text of a part must be text, found {part.get(name)!r:.80}")
    known = "thinking" if kind == "thinking" else "text"
    rest = {key: value for key, value in _without_nulls(part).items() if key not in ("type", name)}
    return {"type": known, known: part[name]} | rest


def _tool_call(call: dict[str, Any], takes: Takes) -> dict[str, Any]:
    call = _without_nulls(call)
    inner = call.get("function", call)  # some give name and arguments without the "function" around them
    if isinstance(inner, dict):
        inner = _without_nulls(inner)
        inner["arguments"] = _arguments(inner.get("arguments", {}), takes)
        call = call | {"function": inner} if "function" in call else inner
    return call


def _arguments(arguments: Any, takes: Takes) -> Any:
    if takes.arguments_as_text:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments  # the model said so: it is shown its own words
    return parsed if isinstance(parsed, dict | list) else arguments


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def plain(value: Any, where: str) -> Any:
    """A copy out of plain JSON types: methods of richer objects are not for a template to call. Raises RequestError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise RequestError.at(where, f"keys must be strings, found {wrong[0]!r:.80}")
        return {str.__str__(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, type):
        if dataclasses.is_dataclass(value):
            return plain({each.name: getattr(value, each.name) for each in dataclasses.fields(value)}, where)
        if callable(dump := getattr(value, "model_dump", None)):  # pydantic's, which SDKs return
            return plain(dump(), where)
    raise RequestError.at(where, f"a chat template takes plain JSON values, found {type(value).__name__}")
