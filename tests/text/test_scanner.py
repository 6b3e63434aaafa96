"""Text to messages: every format, whole and cut in any way."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxinfer.text.calls import Call, schemas
from jaxinfer.text.formats import (
    REASONING,
    TOOLS,
    enforced,
    message_format,
    opened_by,
    reasoning_of,
    shows_special,
    tools_of,
)
from jaxinfer.text.scanner import Message, Scanner

TOOL_LIST = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}},
            },
        },
    }
    for name in ("weather", "get-time.v2")
]
KNOWN = schemas(TOOL_LIST)
CITY = '{"city": "Li}ge \\"</tool_call>[/THINK]\\" é", "days": 3}'
PARIS = '{"city": "Paris", "days": 3}'

# Format of calls, of reasoning, text, reasoning, content, calls.
WHOLE = [
    (None, None, " plain <tool_call>\n", "", " plain <tool_call>\n", []),
    (None, "think", "<think>\nhm </thin\n</think>\n\nyes </think> \n", "hm </thin", "yes </think> \n", []),
    (
        "hermes",
        "think",
        f'<think>a</think>\n\nb\n<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>{"name": "get-time.v2", "arguments": {}}</tool_call>',
        "a",
        "b",
        [("weather", CITY), ("get-time.v2", "{}")],
    ),
    ("hermes", None, "a <tool_call> b</tool_call> c", "", "a <tool_call> b</tool_call> c", []),
    ("hermes", None, '<tool_call>{"name": "weather"}', "", "", [("weather", "{}")]),
    (
        "qwen3_coder",
        None,
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        "glm45",
        "think",
        "<think></think>ok<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "",
        "ok",
        [("weather", PARIS)],
    ),
    (
        "minimax_m2",
        "think",
        '<think>\nx\n</think>\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        "x",
        "",
        [("weather", PARIS)],
    ),
    ("llama3_json", None, f'{{"name": "weather", "parameters": {CITY}}}', "", "", [("weather", CITY)]),
    ("llama3_json", None, ' {"name": "other", "parameters": {}}', "", ' {"name": "other", "parameters": {}}', []),
    ("llama3_json", None, '<|python_tag|>{"name": "weather"}; {"name": "weather"}', "", "", [("weather", "{}")] * 2),
    ("pythonic", None, "[weather(city='Paris', days=3), weather()]", "", "", [("weather", PARIS), ("weather", "{}")]),
    ("pythonic", None, "[1, 2] it is", "", "[1, 2] it is", []),
    ("mistral", "mistral", f"[THINK]a[/THINK]b[TOOL_CALLS]weather[ARGS]{CITY}", "a", "b", [("weather", CITY)]),
    ("mistral", None, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}}}]', "", "", [("weather", CITY)]),
    (
        "deepseek_v3",
        "think",
        f"a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{CITY}\n```<｜tool▁call▁end｜>\n"
        f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "a",
        [("weather", CITY), ("weather", "{}")],
    ),
    ("granite", None, f'<|tool_call|>[{{"name": "weather", "arguments": {CITY}}}]', "", "", [("weather", CITY)]),
    (
        "kimi_k2",
        None,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{CITY}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "",
        [("weather", CITY)],
    ),
    (
        "openai",
        "openai",
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary<|message|>see:<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{CITY}",
        "think",
        "see:",
        [("weather", CITY)],
    ),
    ("openai", "openai", "<|channel|>final<|message|> hi \n", "", "hi \n", []),
]


def scanned(tools, reasoning, pieces, whole=True, **options):
    form = message_format(tools, reasoning)
    scanner = Scanner(form, KNOWN if tools else None, **options)
    message = Message()
    for piece in pieces:
        message.add(scanner.push(piece))
    message.add(scanner.finish(whole))
    return message


def named(message):
    return message.reasoning, message.content, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize(("tools", "reasoning", "text", "thought", "content", "calls"), WHOLE)
def test_formats(tools, reasoning, text, thought, content, calls):
    message = scanned(tools, reasoning, [text])
    assert named(message) == (thought, content, calls)
    assert named(scanned(tools, reasoning, list(text))) == (thought, content, calls)
    assert all(call.id and isinstance(json.loads(call.arguments), dict) for call in message.calls)


MARKERS = sorted({m for f in (*TOOLS.values(), *REASONING.values()) for s in f for m in (s.opens, *s.closes)})
PARTS = [*MARKERS, *(case[2] for case in WHOLE), PARIS, CITY, '{"name": "weather"}', "\n", " ", "x", '"', "\\", "é"]


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(TOOLS)),
    st.sampled_from([None, *sorted(REASONING)]),
    st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=6),
    st.lists(st.integers(0, 300), max_size=12),
    st.booleans(),
)
@example("hermes", "think", ['<tool_call>{"name": "weather"}</tool_call> a'], [3, 12, 40], False)
def test_any_cut_gives_the_message_of_the_whole(tools, reasoning, parts, cuts, whole):
    text = "".join(parts)
    ends = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    expected = named(scanned(tools, reasoning, [text], whole))
    assert named(scanned(tools, reasoning, pieces, whole)) == expected
    assert named(scanned(tools, reasoning, list(text), whole)) == expected


def test_a_call_that_breaks_off_is_none():
    text = 'a<tool_call>{"name": "weather", "arguments": {"city": "P'
    assert named(scanned("hermes", None, [text], whole=False)) == ("", "a", [])
    assert named(scanned("llama3_json", None, ['{"answer": 4'], whole=False)) == ("", '{"answer": 4', [])


def test_a_list_of_calls_that_must_come_breaks_off_between_them():
    text = f'[ {{"name": "weather", "arguments": {CITY}}} ,\n{{"name": "get-time.v2", "arguments": {{}} }} ]'
    calls = [("weather", CITY), ("get-time.v2", "{}")]
    for end in range(len(text) + 1):
        scanner, message = Scanner(enforced(message_format("hermes", None)), KNOWN), Message()
        message.add(scanner.push(text[:end]) + scanner.finish(end == len(text)))
        there = text[:end].count("}}") + text[:end].count("} }")
        assert named(message) == ("", "", calls[:there]), text[:end]


def test_a_prompt_may_have_opened_the_reasoning():
    form = message_format("hermes", "think")
    assert opened_by(form, "<|im_start|>assistant\n<think>\n") == "<think>"
    assert opened_by(form, "<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert named(scanned("hermes", "think", ["a</think>b"], open_with="<think>")) == ("a", "b", [])
    assert named(scanned("hermes", "think", ["never ends"], whole=False, open_with="<think>"))[0] == "never ends"


def test_calls_have_ids_and_there_may_be_one_only():
    two = '<tool_call>{"name": "weather"}</tool_call>' * 2
    ids = [call.id for call in scanned("hermes", None, [two]).calls]
    assert len(set(ids)) == 2
    assert len(scanned("hermes", None, [two], most_calls=1).calls) == 1
    (call,) = scanned("mistral", None, ["[TOOL_CALLS]weather[ARGS]{}"]).calls
    assert call.id.isalnum()
    assert len(call.id) == 9
    kimi = next(case[2] for case in WHOLE if case[0] == "kimi_k2")
    assert scanned("kimi_k2", None, [kimi]).calls == [Call("weather", CITY, "functions.weather:0")]


def test_no_tools_no_calls():
    scanner = Scanner(message_format("hermes", None))
    text = '<tool_call>{"name": "weather"}</tool_call>'
    assert "".join(piece.text for piece in scanner.push(text) + scanner.finish()) == text


def test_special_tokens_mean_nothing():
    form = message_format("mistral", None, ["[TOOL_CALLS]", "<s>"])
    assert shows_special(form, ["[TOOL_CALLS]"])
    assert not shows_special(form, ["[INST]"])
    scanner = Scanner(form, KNOWN)
    assert [piece.text for piece in scanner.push("a<s>b") + scanner.finish()] == ["a", "b"]


def test_formats_are_told_by_templates():
    assert tools_of("... <tool_call>\n{{ '{\"name\": ' }}") == "hermes"
    assert tools_of("<tool_call><function=...") == "qwen3_coder"
    assert tools_of("{{ messages }}") is None
    assert reasoning_of("{%- if '</think>' in content %}") == "think"
    assert reasoning_of("<|start|>assistant<|channel|>final") == "openai"


def test_no_marker_is_inside_another():
    """Where one begins with another the longer one counts; any other overlap would depend on the cut."""
    for sections in (*TOOLS.values(), *REASONING.values()):
        markers = [section.opens for section in sections if not section.bare]
        assert not any(a in b[1:] for a in markers for b in markers)
