"""Calls of tools and reasoning through the server: the model's text is given, all else is real."""

import json
import re
from functools import partial
from unittest.mock import Mock

import anthropic
import httpx2 as httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from jaxinfer.errors import EngineClosed, QueueFullError
from jaxinfer.openai.errors import ServerError
from tests.server.conftest import OPTIONS  # noqa: F401

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{%- for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments }}</tool_call>{% endfor %}\n{% endfor %}{{ tools|length if tools }}"
    "{%- if add_generation_prompt %}assistant:<think>{% endif %}"
)
END = "@@"


class Scripted:
    """In place of a detokenizer: a character of the text for each token."""

    text = ""

    def __init__(self, *_):
        self.rest = iter(self.text + END)

    def push(self, ids):
        return "".join(next(self.rest, "") for _ in ids)

    def finish(self):
        return ""


@pytest.fixture
def says(served_llm, monkeypatch):
    """Makes the model say something."""
    monkeypatch.setattr("jaxinfer.engine.generation.Detokenizer", Scripted)
    monkeypatch.setitem(served_llm.tokenizer.chat_templates.templates, "default", TEMPLATE)

    def say(text):
        monkeypatch.setattr(Scripted, "text", text)

    return say


SAID = 'hm</think>\n\nlook:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Li\\u00e8ge"}}\n</tool_call>'
ASKED = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 140, "stop": [END]}
ASKED |= {"extra_body": {"ignore_eos": True}}


def test_a_call_streamed_or_not(serve, says):
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as ai:
        says(SAID)
        choice = ai.chat.completions.create(**ASKED).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "look:")
        assert choice.message.reasoning == choice.message.reasoning_content == "hm"
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Liège"}
        with ai.chat.completions.stream(**ASKED) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion().choices[0]
        assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "look:")
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
        assert streamed.message.tool_calls[0].id != call.id
        # What it said is understood when it comes back.
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        says("so</think>It rains.")
        again = ASKED | {"messages": [*MESSAGES, choice.message.model_dump(), result]}
        choice = ai.chat.completions.create(**again).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "It rains.", None)
        says(SAID)
        choice = ai.chat.completions.create(**ASKED | {"tool_choice": "none"}).choices[0]
        assert choice.message.tool_calls is None
        assert "<tool_call>" in choice.message.content
        choice = ai.chat.completions.create(**ASKED | {"max_tokens": 60}).choices[0]
        assert (choice.finish_reason, choice.message.tool_calls, choice.message.content) == ("length", None, "look:")


def test_anthropics_client(serve, says):
    tools = [{"name": "weather", "input_schema": TOOLS[0]["function"]["parameters"]}]
    asked = {"model": "tiny", "messages": MESSAGES, "tools": tools, "max_tokens": 130, "stop_sequences": [END]}
    asked |= {"system": [{"type": "text", "text": "be brief"}], "extra_body": {"ignore_eos": True}}
    says(SAID)
    with anthropic.Anthropic(base_url=serve().url, api_key="none", max_retries=0) as ai:
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            ai.messages.create(**asked | {"max_tokens": 1000})
        message = ai.messages.create(**asked)
        thinking, text, call = message.content
        assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "look:", "weather", {"city": "Liège"})
        with ai.messages.stream(**asked) as stream:
            events = list(stream)
            streamed = stream.get_final_message()
        assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
        assert streamed.content[2].input == call.input
        assert streamed.stop_reason == message.stop_reason == "tool_use"
        assert events[0].message.usage.cache_read_input_tokens > 0
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
        again = [*MESSAGES, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        assert ai.messages.create(**asked | {"messages": again, "max_tokens": 5}).stop_reason == "max_tokens"
        count = ai.messages.count_tokens(model="tiny", messages=again, tools=tools, system=asked["system"])
        assert count.input_tokens > 20


def test_anthropics_errors(serve, monkeypatch):
    """By the class that its client raises, and the type that it then has."""
    server = serve(api_keys=("mine-alone",), max_body_bytes=2000)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    with anthropic.Anthropic(base_url=server.url, api_key="mine-alone", max_retries=0) as ai:
        post, counted = ai.messages.create, ai.messages.count_tokens
        plain = {"extra_headers": {"content-type": "text/plain"}}
        large = [*MESSAGES, {"role": "user", "content": "a" * 2000}]
        cases = [
            (anthropic.AuthenticationError, "authentication_error", ai.with_options(api_key="x").messages.create, {}),
            (anthropic.BadRequestError, "invalid_request_error", post, {"max_tokens": -1}),
            (anthropic.NotFoundError, "not_found_error", post, {"model": "none"}),
            (anthropic.RequestTooLargeError, "request_too_large", post, {"messages": large}),
            (anthropic.APIStatusError, "invalid_request_error", post, plain),
            (anthropic.NotFoundError, "not_found_error", lambda **_: ai.get("/v1/messages/x", cast_to=object), {}),
            (anthropic.APIStatusError, "invalid_request_error", lambda **_: ai.get("/v1/messages", cast_to=object), {}),
        ]
        raised = [
            (anthropic.InternalServerError, "api_error", RuntimeError("secret")),
            (anthropic.RateLimitError, "rate_limit_error", QueueFullError("full")),
            (anthropic.PermissionDeniedError, "permission_error", ServerError(403, "no")),
            (anthropic.RequestTimeoutError, "timeout_error", ServerError(408, "late")),
            (anthropic.ServiceUnavailableError, "overloaded_error", EngineClosed("gone")),
        ]

        def fail(error, **_):
            with monkeypatch.context() as patch:
                patch.setattr(server._service, "model", Mock(side_effect=error))
                counted(model="tiny", messages=MESSAGES)

        cases += [(kind, name, partial(fail, error), {}) for kind, name, error in raised]
        for kind, name, call, changed in cases:
            with pytest.raises(kind) as caught:
                call(**asked | changed)
            error = caught.value
            assert error.type == name
            assert error.body["request_id"] == error.request_id
            assert "secret" not in str(error)


def test_responses(serve, says):
    tools = [{"type": "function"} | TOOLS[0]["function"]]
    asked = {"model": "tiny", "input": "hello", "tools": tools, "max_output_tokens": 140, "instructions": "be brief"}
    asked |= {"extra_body": {"stop": [END], "ignore_eos": True}}
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as ai:
        says(SAID)
        response = ai.responses.create(**asked)
        assert response.status == "completed"
        reasoning, message, call = response.output
        assert (reasoning.content[0].text, message.content[0].text) == ("hm", "look:")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Liège"})
        events = list(ai.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        final = events[-1].response
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        added = [event.item.id for event in events if event.type == "response.output_item.added"]
        assert added == [item.id for item in final.output]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "look:"
        with ai.responses.stream(**asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_response().output_text == "look:"
        says("</think>It rains.")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        items = [{"role": "user", "content": "hello"}, *(item.model_dump() for item in response.output), output]
        assert ai.responses.create(**asked | {"input": items, "max_output_tokens": 60}).output_text == "It rains."
        cut = ai.responses.create(**asked | {"max_output_tokens": 3})
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        with pytest.raises(openai.BadRequestError, match="nothing is stored"):
            ai.responses.create(**asked, previous_response_id="resp_1")


# What Open Responses requires of a response, and of its tools: https://www.openresponses.org
RESPONSE = """id object created_at completed_at status incomplete_details model previous_response_id instructions output
    error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs
    temperature reasoning usage max_output_tokens max_tool_calls store background service_tier metadata
    safety_identifier prompt_cache_key"""
TOOL = {"type", "name", "description", "parameters", "strict"}
PART = "content_part.added( (?:output|reasoning)_text.delta)+ (?:output|reasoning)_text.done content_part.done"
CALL = "function_call_arguments.delta function_call_arguments.done"
ORDER = f"created in_progress( output_item.added (?:{PART}|{CALL}) output_item.done)* (completed|incomplete)"


@pytest.mark.parametrize("most", [20, 140])
def test_responses_are_whole_and_events_in_order(serve, says, most):
    """By the types of OpenAI's client, which checks nothing of what comes, and by Open Responses' lists."""
    says(SAID)
    body = {"model": "tiny", "input": "hello", "tools": [{"type": "function", "name": "weather"}], "stop": [END]}
    body |= {"max_output_tokens": most, "ignore_eos": True}
    with httpx.Client(base_url=serve().url, timeout=60) as client:
        whole = client.post("/v1/responses", json=body).json()
        frames = client.post("/v1/responses", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(frame.partition("data: ")[2]) for frame in frames if frame]
    assert re.fullmatch(ORDER, " ".join(event["type"].removeprefix("response.") for event in events))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    for response in (whole, *(event["response"] for event in events if "response" in event)):
        Response.model_validate(response)
        assert response.keys() >= set(RESPONSE.split())
        assert all(tool.keys() == TOOL for tool in response["tools"])
    assert [item["type"] for item in events[-1]["response"]["output"]] == [item["type"] for item in whole["output"]]
