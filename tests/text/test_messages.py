"""Messages in the form that chat templates expect: beside transformers', where it does the same."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.text.chat import ChatTemplates
from jaxinfer.text.messages import normalize_messages
from jaxinfer.text.template_takes import Takes

ASK = {"role": "user", "content": "q"}


def render(template: str, messages: Any, **kwargs: Any) -> str:
    return ChatTemplates(Path("checkpoint"), {"default": template}).render(messages, **kwargs)


def transformers_renders(template: str, messages: Any, **kwargs: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    conversations = [utils._normalize_chat_messages(copy.deepcopy(messages))]
    return utils.render_jinja_template(conversations, chat_template=template, **kwargs)[0][0]


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


LOOP = "{% for m in messages %}BODY|{% endfor %}"
# How templates ask for a field, the way that families of models do.
READS = {
    "printed": "{{ m.role }}:{{ m.content }}",
    "if there": "{% if m.content is defined %}{{ m['content'] }}{% endif %}{{ m.name }}",
    "if not empty": "{% if m.content %}{{ m['content'] | trim }}{% endif %}",
    "tool calls by name": "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endif %}",
    "tool calls if there": "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}+{% endfor %}{% endif %}",
    "text or parts": "{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}{% for p in m.content "
    "%}{{ p.text }}{% endfor %}{% endif %}",
    "reasoning": "{{ m.reasoning_content }}{{ m.thinking }}{{ m.content }}",
}
NULLS: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]},
    {"role": "assistant", "content": "a", "tool_calls": None, "reasoning": None},
    {"role": "user", "content": "b", "name": None},
    {"role": "assistant", "content": "c", "reasoning_content": None, "thinking": "t"},
    {"role": "assistant", "content": "d", "reasoning": "r", "name": "n"},
    {"role": "user", "content": [{"type": "text", "text": "only"}]},
]


@pytest.mark.parametrize("read", READS)
def test_fields_that_are_null_are_not_there(read: str) -> None:
    template = LOOP.replace("BODY", READS[read])
    for message in NULLS:
        if isinstance(message["content"], list) and read != "text or parts":
            continue  # printed as Python writes a list, there
        assert render(template, [ASK, message]) == transformers_renders(template, [ASK, message]), message
        assert "None" not in render(template, [ASK, message])


def test_null_is_there_for_templates_that_ask_for_it() -> None:
    """DeepSeek's know by it whether there are only tool calls; a field that is left out is null too."""
    template = LOOP.replace(
        "BODY", "{% if m.content is none %}calls{{ m.tool_calls | length }}{% else %}{{ m.content }}{% endif %}"
    )
    left_out = {key: value for key, value in call({}).items() if key != "content"}
    for message in (call({}), left_out):
        assert render(template, [ASK, message]) == "q|calls1|"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_one_thing(field: str, read: str) -> None:
    template = LOOP.replace("BODY", "{{ m." + read + " }}{{ m.content }}")
    for messages in ([ASK, {"role": "assistant", "content": "a", field: "because"}], [ASK, ASK | {field: ""}]):
        seen = render(template, messages)
        assert seen in ("q|becausea|", "q|q|")
        if read != "reasoning":  # transformers does not fill that one
            assert seen == transformers_renders(template, messages)


def test_reasoning_that_differs() -> None:
    messages = [{"role": "assistant", "content": "a", "reasoning": "r", "thinking": "t"}]
    template = LOOP.replace("BODY", "{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}")
    assert render(template, messages) == transformers_renders(template, messages) == "ttr|"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "arguments", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Rome", "n": null}', '{"city": "Rome", "n": null}'),
        ("{{ c.function.arguments | tojson }}", {"city": "Rome"}, '{"city": "Rome"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", '{"city": "Rome"}', "city=Rome"),
        ("{% set a = c.function.arguments or {} %}{% for k, v in a.items() %}{{ k }}{% endfor %}", '{"b": 1}', "b"),
        ("{{ c.function | tojson }}", ' {"a": [1]}\n', '{"name": "f", "arguments": {"a": [1]}}'),
        ("{{ c.function.arguments | tojson }}", "", "{}"),
        ("{{ c.function.arguments | tojson }}", None, "{}"),
        ("{{ c.function.arguments | tojson }}", "not json", '"not json"'),  # its own words, as they are
        ("{{ c.function.arguments | tojson }}", "3", '"3"'),
        ("{{ c.function.arguments | tojson }}", "[" * 100_000, '"' + "[" * 100_000 + '"'),
        # What joins it to text wants text, as it is or written as JSON.
        ("{{ '<' + c.function.name + c['function']['arguments'] + '>' }}", '{"a":1}', '<f{"a":1}>'),
        ("{{ '<' ~ c.function.arguments ~ '>' }}", {"a": "é"}, '<{"a": "é"}>'),
        ("{% set f = c.function %}{{ f.arguments }}", {"a": None}, '{"a": null}'),
        # What can have either gets an object.
        ("{{ c.function.arguments if c.function.arguments is string else 'object' }}", '{"a": 1}', "object"),
    ],
)
def test_arguments_of_tool_calls(body: str, arguments: Any, expected: str) -> None:
    messages = [ASK, call(arguments), {"role": "tool", "tool_call_id": "c", "content": "r"}]
    before = copy.deepcopy(messages)
    assert render(CALLS.replace("BODY", body), messages) == expected
    assert messages == before
    flat = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert (
        render(CALLS.replace("BODY", body.replace("c.function", "c").replace("c['function']", "c")), [flat]) == expected
    )


def test_no_tool_calls() -> None:
    template = LOOP.replace("BODY", "{% if 'tool_calls' in m %}calls{% endif %}{{ m.content }}")
    assert render(template, [ASK, {"role": "assistant", "content": "a", "tool_calls": []}]) == "q|a|"


TEXT_PARTS = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b", "annotations": None}]
EITHER = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}[{{ p['text'] }}]{% endif %}{% endfor %}{% endif %}"
)
PARTS_ONLY = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"
MACRO = "{% macro show(c) %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endmacro %}" + LOOP.replace(
    "BODY", "{{ show(m.content) }}"
)


@pytest.mark.parametrize(
    ("template", "content", "role", "expected"),
    [
        ("{{ m.content }}", "ab", "user", "ab"),
        ("{{ m.content }}", TEXT_PARTS, "user", "a\nb"),
        ("{{ m['content'] | trim }}", TEXT_PARTS, "assistant", "a\nb"),
        ("{{ m.content }}", [], "user", ""),
        ("{{ m.content }}", [{"type": "refusal", "refusal": "no"}], "assistant", "no"),
        ("{{ m.content }}", [{"type": "thinking", "thinking": "t"}, TEXT_PARTS[0]], "assistant", "t\na"),
        ("{% for line in m.content.split('b') %}<{{ line }}>{% endfor %}", "abc", "user", "<a><c>"),
        ("{% for letter in m.content %}<{{ letter }}>{% endfor %}", "ab", "user", "<a><b>"),
        (EITHER, "ab", "user", "ab"),
        (EITHER, TEXT_PARTS, "user", "[a][b]"),
        (EITHER, TEXT_PARTS, "tool", "a\nb"),
        (PARTS_ONLY, "ab", "user", "[ab]"),
        (PARTS_ONLY, TEXT_PARTS, "user", "[a][b]"),
        (PARTS_ONLY, "ab", "tool", "[ab]"),
        ("{% set c = m.content %}" + PARTS_ONLY.replace("m.content", "c[1:]"), TEXT_PARTS, "user", "[b]"),
        ("{{ m.content[0]['text'] }}", TEXT_PARTS, "user", "a"),
        ("{{ m.content[0] }}", "ab", "user", "a"),
    ],
)
def test_content_in_the_form_that_the_template_takes(template: str, content: Any, role: str, expected: str) -> None:
    messages = [{"role": role, "content": content}]
    template = LOOP.replace("BODY", template)
    assert render(template, messages) == f"{expected}|"
    if isinstance(content, str) and "[" not in expected:
        assert transformers_renders(template, messages) == f"{expected}|"


def test_parts_handed_to_a_macro() -> None:
    assert render(MACRO, [{"role": "user", "content": TEXT_PARTS}]) == "[a][b]|"
    assert render(MACRO, [{"role": "user", "content": "ab"}]) == "[ab]|"


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", LOOP.replace("BODY", EITHER)])
@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", 3])
def test_parts_that_are_no_text(template: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]: content has a part of type .*; only text is supported"):
        render(template, [{"role": "user", "content": [{"type": kind}]}])
    with pytest.raises(ValueError, match=r"messages\[0\]: text of a part must be text, found None"):
        render(template, [{"role": "user", "content": [{"type": "text", "text": None}]}])


def test_messages_as_objects() -> None:
    @dataclasses.dataclass
    class Function:
        name: str
        arguments: str

    class Call:
        def model_dump(self) -> dict[str, Any]:
            return {"id": None, "function": Function("f", '{"a": 1}')}

    @dataclasses.dataclass
    class Message:
        role: str
        content: str | None
        tool_calls: list[Any] | None = None

    template = LOOP.replace("BODY", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}")
    messages = [Message("user", "q"), Message("assistant", None, [Call()])]
    assert render(template, messages) == 'q|{"function": {"name": "f", "arguments": {"a": 1}}}|'


@pytest.mark.parametrize("takes", [Takes(), Takes(parts=True), Takes(text=False, parts=True), Takes(null=True)])
def test_once_is_enough(takes: Takes) -> None:
    """What is normal already stays the same, so batch rows and the server may have it checked before."""
    messages = [ASK, *NULLS, call('{"a": 1}'), ASK | {"content": TEXT_PARTS}, call({})]
    once = normalize_messages(messages, takes)
    assert normalize_messages(once, takes) == once
    json.dumps(once)
