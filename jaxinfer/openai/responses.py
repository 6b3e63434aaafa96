"""OpenAI's responses, without a store. Format: https://platform.openai.com/docs/api-reference/responses and
https://www.openresponses.org"""

from __future__ import annotations

import time
from typing import Any

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.openai.answers import Json, event
from jaxinfer.openai.blocks import BlockWriter, Counts, Ending
from jaxinfer.openai.fields import Fields, changed, kind, shown
from jaxinfer.openai.requests import ChatRequest, check_tools, conversation, must_call, with_salt
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.calls import Call
from jaxinfer.text.scanner import Kind

LABELS = ("model", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
FUNCTION = ("name", "description", "parameters", "strict")
PARAMETERS = "parameters"  # of a tool, which is its function itself
STORED = "nothing is stored here: give the whole conversation as input"


def response_request(fields: Fields, defaults: SamplingParams) -> ChatRequest:
    """What is asked for. Raises RequestError."""
    given, instructions = fields.take("input"), fields.text("instructions")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    messages += _messages(given)
    listed = fields.take("tools", [])
    tools = _tools(listed)
    choice = fields.take("tool_choice", "auto")
    must: tuple[str, ...] = ()
    if choice not in ("auto", "none"):
        named = isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str)
        if choice != "required" and not named:
            problem = f"tool_choice is {shown(choice)}: it must be 'none', 'auto', 'required' or a function's name"
            raise UnsupportedError(problem, "tool_choice")
        must = must_call(tools, choice["name"] if named else None)
    parallel = fields.flag("parallel_tool_calls", True)
    template: dict[str, Any] = {}
    reasoning = fields.inner("reasoning")
    effort = None
    if reasoning is not None:
        effort = reasoning.text("effort")
        template |= {} if effort is None else {"reasoning_effort": effort}
        reasoning.only("summary", "auto", remedy="reasoning comes as it is")
        reasoning.end()
    text, given_form = fields.inner("text"), None
    if text is not None:
        given_form = text.inner("format")
        text.skip(("verbosity",))
        text.end()
    form, shape = _form(given_form or Fields({}))
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.only(name, remedy=STORED)
    fields.only("background", False)
    fields.only("truncation", "disabled")
    fields.only("include", [], ["reasoning.encrypted_content"])
    fields.only("top_logprobs", 0)
    options = fields.inner("stream_options")
    if options is not None:
        options.only("include_obfuscation", True, False)
        options.end()
    stream, metadata = fields.flag("stream"), fields.take("metadata", {})
    most, salt = fields.take("max_output_tokens"), with_salt(fields.text("cache_salt"))
    changes = fields.sampling()
    for name in ("n", "logprobs", "max_tokens"):
        fields.refuse(name, changes)
    params = changed(defaults, changes | shape | {"max_tokens": most}, max_tokens="max_output_tokens")
    fields.skip(LABELS)
    fields.end()
    repeated = {
        "instructions": instructions,
        "text": {"format": form},
        "max_output_tokens": most,
        "max_tool_calls": None,
        "metadata": metadata,
        "parallel_tool_calls": parallel,
        "reasoning": {"effort": effort, "summary": None},
        "temperature": params.temperature,
        "tool_choice": choice,
        "tools": [dict.fromkeys(FUNCTION) | tool for tool in listed],
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
    }
    return ChatRequest(
        messages=conversation(messages),
        tools=tools if choice != "none" and tools else None,
        must_call=must,
        parallel=parallel,
        template=template,
        stream=stream,
        params=params,
        cache_salt=salt,
        repeated=repeated,
        parameters=PARAMETERS,
    )


def _form(fields: Fields) -> tuple[Json, dict[str, Any]]:
    """What the answer is to look like, whole, and the sampling parameter of it, if there is one: completions have the
    schema a level deeper."""
    kind = fields.choice("type", ("text", "json_object", "json_schema"), "text")
    form: Json = {"type": kind}
    if kind == "json_schema":
        form |= {"name": fields.text("name", ""), "description": fields.text("description")}
        form |= {"schema": fields.take("schema"), "strict": fields.flag("strict")}
    fields.end()
    if kind == "text":
        return form, {}
    asked = {"json": form.get("schema")} if kind == "json_schema" else {"json_object": True}
    return form, {"structured_outputs": {**asked, "asked_as": "text.format"}}


def _tools(listed: Any) -> list[dict[str, Any]]:
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise RequestError("tools must be a list of objects", "tools")
    functions = [{name: tool[name] for name in FUNCTION if tool.get(name) is not None} for tool in listed]
    return check_tools(
        [{"type": tool.get("type"), "function": function} for tool, function in zip(listed, functions, strict=True)],
        PARAMETERS,
    )


def _messages(given: Any) -> list[dict[str, Any]]:
    """Items as messages: calls and reasoning belong to the assistant's that they are next to."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError(f"input must be text or a list of items, and is {kind(given)}", "input")
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise RequestError(f"{where} must be an object, and is {kind(item)}", "input")
        match item.get("type", "message"):
            case "message":
                message = {"role": item.get("role"), "content": item.get("content")}
                if reasoning and item.get("role") == "assistant":
                    message, reasoning = message | {"reasoning_content": reasoning}, ""
                messages.append(message)
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                texts = [part.get("text") for part in parts if isinstance(part, dict)]
                reasoning = "\n".join(text for text in texts if isinstance(text, str))
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                    messages[-1] |= {"reasoning_content": reasoning} if reasoning else {}
                    reasoning = ""
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            case other:
                raise UnsupportedError(f"{where} is of type {other!r:.40}, which is not supported", "input")
    return messages


class ResponseWriter(BlockWriter):
    """An answer in the form of a response."""

    def __init__(self, name: str, model: str, repeated: Json):
        super().__init__()
        self._name = name
        self._number = -1
        self._output: list[Json] = []
        self._response: Json = {
            "id": f"resp_{name}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "previous_response_id": None,
            "prompt_cache_key": None,
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}},
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": None,
            **repeated,
        }

    def start(self, counts: Counts) -> bytes:
        created = self._event("response.created", response=self._response)
        return created + self._event("response.in_progress", response=self._response)

    def open(self, kind: Kind) -> bytes:
        if kind == "reasoning":
            item: Json = {"type": "reasoning", "summary": [], "content": []}
        else:
            item = {"type": "message", "role": "assistant", "content": []}
        added = self._added(item)
        return added + self._of_part("response.content_part.added", part=_part(kind, ""))

    def text(self, text: str) -> bytes:
        if self._output[-1]["type"] == "reasoning":
            return self._of_part("response.reasoning_text.delta", delta=text)
        return self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def close(self, kind: Kind, text: str) -> bytes:
        if kind == "reasoning":
            done = self._of_part("response.reasoning_text.done", text=text)
        else:
            done = self._of_part("response.output_text.done", text=text, logprobs=[])
        done += self._of_part("response.content_part.done", part=_part(kind, text))
        return done + self._done(content=[_part(kind, text)])

    def call(self, call: Call) -> bytes:
        item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        events = self._added(item)
        events += self._of_item("response.function_call_arguments.delta", delta=call.arguments)
        events += self._of_item("response.function_call_arguments.done", arguments=call.arguments, name=call.name)
        return events + self._done(arguments=call.arguments)

    def finish(self, ending: Ending, counts: Counts) -> bytes:
        complete = ending.reason == "stop"
        reason = "max_output_tokens" if ending.reason == "length" else "content_filter"
        self._response |= {
            "status": "completed" if complete else "incomplete",
            "completed_at": int(time.time()) if complete else None,
            "incomplete_details": None if complete else {"reason": reason},
            "output": self._output,
            "usage": {
                "input_tokens": counts.prompt,
                "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
                "output_tokens": counts.completion,
                "output_tokens_details": {"reasoning_tokens": counts.reasoning},
                "total_tokens": counts.prompt + counts.completion,
            },
        }
        return self._event(f"response.{self._response['status']}", response=self._response)

    def failed(self, message: str, status: int) -> bytes:
        code = "server_error" if status >= 500 else "invalid_prompt"  # of what has begun
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}
        return self._event("response.failed", response=self._response)

    def body(self) -> Json:
        return self._response

    def _added(self, item: Json) -> bytes:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[item["type"]]
        item |= {"id": f"{prefix}_{self._name}_{len(self._output)}", "status": "in_progress"}
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _done(self, **fields: Any) -> bytes:
        self._output[-1] |= {"status": "completed"} | fields
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, **fields)

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number} | fields, kind)


def _part(kind: Kind, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
