"""Answers in a form that is asked for, and calls that must come, of a random model."""

import dataclasses
import json
from pathlib import Path

import anthropic
import jsonschema
import openai
import pytest

from jaxinfer.text.formats import TOOLS as TOOLS_OF
from tests.server.conftest import OPTIONS  # noqa: F401
from tests.server.test_calls import MESSAGES, TEMPLATE

CLOSED = {"additionalProperties": False}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]} | CLOSED
TIME = {
    "type": "object",
    "properties": {"now": {"type": "boolean"}},
    "required": ["now"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("weather", CITY), ("time", TIME))
]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "temperature": 1.5, "seed": 3}
PLAIN = TEMPLATE.replace("<think>", "<think></think>")  # the reasoning is over


@pytest.fixture(autouse=True)
def template(served_llm, monkeypatch):
    monkeypatch.setitem(served_llm.tokenizer.chat_templates.templates, "default", PLAIN)


def good(name, arguments):
    value = json.loads(arguments)
    assert value["city"] in ("Rome", "Oslo") if name == "weather" else isinstance(value["now"], bool)


def test_calls_that_must_come(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as ai:
        for seed in range(3):
            asked = ASKED | {"tools": TOOLS, "seed": seed, "parallel_tool_calls": False}
            choice = ai.chat.completions.create(**asked, tool_choice="required").choices[0]
            (call,) = choice.message.tool_calls
            good(call.function.name, call.function.arguments)
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            with ai.chat.completions.stream(**asked, tool_choice="required") as stream:
                for _ in stream:
                    pass
                (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
            assert streamed.function.arguments == call.function.arguments
        named = {"type": "function", "function": {"name": "time"}}
        (call,) = ai.chat.completions.create(**asked, tool_choice=named).choices[0].message.tool_calls
        assert call.function.name == "time"
        good("time", call.function.arguments)
        answer = ai.chat.completions.create(**asked, tool_choice=named, response_format={"type": "json_object"})
        assert answer.choices[0].message.tool_calls[0].function.name == "time"
        tools = [{"type": "function"} | tool["function"] for tool in TOOLS]
        response = ai.responses.create(
            model="tiny", input="hello", tools=tools, tool_choice="required", max_output_tokens=120
        )
        good(response.output[0].name, response.output[0].arguments)
    tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as ai:
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "tools": tools}
        message = ai.messages.create(**asked, tool_choice={"type": "tool", "name": "weather"})
        assert (message.stop_reason, message.content[0].name) == ("tool_use", "weather")
        assert message.content[0].input["city"] in ("Rome", "Oslo")
        assert ai.messages.create(**asked, tool_choice={"type": "any"}).content[0].type == "tool_use"


def test_calls_with_shared_schemas(client):
    """As pydantic writes nested models: a pointer begins at the tool's own schema."""
    schema = {"type": "object", "properties": {"where": {"$ref": "#/$defs/City"}}, "required": ["where"]} | CLOSED
    tools = [{"type": "function", "function": {"name": "go", "parameters": schema | {"$defs": {"City": CITY}}}}]
    asked = ASKED | {"tools": [*TOOLS, *tools], "max_tokens": 200, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "go"}}):
        answer = client.post("/v1/chat/completions", json=asked | {"tool_choice": choice})
        assert answer.status_code == 200, answer.text
        for call in answer.json()["choices"][0]["message"]["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            good(*("weather", json.dumps(json.loads(arguments)["where"])) if name == "go" else (name, arguments))


@pytest.mark.parametrize("route", ["chat", "responses", "anthropic"])
def test_strict_tools(client, served_llm, monkeypatch, route):
    """The model may call one, and one that it calls has arguments of the schema. Here it begins with the marker, as it
    is asked to, and no tool that isn't strict is held to more than its name."""
    section = dataclasses.replace(TOOLS_OF["hermes"][0], opens="@", closes=("#",))
    monkeypatch.setitem(TOOLS_OF, "hermes", (section,))
    monkeypatch.setitem(served_llm.tokenizer.chat_templates.templates, "default", PLAIN + "{# new #}")
    (at,) = served_llm.tokenizer.encode("@", False)

    def calls(strict, parallel=True):
        functions = [tool["function"] | ({"strict": True} if strict else {}) for tool in TOOLS]
        asked = {"model": "tiny", "temperature": 1.5, "seed": 5, "logit_bias": {str(at): 100}}
        if route == "chat":
            tools = [{"type": "function", "function": function} for function in functions]
            body = asked | {"messages": MESSAGES, "tools": tools, "max_tokens": 200, "parallel_tool_calls": parallel}
            message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            found = [call["function"] for call in message.get("tool_calls", [])]
        elif route == "responses":
            tools = [{"type": "function"} | function for function in functions]
            body = asked | {"input": "hello", "tools": tools, "max_output_tokens": 200, "parallel_tool_calls": parallel}
            answer = client.post("/v1/responses", json=body).json()
            found = [item for item in answer["output"] if item["type"] == "function_call"]
        else:
            tools = [
                {"name": function["name"], "input_schema": function["parameters"], "strict": function.get("strict")}
                for function in functions
            ]
            choice = {"type": "auto", "disable_parallel_tool_use": not parallel}
            body = asked | {"messages": MESSAGES, "tools": tools, "max_tokens": 200, "tool_choice": choice}
            answer = client.post("/v1/messages", json=body).json()
            blocks = [block for block in answer["content"] if block["type"] == "tool_use"]
            found = [{"name": block["name"], "arguments": json.dumps(block["input"])} for block in blocks]
        return [(call["name"], call["arguments"]) for call in found]

    several = calls(True)
    assert len(several) > 1
    for call in several:
        good(*call)
    assert len(calls(True, parallel=False)) == 1
    assert calls(False) == []


def test_forms(server, client, served_llm):
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as ai:
        text = ai.chat.completions.create(**ASKED, response_format=schema).choices[0].message.content
        good("weather", text)
        # With tools beside it, a call may come instead, in the model's own way, which is not made here.
        (brace,), (angle,) = (served_llm.tokenizer.encode(text, False) for text in "{<")
        for token, formed in ((brace, True), (angle, False)):
            choice = ai.chat.completions.create(
                **ASKED | {"logit_bias": {str(token): 100}}, response_format=schema, tools=TOOLS
            ).choices[0]
            if formed:
                good("weather", choice.message.content)
            else:
                assert (choice.finish_reason, choice.message.content) == ("length", "")
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 40}
        for body in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
            assert ai.completions.create(**asked, extra_body=body).choices[0].text in ("yes", "no")
        form = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
        response = ai.responses.create(model="tiny", input="hello", text=form, max_output_tokens=120)
        good("weather", response.output_text)
        assert response.text.format.schema_ == CITY
        assert response.text.format.model_fields_set >= {"name", "description", "strict"}  # as Open Responses has it
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120}
    for form in ({"output_format": schema}, {"output_config": {"format": schema}}):
        (kind,) = form
        inner = {"type": "json_schema", "schema": CITY}
        answer = client.post(
            "/v1/messages", json=body | {kind: inner if kind == "output_format" else {"format": inner}}
        )
        assert answer.status_code == 200, answer.text
        good("weather", answer.json()["content"][0]["text"])
    answer = client.post("/v1/messages", json=body | {"output_config": {"effort": "low"}})
    assert (answer.status_code, "effort" in answer.text) == (400, True)


FAULTY = {"type": "object", "properties": {"a": {"not": {}}}}
CYCLE = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}
FORM = {"type": "json_schema", "name": "a", "schema": FAULTY}


def functions(schema, **more):
    return [tool["function"] | more for tool in TOOLS] + [{"name": "third", "parameters": schema} | more]


def tools(schema, **more):
    return [{"type": "function", "function": function} for function in functions(schema, **more)]


NAMED = {
    "required": ("chat/completions", {"tools": tools(FAULTY), "tool_choice": "required"}),
    "cycle": ("chat/completions", {"tools": tools(CYCLE), "tool_choice": "required"}),
    "strict": ("chat/completions", {"tools": tools(FAULTY, strict=True)}),
    "strict cycle": ("chat/completions", {"tools": tools(CYCLE, strict=True)}),
    "form": ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": FORM}}),
    "response": ("responses", {"text": {"format": FORM}}),
    "response's tool": (
        "responses",
        {"tools": [{"type": "function"} | own for own in functions(FAULTY)], "tool_choice": "required"},
    ),
    "array": ("responses", {"tools": [{"type": "function"} | own for own in functions({"type": "array"})]}),
    "message": ("messages", {"output_config": {"format": {"type": "json_schema", "schema": FAULTY}}}),
    "message's tool": (
        "messages",
        {
            "tools": [{"name": own["name"], "input_schema": own["parameters"]} for own in functions(FAULTY)],
            "tool_choice": {"type": "any"},
        },
    ),
}
PLACES = {
    "required": "tools[2].function.parameters: Unimplemented",
    "cycle": "tools[2].function.parameters: $ref: #/properties/a -> ",
    "strict": "tools[2].function.parameters: Unimplemented",
    "strict cycle": "tools[2].function.parameters: $ref: #/properties/a -> ",
    "form": "response_format: Unimplemented",
    "response": "text.format: Unimplemented",
    "response's tool": "tools[2].parameters: Unimplemented",
    "array": "tools[2].parameters.type is 'array'",
    "message": "output_config.format: Unimplemented",
    "message's tool": "tools[2].input_schema: Unimplemented",
}


@pytest.mark.parametrize("asked", NAMED)
@pytest.mark.parametrize("reasons", [False, True])
def test_errors_name_what_was_asked(client, served_llm, monkeypatch, asked, reasons):
    """In the words of the API, whether the model reasons first or not."""
    monkeypatch.setitem(served_llm.tokenizer.chat_templates.templates, "default", TEMPLATE if reasons else PLAIN)
    path, body = NAMED[asked]
    given = {"input": "hello"} if path == "responses" else {"messages": MESSAGES, "max_tokens": 9}
    answer = client.post(f"/v1/{path}", json={"model": "tiny"} | given | body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["message"].startswith(PLACES[asked])
    if path != "messages":
        assert error["param"] == PLACES[asked].partition(":")[0].split("[")[0].split(".")[0]


def test_after_the_reasoning(server, served_llm, monkeypatch):
    """A random model does not stop to think: what it writes before is free."""
    templates = served_llm.tokenizer.chat_templates.templates
    monkeypatch.setitem(templates, "default", TEMPLATE)
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as ai:
        message = ai.chat.completions.create(**ASKED, response_format=schema).choices[0].message
        assert message.content in (None, "")
        assert message.reasoning
        monkeypatch.setitem(templates, "default", TEMPLATE.replace("<think>", "<|channel|>"))
        with pytest.raises(openai.BadRequestError, match="writes channels"):
            ai.chat.completions.create(**ASKED, response_format=schema)


AGENTS = [json.loads(line) for line in (Path(__file__).parent / "agents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sent", AGENTS, ids=lambda sent: sent["client"].split()[0])
def test_what_agents_send(client, sent):
    """Bodies as these clients sent them in turns with tools, and forms of answers."""
    responses = sent["path"] == "/v1/responses"
    body = sent["body"] | {"model": "tiny", "temperature": 1.5, "seed": 3}
    answer = client.post(sent["path"], json=body | {"max_output_tokens" if responses else "max_completion_tokens": 90})
    text = answer.text
    assert answer.status_code == 200, text
    if body.get("stream"):
        *_, last = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
        assert "error" not in last
        assert last["type"] in ("response.completed", "response.incomplete") if responses else last["object"]
        return
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        items = json.loads(text)["output"] if responses else json.loads(text)["choices"][0]["message"]["tool_calls"]
        (call,) = items if responses else [item["function"] for item in items]
        tool = body["tools"][0] if responses else body["tools"][0]["function"]
        jsonschema.validate(json.loads(call["arguments"]), tool["parameters"])
