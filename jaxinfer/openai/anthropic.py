"""Anthropic's messages. Format: https://docs.anthropic.com/en/api/messages and .../messages-streaming"""

from __future__ import annotations

import json
from typing import Any

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.openai.answers import Json, event
from jaxinfer.openai.blocks import BlockWriter, Counts, Ending
from jaxinfer.openai.errors import message_error
from jaxinfer.openai.fields import Fields, changed, kind
from jaxinfer.openai.requests import ChatRequest, check_tools, conversation, must_call
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.calls import Call
from jaxinfer.text.scanner import Kind

# What says nothing about the answer of a model that is here.
LABELS = ("model", "metadata", "service_tier", "inference_geo", "cache_control")
PARAMETERS = "input_schema"  # of a tool
THINKING = "chat_template_kwargs, such as {'enable_thinking': false}, say what the model's template knows"


def messages_request(fields: Fields, defaults: SamplingParams, counting: bool = False) -> ChatRequest:
    """What is asked for. counting: of a prompt's tokens alone. Raises RequestError."""
    given, system = fields.take("messages"), fields.take("system")
    if not isinstance(given, list) or not given:
        raise RequestError(f"messages must be a list of messages, and is {kind(given)}", "messages")
    messages = [] if system is None else [{"role": "system", "content": _text_of(system, "system")}]
    for i, message in enumerate(given):
        messages += _messages(message, f"messages[{i}]")
    tools, must, parallel = _tools(fields)
    thinking = fields.inner("thinking")
    if thinking is not None:
        thinking.only("type", "enabled", "adaptive", "disabled", remedy=THINKING)
        thinking.skip(("budget_tokens", "display"))
        thinking.end()
    given_template = fields.take("chat_template_kwargs", {})
    if not isinstance(given_template, dict):
        raise RequestError("chat_template_kwargs must be an object", "chat_template_kwargs")
    template = dict(given_template)
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        template["continue_final_message"] = True
    stop = fields.take("stop_sequences")
    changes = fields.sampling() | ({} if stop is None else {"stop": stop})
    most = changes.pop("max_tokens", None)
    for name in ("n", "logprobs"):
        fields.refuse(name, changes)
    if most is None and not counting:
        raise RequestError("max_tokens is missing: say how many tokens the answer may have", "max_tokens")
    stream = fields.flag("stream")
    changes |= _form(fields)
    for name in ("container", "context_management", "mcp_servers"):
        fields.only(name, {}, [])
    fields.skip(LABELS)
    fields.end()
    return ChatRequest(
        messages=conversation(messages),
        tools=tools,
        must_call=must,
        parallel=parallel,
        template=template,
        stream=stream,
        params=changed(defaults, changes | {"max_tokens": most}, stop="stop_sequences"),
        parameters=PARAMETERS,
    )


def _form(fields: Fields) -> dict[str, Any]:
    """The sampling parameter of an answer in JSON, if one is asked for: in a field of its own, or in a newer one."""
    config = fields.inner("output_config")
    asked = {"output_format": fields.inner("output_format")}
    asked["output_config.format"] = None if config is None else config.inner("format")
    if config is not None:
        config.end()
    for name, form in asked.items():
        if form is not None:
            form.choice("type", ("json_schema",), "")
            schema = form.take("schema")
            form.end()
            return {"structured_outputs": {"json": schema, "asked_as": name}}
    return {}


def _tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, tuple[str, ...], bool]:
    """Those that may be called, that must be, and whether several at once."""
    given, choice = fields.take("tools", []), fields.inner("tool_choice")
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise RequestError("tools must be a list of objects", "tools")
    for i, tool in enumerate(given):
        if tool.get("type") not in (None, "custom"):
            raise UnsupportedError(
                f"tools[{i}] is of type {tool['type']!r:.40}: only your own tools are taken", "tools"
            )
    functions = [
        {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get(PARAMETERS),
            "strict": tool.get("strict"),
        }
        for tool in given
    ]
    named = [{name: value for name, value in function.items() if value is not None} for function in functions]
    tools = check_tools([{"type": "function", "function": function} for function in named], PARAMETERS)
    if choice is None:
        return tools or None, (), True
    how, name = choice.choice("type", ("auto", "any", "tool", "none"), ""), choice.text("name")
    parallel = not choice.flag("disable_parallel_tool_use")
    choice.end()
    if (how == "tool") != (name is not None):
        raise RequestError("tool_choice: a name goes with type 'tool', and with no other", "tool_choice")
    must = must_call(tools, name) if how in ("any", "tool") else ()
    return (None if how == "none" else tools or None), must, parallel


def _messages(message: Any, where: str) -> list[dict[str, Any]]:
    """A message as chat templates know it: results of tools are messages of their own."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise RequestError(f"{where} must be an object whose role is 'user' or 'assistant'", "messages")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise RequestError(f"{where}.content must be text or a list of blocks", "messages")
    results, texts, calls, thoughts = [], [], [], []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        match block.get("type"):
            case "text":
                texts.append(_text(block, "text", at))
            case "thinking":
                thoughts.append(_text(block, "thinking", at))
            case "redacted_thinking":  # encrypted by whoever served the turn: nobody else can read it
                pass
            case "tool_use":
                name, arguments = _text(block, "name", at), block.get("input", {})
                function = {"name": name, "arguments": json.dumps(arguments)}
                calls.append({"id": _text(block, "id", at), "type": "function", "function": function})
            case "tool_result":
                said = _text_of(block.get("content", ""), at)
                results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", at), "content": said})
            case other:
                raise UnsupportedError(f"{at} is of type {other!r:.40}: only text and tools are supported", "messages")
    own: dict[str, Any] = {"role": message["role"], "content": "\n".join(texts)}
    own |= {"tool_calls": calls} if calls else {}
    own |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return [*results, *([own] if texts or calls or thoughts or not results else [])]


def _text_of(content: Any, where: str) -> str:
    """Of text or blocks of it."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise RequestError.at(where, "must be text or a list of blocks")
    if odd := [block.get("type") for block in blocks if block.get("type") != "text"]:
        raise UnsupportedError.at(where, f"has a block of type {odd[0]!r:.40}: only text is supported")
    return "\n".join(_text(block, "text", where) for block in blocks)


def _text(block: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(value := block.get(name), str):
        raise RequestError.at(where, f"{name} must be text, and is {kind(value)}")
    return value


class MessageWriter(BlockWriter):
    """An answer in Anthropic's form."""

    def __init__(self, name: str, model: str, request_id: str):
        super().__init__()
        self._request_id = request_id
        self._message: Json = {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._content: list[Json] = self._message["content"]

    def start(self, counts: Counts) -> bytes:
        self._message["usage"] = _usage(counts)
        return _event({"type": "message_start", "message": self._message})

    def open(self, kind: Kind) -> bytes:
        empty = {"type": "thinking", "thinking": "", "signature": ""} if kind == "reasoning" else _text_block("")
        self._content.append(empty)
        return self._at({"type": "content_block_start", "content_block": empty})

    def text(self, text: str) -> bytes:
        thinking = self._content[-1]["type"] == "thinking"
        delta = {"type": "thinking_delta", "thinking": text} if thinking else {"type": "text_delta", "text": text}
        return self._at({"type": "content_block_delta", "delta": delta})

    def close(self, kind: Kind, text: str) -> bytes:
        self._content[-1] |= {"thinking" if kind == "reasoning" else "text": text}
        return self._at({"type": "content_block_stop"})

    def call(self, call: Call) -> bytes:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        self._content.append(block)
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        events = self._at({"type": "content_block_start", "content_block": block})
        events += self._at({"type": "content_block_delta", "delta": delta}) + self._at({"type": "content_block_stop"})
        block["input"] = json.loads(call.arguments)
        return events

    def finish(self, ending: Ending, counts: Counts) -> bytes:
        reason = "end_turn" if ending.reason == "stop" else "max_tokens"
        if ending.reason == "stop" and ending.called:
            reason = "tool_use"
        elif isinstance(ending.stop, str):
            reason = "stop_sequence"
        sequence = ending.stop if reason == "stop_sequence" else None
        end = {"stop_reason": reason, "stop_sequence": sequence}
        self._message |= {**end, "usage": _usage(counts)}
        return _event({"type": "message_delta", "delta": end, "usage": _usage(counts)}) + _event(
            {"type": "message_stop"}
        )

    def failed(self, message: str, status: int) -> bytes:
        return _event(message_error(message, status, self._request_id))

    def body(self) -> Json:
        return self._message

    def _at(self, data: Json) -> bytes:
        """An event of the last block."""
        return _event({"type": data["type"], "index": len(self._content) - 1} | data)


def _text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def _event(data: Json) -> bytes:
    return event(data, data["type"])


def _usage(counts: Counts) -> Json:
    """What was in the cache is no input there."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
    }
