"""Grammars of strict tools: random texts that they allow, as the scanner of the same format reads them."""

import json
import random

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxinfer import RequestError
from jaxinfer.text.calls import schemas
from jaxinfer.text.formats import message_format
from jaxinfer.text.scanner import Message, Scanner
from jaxinfer.text.strict import asks_strictness, strict_grammar, strict_section

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "São Paulo"]},
        "days": {"type": "integer"},
        "note": {"type": "string"},
        "place": {"$ref": "#/$defs/Place"},
    },
    "required": ["city", "days", "place"],
    "additionalProperties": False,
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {"exact": {"type": "boolean"}, "id": {"type": ["integer", "null"]}},
            "required": ["exact"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "get-time.v2", "strict": True}},
    {"type": "function", "function": {"name": "free", "parameters": WEATHER}},
]
BYTES = LLTokenizer("byte")
CLOSERS = set(b'"}</>\n')


def grammar(name, most=None):
    form = message_format(name, None)
    return form, strict_grammar(strict_section(form), TOOLS, most, ())


def walk(text, generator, begin, most):
    """Random bytes that may come, `most` at the most."""
    matcher = LLMatcher(BYTES, text)
    assert not matcher.is_error(), matcher.get_error()
    out = bytearray()
    for _ in range(most):
        allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias and i < 256]
        if len(out) < len(begin):
            byte = begin[len(out)]
            assert byte in allowed
        else:
            ends = [byte for byte in allowed if byte in CLOSERS]
            plain = [byte for byte in allowed if 32 <= byte < 127]
            if not allowed or (matcher.is_accepting() and generator.random() < 0.3):
                break
            byte = generator.choice(ends if ends and generator.random() < 0.4 else plain or allowed)
        assert matcher.consume_token(byte)
        out.append(byte)
    return bytes(out), matcher.is_accepting()


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_calls_are_of_the_tools(name):
    form, text = grammar(name)
    whole = dict.fromkeys((tool["function"]["name"] for tool in TOOLS), 0)
    for seed in range(120):
        out, accepted = walk(text, random.Random(seed), b"Well.\n<tool_call>\n", 600)
        message = Message()
        scanner = Scanner(form, schemas(TOOLS))
        message.add(scanner.push(out.decode(errors="replace")))
        message.add(scanner.finish(accepted))
        if out.count(b"</tool_call>") and accepted:
            assert message.calls, out
        for call in message.calls:
            whole[call.name] += 1
            if call.name == "weather":
                jsonschema.validate(json.loads(call.arguments), WEATHER)
            elif call.name == "get-time.v2":
                assert json.loads(call.arguments) == {}
    assert whole["weather"] > 5, whole
    assert whole["get-time.v2"] > 5, whole


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_text_is_free_but_for_the_marker(name):
    for most in (None, 1):
        _, text = grammar(name, most)
        assert walk(text, random.Random(0), b"a <tool_calls> is no </tool_call>", 33)[1]
        matcher = LLMatcher(BYTES, text)
        assert matcher.try_consume_tokens(list(b"a <tool_call>hm")) == 13


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"minLength": 2, "maxLength": 3}, ["ab", "日本語", "\n\n"], ["a", "abcd", ""]),
        ({"maxLength": 0}, [""], ["a"]),
        ({"minLength": 20}, ["a" * 20], ["a\n</parameter>" + "a" * 20]),
        ({"pattern": "b/c"}, ["b/c", "ab/c\nd"], ["bc"]),
        ({"pattern": r"^(?:a|b)[|$)]{2}\\$"}, ["a|$\\", "b))\\"], ["xa||\\", "a||\\\\"]),
        ({"pattern": r"a|b\$"}, ["a", "xb$x"], ["b", ""]),
        ({"pattern": "[0-9]$", "maxLength": 2}, ["1", "a1"], ["1a", "aa1"]),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_texts_are_of_their_schemas(schema, good, bad):
    """Also in the form in which they stand as they are."""
    own = {"type": "object", "properties": {"a": {"type": "string"} | schema}, "required": ["a"]}
    tools = [{"function": {"name": "f", "parameters": own, "strict": True}}]
    form = message_format("qwen3_coder", None)
    text = strict_grammar(strict_section(form), tools, 1, ())
    for value in (*good, *bad):
        matcher = LLMatcher(BYTES, text)
        call = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>"
        taken = matcher.try_consume_tokens(list(call.encode()))
        assert not matcher.is_error(), matcher.get_error()
        assert (taken == len(call.encode()) and matcher.is_accepting()) == (value in good), value


@pytest.mark.parametrize(
    ("schema", "fact"),
    [
        ({"minLength": -1}, "minLength is -1"),
        ({"maxLength": "a"}, "maxLength is 'a'"),
        ({"minLength": 2, "maxLength": 1}, "no text matches"),
        ({"pattern": "a)(b"}, "closes a group"),
        ({"pattern": "^a|b"}, "into a group"),
        ({"pattern": 3}, "pattern is 3"),
    ],
)
def test_texts_that_can_not_be(schema, fact):
    own = {"type": "object", "properties": {"a": {"type": "string"} | schema}}
    tools = [{"function": {"name": "f", "parameters": own, "strict": True}}]
    with pytest.raises(RequestError, match=rf"^tools\[0\].function.parameters: .*{fact}"):
        strict_grammar(strict_section(message_format("qwen3_coder", None)), tools, 1, ())


def test_one_call():
    call = b'<tool_call>\n{"name": "get-time.v2", "arguments": {}}\n</tool_call>'
    for most, taken in ((None, 2 * len(call) + 3), (1, len(call))):
        matcher = LLMatcher(BYTES, grammar("hermes", most)[1])
        assert matcher.try_consume_tokens(list(call + call + b"end")) == taken


def test_markers_that_are_special_tokens():
    form = message_format("hermes", None)
    text = strict_grammar(strict_section(form), TOOLS, None, ["<tool_call>", "</tool_call>"])
    assert "begins: TEXT <tool_call>\n" in text
    assert "ends: </tool_call>\n" in text


def test_what_is_no_schema_breaks_nothing():
    """It is llguidance that says what is wrong."""
    for parameters in ({"properties": 3}, {"properties": {"a": True, "b": 3}, "required": 4}, {"required": [1]}):
        tools = [{"type": "function", "function": {"name": 'a"\n', "parameters": parameters, "strict": True}}]
        for name in ("hermes", "qwen3_coder"):
            assert strict_grammar(strict_section(message_format(name, None)), tools, None, ())


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_schemas_that_take_too_long(name):
    """Also all tools together, and where each property has its own copy of the definitions."""
    optional = {"type": "object", "properties": {f"p{i}": {} for i in range(400)}}
    large = {"$defs": {"a": {"description": "a" * 10**5}}, "properties": {c: {"$ref": "#/$defs/a"} for c in "abcd"}}
    cases = [([{"properties": {f"p{i}": {} for i in range(8000)}}], "properties: "), ([optional] * 20, "properties: ")]
    for schemas_, fact in [*cases, *([([large], r"\$defs: ")] if name == "qwen3_coder" else [])]:
        tools = [{"function": {"name": "a", "parameters": schema, "strict": True}} for schema in schemas_]
        with pytest.raises(RequestError, match=rf"^tools(\[0\].function.parameters)?: .*{fact}"):
            strict_grammar(strict_section(message_format(name, None)), tools, None, ())


def test_where_it_is_asked():
    assert asks_strictness(TOOLS)
    assert not asks_strictness(TOOLS[2:])
    assert strict_section(message_format("pythonic", None)) is None
