"""OpenAI's batch lines: what is understood, what is refused by name, what comes back."""

import json
from typing import Any

import pytest

from jaxinfer import LLM, StructuredOutputsParams
from jaxinfer.batch.openai import response_line
from jaxinfer.batch.parse import Parser
from jaxinfer.batch.row import Ask, Record, Row
from jaxinfer.engine.outputs import NO_METRICS, CompletionOutput, Logprob, RequestOutput, error_output
from jaxinfer.sampling.params import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
GREEDY = SamplingParams(temperature=0, max_tokens=5)


def row(body: Any, url: Any = CHAT, task: str = "generate", options: Any = None, **changed: Any) -> Row:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body} | changed
    line = {name: value for name, value in line.items() if value is not ...}
    parsed = Parser(task, GREEDY, options).parse(Record(3, "rows.jsonl:4", json.dumps(line).encode()))
    assert parsed.openai
    assert parsed.columns == {}
    return parsed


def chat(**body: Any) -> Ask:
    request = row({"model": "gpt", "messages": USER} | body)
    assert request.error is None
    assert request.custom_id == "a"
    return request.ask


def complete(**body: Any) -> Ask:
    request = row({"model": "gpt", "prompt": "hi"} | body, COMPLETIONS)
    assert request.error is None
    return request.ask


def test_response_formats():
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}
    assert chat(response_format=form).params.structured_outputs == StructuredOutputsParams(json={"type": "integer"})
    assert chat(guided_regex="a").params.structured_outputs == StructuredOutputsParams(regex="a")


def test_openais_defaults_and_not_the_checkpoints():
    assert chat() == Ask(messages=USER, params=SamplingParams(temperature=1, max_tokens=None))
    assert complete() == Ask(prompt="hi", params=SamplingParams(temperature=1, max_tokens=16))
    assert chat(temperature=None, n=None, stop=None, tools=None, logprobs=None, max_tokens=None) == chat()


def test_options_of_the_job_go_before_openais_defaults():
    options = {"temperature": 0.5, "max_tokens": 7}
    assert row({"messages": USER}, options=options).ask.params == SamplingParams(**options)
    asked = row({"prompt": "hi", "max_tokens": 8}, COMPLETIONS, options=options).ask
    assert asked.params == SamplingParams(temperature=0.5, max_tokens=8)


def test_the_url_says_which_task_it_is():
    assert row({"prompt": "hi"}, COMPLETIONS, "chat").ask.prompt == "hi"
    assert row({"messages": USER}, CHAT, "chat").ask.messages == USER


def test_parameters():
    both = {"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 7, "stop": ["a", "b"], "presence_penalty": 1}
    both |= {"frequency_penalty": -1, "max_tokens": 9, "top_k": 5, "min_p": 0.1, "ignore_eos": True}
    for asked in (chat(**both, logit_bias={"5": 100}), complete(**both, logit_bias={"5": 100})):
        assert asked.params == SamplingParams(**both, logit_bias={5: 100})
    assert chat(max_completion_tokens=9).params.max_tokens == 9
    assert chat(max_completion_tokens=9, max_tokens=9).params.max_tokens == 9
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).params.logprobs == 5
    assert chat(logprobs=False).params.logprobs is None
    assert complete(logprobs=3).params.logprobs == 3
    assert complete(n=2, best_of=2).params.n == 2


def test_what_asks_for_nothing_is_accepted():
    assert chat(stream=False, response_format={"type": "text"}, tools=[], tool_choice="none", user="u") == chat()
    assert chat(metadata={"a": "b"}, store=True, service_tier="flex", modalities=["text"]) == chat()
    assert complete(echo=False, suffix="", stream=False, best_of=1) == complete()


def test_prompts():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": parts}]
    assert complete(prompt=["hi"]) == complete()
    assert complete(prompt=[1, 2]).prompt == complete(prompt=[[1, 2]]).prompt == [1, 2]


def test_a_body_may_be_json_in_text():
    assert row(json.dumps({"messages": USER})).ask == chat()


def test_other_rows_may_have_such_columns():
    line = {"custom_id": 5, "method": "POST", "url": "x", "body": "x"}
    for columns in (line | {"prompt": "hi"}, line | {"text": "hi"}):
        request = Parser("generate", GREEDY).parse(Record(0, "rows.jsonl:1", columns))
        assert (request.openai, request.error, request.columns) == (False, None, columns)
    request = Parser("generate", GREEDY).parse(Record(0, "rows.jsonl:1", {"url": "x", "body": "of a web page"}))
    assert not request.openai
    assert "has none of prompt" in request.error


BAD: list[tuple[dict[str, Any], str]] = [
    ({"url": "/v1/embeddings"}, "url is '/v1/embeddings': the task generate is for /v1/chat/completions and"),
    ({"url": ...}, "url is None"),
    ({"url": ["x"]}, "url is ['x']"),
    ({"method": "GET"}, "method is 'GET'"),
    ({"method": ...}, "method is None"),
    ({"custom_id": ...}, "custom_id must be text"),
    ({"custom_id": 5}, "custom_id must be text"),
    ({"custom_id": ""}, "custom_id is empty"),
    ({"body": ...}, "body must be an object, and is null"),
    ({"body": []}, "body must be an object, and is a list"),
    ({"body": "hi"}, "body is text, and as JSON it is no good: not JSON"),
    ({"body": {}}, "messages: expected a list"),
    ({"body": {"prompt": "hi", "messages": USER}}, "'prompt' is not supported"),
    ({"body": {"messages": []}}, "messages: the list is empty"),
]
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"stream": True}, "stream is not supported"),
    (
        {"tool_choice": 1, "modalities": 1, "stream": 1, "tools": 1, "suffix": 1},
        "tool_choice is not",
    ),  # always the first
    ({"response_format": {"type": "yaml"}}, "response_format: its type is 'yaml'"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"tool_choice": "auto"}, "tool_choice is not supported"),
    ({"functions": []}, "'functions' is not supported"),
    ({"reasoning_effort": "low"}, "'reasoning_effort' is not supported"),
    ({"echo": True}, "echo is not supported"),
    ({"prompt_logprobs": 1}, "'prompt_logprobs' is not supported"),
    ({"detokenize": False}, "'detokenize' is not supported"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
    ({"max_tokens": [3]}, "max_tokens is [3]"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"logprobs": 3}, "logprobs must be true or false, and is 3"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    ({"logprobs": True, "top_logprobs": "a"}, "top_logprobs is 'a'"),
    ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
    ({"structured_outputs": {"json_object": True, "asked_as": "x"}}, "structured_outputs.asked_as is not supported"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"n": 0}, "n is 0"),
    ({"logit_bias": {"x": 1}}, "logit_bias is {'x': 1}"),
    ({"logit_bias": [1]}, "logit_bias is [1]"),
    ({"user": "\ud800"}, "'body' is not valid Unicode"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": 5}, "prompt must be text"),
    ({"prompt": []}, "prompt is a list of 0"),
    ({"prompt": ["a", "b"]}, "prompt is a list of 2: give one prompt a line"),
    ({"prompt": [[]]}, "prompt must be a list of token ids"),
    ({"prompt": [1, "a"]}, "prompt[1] is 'a'"),
    ({"echo": True}, "echo is not supported"),
    ({"suffix": "x"}, "suffix is not supported"),
    ({"best_of": 3}, "best_of is not supported"),
    ({"logprobs": True}, "logprobs is True"),
    ({"messages": USER}, "'messages' is not supported"),
    ({"top_logprobs": 2}, "'top_logprobs' is not supported"),
]


@pytest.mark.parametrize(("changed", "problem"), BAD)
def test_bad_lines(changed, problem):
    request = row(**{"body": {"messages": USER}} | changed)
    check_refused(request, problem)
    assert request.custom_id == (None if "custom_id" in changed else "a")


@pytest.mark.parametrize(("changed", "problem"), BAD_CHAT)
def test_bad_chats(changed, problem):
    check_refused(row({"messages": USER} | changed), problem)


@pytest.mark.parametrize(("changed", "problem"), BAD_COMPLETIONS)
def test_bad_completions(changed, problem):
    check_refused(row({"prompt": "hi"} | changed, COMPLETIONS), problem)


def check_refused(request: Row, problem: str) -> None:
    assert request.ask is None
    assert request.error.startswith("rows.jsonl:4: ")
    assert problem in request.error
    answer = response_line(request, None, model="m")
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
    assert answer["custom_id"] == request.custom_id
    assert answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"] == {
        "message": request.error,
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


def test_lines_can_not_be_scored():
    assert "and this is score" in row({"messages": USER}, task="score").error


STEPS = [  # the sampled token first; ids 7 and 8 are written alike
    {5: Logprob(-2.0, 3, "hi"), 7: Logprob(-0.5, 1, "ho"), 8: Logprob(-1.5, 2, "ho")},
    {9: Logprob(-0.1, 1, "\ufffd"), 7: Logprob(float("-inf"), 2, "ho")},
]


def output(logprobs: bool = True, n: int = 1) -> RequestOutput:
    completions = [
        CompletionOutput(i, "hi é", [5, 9], "stop" if i == 0 else "length", logprobs=STEPS if logprobs else None)
        for i in range(n)
    ]
    return RequestOutput(0, "x", [1, 2, 3], completions, True, NO_METRICS)


def test_a_chat_comes_back():
    answer = response_line(row({"messages": USER}), output(logprobs=False, n=2), model="tiny")
    body = answer["response"].pop("body")
    digest = answer["id"].removeprefix("batch_req_")
    assert answer == {
        "id": f"batch_req_{digest}",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": f"req_{digest}"},
        "error": None,
    }
    message = {"role": "assistant", "content": "hi é", "refusal": None}
    assert body == {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "message": message, "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def test_a_completion_comes_back():
    answer = response_line(row({"prompt": "hi", "logprobs": 2}, COMPLETIONS), output(), model="tiny")
    body = answer["response"]["body"]
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    logprobs = {
        "tokens": ["hi", "\ufffd"],
        "token_logprobs": [-2.0, -0.1],
        "top_logprobs": [{"hi": -2.0, "ho": -0.5}, {"ho": -9999.0, "\ufffd": -0.1}],
        "text_offset": None,
    }
    assert body["choices"] == [{"index": 0, "text": "hi é", "logprobs": logprobs, "finish_reason": "stop"}]
    json.dumps(answer, allow_nan=False)


def test_logprobs_of_a_chat():
    def content(**body: Any) -> list[Any]:
        request = row({"messages": USER, "logprobs": True} | body)
        return response_line(request, output(), model="m")["response"]["body"]["choices"][0]["logprobs"]["content"]

    hi = {"token": "hi", "logprob": -2.0, "bytes": [104, 105]}
    ho = {"token": "ho", "logprob": -0.5, "bytes": [104, 111]}
    half = {"token": "\ufffd", "logprob": -0.1, "bytes": None}
    never = {"token": "ho", "logprob": -9999.0, "bytes": [104, 111]}
    assert content() == [hi | {"top_logprobs": []}, half | {"top_logprobs": []}]
    assert content(top_logprobs=2) == [
        hi | {"top_logprobs": [ho, ho | {"logprob": -1.5}]},
        half | {"top_logprobs": [half, never]},
    ]


def test_ids_are_the_same_again_and_different_in_every_row():
    def ids(index: int, custom_id: str) -> str:
        return response_line(Row(index, "x", openai=True, error="x", custom_id=custom_id), None, model="m")["id"]

    assert ids(1, "a") == ids(1, "a")
    assert len({ids(1, "a"), ids(2, "a"), ids(1, "b")}) == 3


def test_what_can_not_be_served_comes_back_as_an_error():
    answer = response_line(row({"messages": USER}), error_output(0, "too long"), model="m")
    assert answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["message"] == "too long"


@pytest.mark.slow
def test_lines_through_a_model(checkpoints):
    lines = [
        row({"messages": USER, "temperature": 0, "logprobs": True, "max_tokens": 8}),
        row({"prompt": "hi", "logprobs": 2, "n": 2, "seed": 1, "stop": ["e"]}, COMPLETIONS),
    ]
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        asks = [line.ask for line in lines]
        prompts = [llm.chat_prompt(ask.messages) if ask.messages else ask.prompt for ask in asks]
        outputs = llm.generate(prompts, [ask.params for ask in asks])
    bodies = [response_line(*pair, model="m")["response"]["body"] for pair in zip(lines, outputs, strict=True)]
    json.dumps(bodies, allow_nan=False)
    (choice,) = bodies[0]["choices"]
    assert choice["message"]["content"] == outputs[0].outputs[0].text
    assert len(choice["logprobs"]["content"]) == bodies[0]["usage"]["completion_tokens"]
    for choice, completion in zip(bodies[1]["choices"], outputs[1].outputs, strict=True):
        assert choice["text"] == completion.text
        logprobs = choice["logprobs"]
        lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs")}
        assert lengths == {len(completion.token_ids)}
