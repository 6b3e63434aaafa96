"""Rows: every form, everything that can be wrong with one, and never an exception."""

import datetime
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batch.parse import Parser
from jaxinfer.batch.row import Ask, Record, Row
from jaxinfer.sampling.params import SamplingParams
from tests.refusals import line

GREEDY = SamplingParams(temperature=0, max_tokens=5)
USER = [{"role": "user", "content": "hi"}]
PARSERS = {task: Parser(task, GREEDY) for task in ("generate", "chat", "score")}


def parse(value: Any, task: str = "generate", **options: Any) -> Row:
    """The row of columns, or of a line of JSON."""
    value = value.encode() if isinstance(value, str) else value
    parser = Parser(task, GREEDY, **options) if options else PARSERS[task]
    row = parser.parse(Record(7, "rows.jsonl:9", value))
    assert (row.index, row.where) == (7, "rows.jsonl:9")
    assert (row.ask is None) == (row.error is not None)
    json.dumps(row.columns, ensure_ascii=False).encode()  # can be written
    return row


def ask(value: Any, task: str = "generate", **options: Any) -> Ask:
    row = parse(value, task, **options)
    assert row.error is None
    return row.ask


def error(value: Any, task: str = "generate", **options: Any) -> str:
    """Why a row is none: one line that begins with where it is."""
    text = parse(value, task, **options).error
    assert text.startswith("rows.jsonl:9: ")
    assert "\n" not in text
    assert len(text) < 350
    return text.removeprefix("rows.jsonl:9: ")


def test_forms_of_generate():
    assert ask({"prompt": "hi"}) == ask({"text": "hi"}) == ask('{"prompt": "hi"}') == Ask(prompt="hi", params=GREEDY)
    assert ask({"prompt_token_ids": [1, 2]}) == Ask(prompt=[1, 2], params=GREEDY)
    assert ask({"prompt": "hi", "messages": None, "text": None, "continuation": "x", "tools": 3}).prompt == "hi"


def test_forms_of_chat():
    assert ask({"messages": USER}, "chat") == Ask(messages=USER, params=GREEDY)
    assert ask({"prompt": "hi"}, "chat") == ask({"text": "hi"}, "chat") == Ask(messages=USER, params=GREEDY)
    tool = {"type": "function", "function": {"name": "f"}}
    assert ask({"messages": USER, "tools": [tool]}, "chat").tools == [tool]
    assert ask({"messages": USER, "tools": []}, "chat").tools is None


def test_forms_of_score():
    assert ask({"text": "hi"}, "score") == Ask(prompt="hi")
    assert ask({"prompt_token_ids": [1, 2]}, "score") == Ask(prompt=[1, 2])
    assert ask({"prompt": "a", "continuation": " b"}, "score") == Ask(prompt="a", continuation=" b")
    assert ask({"prompt": "", "continuation": "b"}, "score") == Ask(prompt="", continuation="b")


def test_all_columns_are_carried():
    row = {"id": 1, "prompt": "hi", "seed": "a column", "nested": {"a": [None, 1.5, True]}, "é": "é"}
    assert parse(row).columns == row
    assert parse(json.dumps(row)).columns == row
    assert ask(row).params == GREEDY  # seed is not a parameter there
    assert parse({"id": 1, "prompt": 2}).columns == {"id": 1, "prompt": 2}  # nor lost with an error


def test_columns_that_json_does_not_have():
    row = {
        "prompt": "hi",
        "bytes": b"\xff\x00",
        "time": datetime.datetime(2020, 1, 2, 3),
        "price": Decimal("1.50"),
        "map": [("a", 1)],
        "nan": float("nan"),
        "deep": {1: (datetime.date(2020, 1, 2),)},
    }
    columns = parse(row).columns
    assert columns.pop("nan") != 0
    assert columns == {
        "prompt": "hi",
        "bytes": "/wA=",
        "time": "2020-01-02 03:00:00",
        "price": "1.50",
        "map": [["a", 1]],
        "deep": {"1": ["2020-01-02"]},
    }
    assert "'prompt' is binary" in error({"prompt": b"hi"})
    assert "'x' is binary" in error({"x": b"hi"}, prompt_template="{x}")


def test_own_parameters():
    own = {"max_tokens": 9, "logit_bias": {"17": 2.5}, "stop": ["a"], "seed": None}
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={17: 2.5}, stop=["a"])
    for name in ("params", "sampling_params"):
        for value in (own, json.dumps(own)):
            assert ask({"prompt": "hi", name: value}).params == params
    for value in ({}, "", " ", None, {"max_tokens": None}):
        assert ask({"prompt": "hi", "params": value}).params == GREEDY
    theirs = {"max_new_tokens": 9, "stop_strings": ["a"], "temp": 0, "logit_bias": {"17": 2.5}}
    assert ask({"prompt": "hi", "params": theirs}).params == params
    # Who asks for a filter asks for sampling, as on the command line.
    assert ask({"prompt": "hi", "params": {"top_p": 0.5}}).params.temperature == 1


def test_options_of_the_job_go_before_defaults_and_after_the_row():
    options = {"temperature": 0.5, "max_tokens": 3}
    assert ask({"prompt": "hi"}, options=options).params == SamplingParams(**options)
    row = {"prompt": "hi", "params": {"max_tokens": 4}}
    assert ask(row, options=options).params == SamplingParams(temperature=0.5, max_tokens=4)


def test_lists_and_objects_may_be_json_in_text():
    """As in CSV, where a column that a row does not have is empty."""
    csv = {"prompt": "", "messages": json.dumps(USER), "tools": "", "params": '{"max_tokens": 9}', "text": ""}
    asked = ask(csv, "chat")
    assert (asked.messages, asked.tools, asked.params.max_tokens) == (USER, None, 9)
    assert ask({"prompt_token_ids": "[1, 2]"}).prompt == [1, 2]
    assert ask({"text": "x", "prompt": "", "continuation": ""}, "score") == Ask(prompt="x")


def test_prompt_templates():
    row = {"a": "x", "n": 3, "prompt": "not this", "messages": 5, "custom_id": "", "url": "", "body": ""}
    assert ask(row, prompt_template="{{{a}}} {n}") == Ask(prompt="{x} 3", params=GREEDY)
    assert ask(row, "chat", prompt_template="{a}").messages == [{"role": "user", "content": "x"}]
    assert ask(row, "score", prompt_template="{a}") == Ask(prompt="x")
    assert ask(row | {"continuation": "y"}, "score", prompt_template="{a}") == Ask(prompt="x", continuation="y")
    assert parse(row, prompt_template="{a}").columns == row
    assert "'b' of the prompt template is not there" in error(row, prompt_template="{b}")
    assert "prompt is empty" in error({"a": ""}, prompt_template="{a}")


def test_messages_stay_as_they_are_until_their_template_is_known():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"function": {"arguments": "{}"}}]}
    messages = [{"role": "user", "content": parts, "tool_calls": None}, call]
    assert ask({"messages": messages}, "chat").messages == messages


BAD: list[tuple[str, Any, str]] = [
    ("generate", "", "not JSON"),
    ("generate", '{"prompt": "hi"', "not JSON: Expecting ',' delimiter at character 16"),
    ("generate", "{'prompt': 'hi'}", "not JSON"),
    ("generate", '{"prompt": "hi"} {}', "not JSON: Extra data at character 18"),
    ("generate", '{"prompt": "a\tb"}', "not JSON: Invalid control character"),
    ("generate", '{"prompt": "hi", "x": NaN}', "NaN"),
    ("generate", '{"prompt": "hi", "x": -Infinity}', "Infinity"),
    ("generate", '{"prompt": "hi", "prompt": "ho"}', "'prompt' is there twice"),
    ("generate", '{"prompt": "hi", "x": {"a": 1, "a": 2}}', "'a' is there twice"),
    ("generate", '{"prompt": "hi", "x": 1' + "0" * 5000 + "}", "digits"),
    ("generate", "[" * 100_000, "nested too deep"),
    ("generate", '{"prompt": "hi", "x": ' + "[" * 500 + "]" * 500 + "}", "'x' is nested deeper than 100"),
    ("generate", '{"prompt": "\\ud800"}', "'prompt' is not valid Unicode at character 1"),
    ("generate", '{"prompt": "hi", "x": ["a", {"b": "xy\\udfff"}]}', "'x' is not valid Unicode at character 3"),
    ("generate", '{"prompt": "hi", "\\udcff": 1}', "not valid Unicode"),
    ("generate", b'{"prompt": "h\xff"}', "not UTF-8 at byte 14"),
    ("generate", '{"prompt": "hi"}'.encode("utf-16"), "not UTF-8"),
    ("generate", {"text": "from a text file\udcff"}, "'text' is not valid Unicode at character 17"),
    ("generate", "[1]", "is a list"),
    ("generate", '"hi"', "is text"),
    ("generate", "null", "is null"),
    ("generate", "{}", "has nothing"),
    ("generate", {"promt": "hi", "id": 3}, "has 'promt', 'id'"),
    ("generate", {"prompt": None}, "has none of prompt"),
    ("generate", {"prompt": ""}, "prompt is empty"),
    ("generate", {"prompt": 3}, "prompt must be text, and is a number"),
    ("generate", {"prompt": ["hi"]}, "prompt must be text, and is a list"),
    ("generate", {"prompt": True}, "prompt must be text, and is true or false"),
    ("generate", {"prompt": "hi", "messages": USER}, "both prompt and messages"),
    ("generate", {"prompt": "hi", "text": "hi"}, "both prompt and text"),
    ("generate", {"prompt": "hi", "prompt_token_ids": [1]}, "both prompt and prompt_token_ids"),
    ("generate", {"messages": USER}, "task chat"),
    ("generate", {"prompt_token_ids": []}, "prompt_token_ids must be a list of token ids"),
    ("generate", {"prompt_token_ids": {"a": 1}}, "prompt_token_ids must be a list of token ids, and is an object"),
    ("generate", {"prompt_token_ids": "1 2"}, "prompt_token_ids is text, and as JSON it is no good: not JSON"),
    ("generate", {"prompt_token_ids": [1, "2"]}, "prompt_token_ids[1] is '2'"),
    ("generate", {"prompt_token_ids": [True]}, "prompt_token_ids[0] is True"),
    ("generate", {"prompt_token_ids": [1.0]}, "prompt_token_ids[0] is 1.0"),
    ("generate", {"prompt_token_ids": [1, -1]}, "prompt_token_ids[1] is -1"),
    ("generate", {"prompt_token_ids": [2**31]}, "prompt_token_ids[0]"),
    ("generate", {"prompt": "hi", "params": []}, "params must be an object"),
    ("generate", {"prompt": "hi", "params": "max_tokens"}, "params is text, and as JSON it is no good: not JSON"),
    ("generate", {"prompt": "hi", "params": {"max_token": 3}}, "'max_token' is not supported: did you mean max_tokens"),
    ("generate", {"prompt": "hi", "params": {"temperature": -1}}, "temperature is -1"),
    ("generate", {"prompt": "hi", "params": {"max_tokens": "many"}}, "max_tokens is 'many'"),
    ("generate", {"prompt": "hi", "params": {"logit_bias": {"a": 1}}}, "logit_bias is {'a': 1}"),
    ("generate", {"prompt": "hi", "params": {"logit_bias": {"1": 10**400}}}, ""),
    ("generate", {"prompt": "hi", "params": {"n": {}}, "sampling_params": {"n": 2}}, "both params and sampling_params"),
    ("chat", {"messages": []}, "messages: the list is empty"),
    ("chat", {"messages": "hi"}, "messages is text, and as JSON it is no good: not JSON"),
    (
        "chat",
        {"messages": '[{"role": "user", "content": "\\ud800"}]'},
        "messages is text, and as JSON it is no good: not",
    ),
    ("chat", {"messages": "[" * 200 + "]" * 200}, "nested deeper than 100"),
    ("chat", {"messages": {"role": "user"}}, "messages: expected a list"),
    ("chat", {"messages": ["hi"]}, "messages[0]"),
    ("chat", {"messages": [{"content": "hi"}]}, "messages[0]: role"),
    ("chat", {"messages": [*USER, {"role": "user"}]}, "messages[1]: content"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text of a part must be text"),
    ("chat", {"messages": USER, "tools": {"a": 1}}, "tools must be a list"),
    ("chat", {"messages": USER, "tools": ["f"]}, "tools must be a list"),
    ("chat", {"prompt_token_ids": [1]}, "prompt_token_ids have no chat template"),
    ("chat", {"prompt": ""}, "prompt is empty"),
    ("score", {"text": ""}, "text is empty"),
    ("score", {"prompt": "hi"}, "prompt without continuation"),
    ("score", {"prompt": "hi", "continuation": ""}, "continuation is empty"),
    ("score", {"prompt": "hi", "continuation": ["a"]}, "continuation must be text"),
    ("score", {"text": "hi", "continuation": "a"}, "both text and continuation"),
    ("score", {"prompt_token_ids": [1], "continuation": "a"}, "both prompt_token_ids and continuation"),
    ("score", {"continuation": "a"}, "has none of prompt"),
    ("score", {"messages": USER}, "messages can't be scored"),
    ("score", {"text": "hi", "params": {"n": 2}}, "sampling parameters are for what is generated"),
]


@pytest.mark.parametrize(("task", "value", "problem"), BAD)
def test_bad_rows_say_what_is_wrong(task, value, problem):
    assert problem in error(value, task)


def test_what_the_reader_found_wrong_is_the_rows_error():
    row = PARSERS["generate"].parse(Record(3, "a.csv:4", None, "3 fields, where the first row has 2"))
    assert row == Row(3, "a.csv:4", error="a.csv:4: 3 fields, where the first row has 2")


def test_text_that_can_not_be_written_is_replaced_in_what_is_carried():
    row = parse('{"prompt": "hi", "x": {"\\ud800": "a\\ud800b"}}')
    assert row.columns == {"prompt": "hi", "x": {"?": "a?b"}}


def test_a_job_that_makes_no_sense_is_refused():
    assert "'sing'" in line(lambda: Parser("sing", GREEDY))
    assert "top_p is 7" in line(lambda: Parser("generate", GREEDY, {"top_p": 7}))
    assert "prompt template" in line(lambda: Parser("generate", GREEDY, prompt_template="{a.b}"))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["", "[]", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["prompt", "text", "messages", "prompt_token_ids", "continuation", "params", "sampling_params", "tools"]
KEYS += ["custom_id", "method", "url", "body", "role", "content", "type", "logit_bias", "stop", "n", "seed", "logprobs"]
plausible = st.recursive(
    anything | st.sampled_from(["POST", "/v1/completions", "/v1/chat/completions", "user", "text", 10**400, [1, 2]]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
rows = st.dictionaries(st.sampled_from(KEYS), plausible, max_size=5)


@given(st.sampled_from(["generate", "chat", "score"]), rows)
@settings(deadline=None, max_examples=300)
def test_no_row_ends_the_job(task, columns):
    parse(columns, task)
    parse(json.dumps(columns), task)
    parse(columns, task, prompt_template="{prompt}{text}")


@given(st.binary())
@settings(deadline=None)
def test_no_line_ends_the_job(content):
    parse(content)
    parse(b'{"prompt": "' + content + b'"}')
