"""Chat templates with what each family's are made of, written small for here: as transformers renders them."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2 import nodes

from jaxinfer.text import sandbox
from jaxinfer.text.messages import normalize_messages
from jaxinfer.text.tokenizer import load_tokenizer

from .tiny import byte_level, write

transformers = pytest.importorskip("transformers")

TEMPLATES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def weather(city: str, days: int = 1, units: list[str] | None = None) -> dict[str, float]:
    """Says what the weather is "like" in a <city>.

    Args:
        city: Where, as in "Köln"
        days: How many
        units: Of what (choices: ["°C", "°F"])
    """
    raise NotImplementedError(city, days, units)


SEARCH = {
    "type": "function",
    "function": {
        "name": "suche",
        "description": " Finds things & people ",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "safe": {"type": ["boolean", "null"]}},
            "required": ["query"],
        },
        "return": {"type": "array"},
    },
}
DOCUMENTS = [{"doc_id": 7, "title": "A", "text": "Röcks & <stones>"}, {"title": "B", "text": ""}]


def says(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | fields


def calls(*functions: tuple[str, str, dict[str, Any]], **fields: Any) -> dict[str, Any]:
    made = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in functions]
    return {"role": "assistant", "tool_calls": made} | fields


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


SYSTEM, ASK = says("system", "Be brief & <kind>. /think"), says("user", " Wie heißt 日本?\n")
HM = says("assistant", "<think>\nhm\n</think>\n\n<answer> a </answer>")
SO = says("assistant", "<think>\nso\n</think>\n\nb")
LONG, SHORT = (says("assistant", text, reasoning_content=why) for text, why in (("a", "\nlong\n"), ("b", "short")))
CALL = calls(("abcdefgh1", "weather", {"city": "Köln", "days": 2}))
TWO = calls(("abcdefgh1", "weather", {"city": "<a> & 'b'"}), ("abcdefgh2", "suche", {"query": 'q"', "safe": None}))
RESULTS = [says("tool", '{"t": 3.5}', tool_call_id="abcdefgh1"), says("tool", "☔", tool_call_id="abcdefgh2")]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [ASK],
    "a system message": [SYSTEM, ASK],
    "of no thoughts": [says("system", "Short. /no_think"), ASK],
    "of its own": [says("system", "/system_override All mine."), ASK],
    "many turns": [SYSTEM, ASK, says("assistant", " Nippon.\n\n"), says("user", "🙂 Why? /nothink")],
    "the assistant last": [ASK, says("assistant", "\n\nIt is")],
    "thoughts in the text": [ASK, HM, ASK, SO],
    "thoughts beside it": [ASK, LONG, ASK, SHORT, says("assistant", "c")],
    "empty": [says("system", ""), says("user", ""), says("assistant", "")],
    "no content": [ASK, {"role": "assistant", "content": None, "name": None}, ASK],
    "a call": [ASK, CALL],
    "a call with text": [SYSTEM, ASK, CALL | {"content": "I look."}, RESULTS[0]],
    "a call and its result": [ASK, CALL, RESULTS[0], says("assistant", "3.5 °C")],
    "two calls": [SYSTEM, ASK, TWO | {"content": "", "tool_plan": "both", "reasoning_content": "both"}, *RESULTS],
    "two rounds": [
        ASK,
        TWO,
        *RESULTS,
        says("assistant", "So."),
        says("user", "<tool_response>x</tool_response>"),
        CALL,
    ],
    "no content but a call": [ASK, CALL | {"content": None}, RESULTS[0]],
    "an id too short": [ASK, calls(("c1", "weather", {})), RESULTS[0]],
    "a result without an id": [ASK, CALL, says("tool", "3.5")],
    "system messages later": [ASK, says("assistant", "a"), says("system", "Be long."), says("system", "No."), ASK],
    "two questions": [ASK, ASK],
    "the assistant first": [says("assistant", "a"), ASK],
    "other roles": [says("developer", "d"), ASK, says("critic", "c")],
    "roles in capitals": [says("System", "s"), says("User", "u"), says("Chatbot", "c")],
    "functions of a field": [says("system", "s", functions="f()", tools="[]"), ASK],
    "only a system message": [SYSTEM],
    "metadata": [ASK, says("assistant", "a", metadata="m"), ASK],
    "what looks like a template": [says("user", "{{ bos_token }} {% raw %} <|im_end|>\\n\u2028</s>")],
}
PARTS: dict[str, list[dict[str, Any]]] = {
    "one part": [says("user", parts(" a "))],
    "parts": [says("system", parts("s")), says("user", parts("a", "", " b")), says("assistant", parts("c")), ASK],
    "parts and text": [SYSTEM, says("user", parts("日本")), says("assistant", "a"), says("user", parts("b", "c"))],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tools": [weather]},
    {"tools": [weather, SEARCH]},
    {"tools": []},
    {"tools": [SEARCH], "documents": DOCUMENTS},
    {"documents": DOCUMENTS},
]
# Of which variables each asks; each conversation is rendered with each.
VARIABLES: dict[str, list[dict[str, Any]]] = {
    "cohere2": [{"safety_mode": "strict"}, {"safety_mode": "contextual"}, {"safety_mode": "none"}],
    "ernie": [{"cls_token": "<cls>"}, {"sep_token": None}],
    "exaone4": [{"enable_thinking": True, "skip_think": False}, {"enable_thinking": False}],
    "glm4": [{"enable_thinking": False}, {"enable_thinking": True}],
    "granite": [{"thinking": True}, {"controls": {"citations": True, "length": "short"}, "documents": DOCUMENTS}],
    "hunyuan": [{"enable_thinking": False}],
    "llama3": [
        {"builtin_tools": ["code_interpreter", "weather", "brave"]},
        {"custom_tools": [SEARCH], "date_string": "1 Jan 2030"},
        {"tools": [SEARCH], "tools_in_user_message": False},
    ],
    "qwen3": [{"enable_thinking": False}, {"enable_thinking": True}],
    "qwen_vl": [{"add_vision_id": True}],
    "seed_oss": [{"thinking_budget": budget} for budget in (0, 512, 513, 99999)],
    "smollm3": [{"enable_thinking": False}, {"xml_tools": [{"a": 1}], "python_tools": ["def f(): ..."]}],
}
TAKE_PARTS = {"gemma3", "glm4", "qwen_vl"}  # the others print a list as Python writes one, there
NEVER = {"Picture ", "<|vision_start|><|vision_end|>"}  # images are refused
# Conversations that are none for it, with any options.
ALTERNATE = {"other roles", "roles in capitals", "the assistant first", "thoughts beside it", "two questions"}
TWICE = {"system messages later", "two calls", "two rounds"}
RAISES = {
    "exaone4": {"other roles", "roles in capitals"},
    "gemma": ALTERNATE | TWICE | {which for which, (first, *_) in CONVERSATIONS.items() if first["role"] == "system"},
    "gemma3": ALTERNATE | TWICE,
    "hunyuan": {"no content"},
    "llama3": {"two calls", "two rounds"},
    "mistral": ALTERNATE | {"an id too short", "a result without an id"},
    "qwen2_5": {"no content"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    byte_level(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>"]).save(str(folder / "tokenizer.json"))
    return write(
        folder,
        tokenizer_config_json={
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "image_token": "<img>",
            "chat_template": [{"name": name, "template": text} for name, text in TEMPLATES.items()],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        config_json={"model_type": "llama"},
    )


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def rendered(call: Any, *args: Any, **kwargs: Any) -> str | Exception:
    try:
        text: str = call(*args, **kwargs)
        return text
    except Exception as error:
        return error


def cases(name: str) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """With the options that the template asks for; without the header of the answer for the first one only."""
    given = [each for each in OPTIONS if all(option in TEMPLATES[name] for option in each)]
    options = [{"add_generation_prompt": False}]
    options += [{"add_generation_prompt": True} | each for each in [*given, *VARIABLES.get(name, [])]]
    conversations = CONVERSATIONS | (PARTS if name in TAKE_PARTS else {})
    return [(which, messages, each) for which, messages in conversations.items() for each in options]


def compare(both: tuple[Any, Any], name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """What both write; None where both refuse."""
    ours, theirs = both
    made = rendered(ours.chat_prompt, messages, chat_template=name, **options)
    expected = rendered(theirs.apply_chat_template, messages, chat_template=name, tokenize=False, **options)
    if isinstance(made, Exception) or isinstance(expected, Exception):
        assert type(made) is not str, f"{expected!r} there; here {made!r}"
        assert isinstance(expected, Exception), f"{made!r} here; there {expected!r}"
        if isinstance(expected, jinja2.TemplateError) and str(expected):
            assert str(expected) in str(made)  # what the template says, or what Jinja says of it
        return None
    assert made == expected
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers(both: tuple[Any, Any], name: str) -> None:
    texts: dict[str, set[str]] = {}
    for which, messages, options in cases(name):
        text = compare(both, name, messages, options)
        texts.setdefault(which, set()).update([] if text is None else [text])
    assert {which for which, made in texts.items() if not made} == RAISES.get(name, set())
    everything = "\n\n".join(text for made in texts.values() for text in made)
    assert all(piece in everything for piece in written(name) - NEVER), written(name)
    ours, theirs = both
    options = {"chat_template": name, "add_generation_prompt": True}
    ids = theirs.apply_chat_template([ASK], return_dict=False, **options)
    assert ours.apply_chat_template([ASK], **options) == ids


def written(name: str) -> set[str]:
    """Lines that a template writes as they are: some conversation has to bring each forth."""
    data = sandbox._environment().parse(TEMPLATES[name]).find_all(nodes.TemplateData)
    return {line.strip() for node in data for line in node.data.split("\n") if line.strip()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_that_are_continued(both: tuple[Any, Any], name: str) -> None:
    seen = 0
    texts = ["It is", "It is \n", "{{ It }}"]
    if "</think>" not in TEMPLATES[name]:  # what templates drop of an answer, transformers takes for a mistake
        texts.append("<think>\nhm\n</think>\n\nIt is")
    for text in texts:
        for messages in ([ASK, says("assistant", text)], [SYSTEM, ASK, says("assistant", text)]):
            for options in ({}, {"tools": [SEARCH]}):
                made = compare(both, name, messages, {"continue_final_message": True} | options)
                assert made is None or made.rstrip().endswith(text.split("</think>")[-1].strip())
                seen += made is not None
    assert seen >= len(texts)


def test_a_template_of_a_file_before_others(folder: Path, tmp_path: Path) -> None:
    """chat_template.jinja with tokenizer_config.json: as transformers chooses."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for declared in (TEMPLATES["qwen3"], [{"name": "default", "template": TEMPLATES["gemma"]}], None):
        write(tmp_path, tokenizer_config_json=config | {"chat_template": declared}, config_json={"model_type": "llama"})
        for inside in (TEMPLATES["granite"], None):
            file = tmp_path / "chat_template.jinja"
            file.write_text(inside) if inside else file.unlink()
            ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
            assert ours.has_chat_template == bool(theirs.chat_template) == bool(inside or declared)
            if theirs.chat_template:
                expected = theirs.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
                assert ours.chat_prompt([ASK]) == expected


# What templates ask of the environment, beside the families' above.
PIECES = {
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['x'], 2) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ unk_token is defined }}",
    "namespace": "{% set ns = namespace({'a': [1]}, b=2) %}{{ ns.a + [ns.b] }}",
    "a block": "{% for m in messages %}{% generation %}{% set x = loop.index %}{{ x }}{{ m.role }}\n"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "a generation block in a macro": "{% macro g(t) %}{% generation -%} {{ t }} {%- endgeneration %}{% endmacro %}"
    "{{ g('a') ~ g(messages[0].role) }}",
    "lists": "{{ [3, 1, 2] | sort | map('string') | join(',') }}{{ messages | map(attribute='role') | unique | list }}"
    "{{ messages | groupby('role') | length }}{{ range(2, 9, 3) | list }}{{ 'abc'[::-1] }}{{ 'abc'[-2:] }}",
    "strings": "{{ '%s-%05.1f' % ('a', 2.25) }}{{ '{:>4}{x}'.format(1, x=2) }}"
    "{{ 'a\\tb' | replace('\\t', ' ') | title }}{{ 'x' is in 'xy' }}{{ 'ß'.upper() }}"
    "{{ 'a,b'.rsplit(',', 1) }}{{ 'q' is eq 'q' }}{{ 1 is sameas 1 }}",
    "JSON": "{{ {'b': [1.0, none, true, 'é</script>\u2028'], 'a': {}} | tojson(indent=1, sort_keys=true) }}"
    "{{ 'é' | tojson(true) }}{{ [1, {}] | tojson(separators=[' ,', ' : ']) }}{{ 1e400 | tojson }}",
    "numbers": "{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7.0 / 2 }}{{ '12' | int + 1 }}{{ 2.5 | round }}{{ -3 | abs }}",
    "time": "{{ strftime_now('%Y %B %d %% %j') }}",
    "white space": "  {%- if true +%}\n a\n  {%+ if true %} b {% endif %}\n{% endif -%}\n\n c {#- d -#} e\n\n",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ messages[0].nothing | d('d') }}{{ messages[9] is defined }}",
    "escapes": "{{ '<&>' | e }}{{ '<b>' | safe }}{{ '<a>x</a>' | striptags }}{{ 'a b' | urlencode }}",
    "call": "{% macro w(n) %}<{{ caller(n) }}>{% endmacro %}{% call(x) w(3) %}{{ x }}{% endcall %}",
    "filter blocks": "{% filter upper %}a{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}"
    "{% set t %} x {% endset %}[{{ t | trim }}]{% raw %}{{ x }}{% endraw %}",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "cycle": "{% for m in messages %}{{ loop.cycle(1, 2) }}{{ loop.changed(m.role) }}{{ loop.revindex }}{% endfor %}",
}


@pytest.mark.parametrize("piece", PIECES)
def test_the_environment(both: tuple[Any, Any], piece: str) -> None:
    ours, theirs = both
    for messages in (CONVERSATIONS["many turns"], CONVERSATIONS["two calls"]):
        expected = theirs.apply_chat_template(messages, chat_template=PIECES[piece], tokenize=False)
        assert ours.chat_prompt(messages, chat_template=PIECES[piece], add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ namespace(_a=1) }}",
        "{{ namespace({'__html__': 1}) }}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set m = messages[0] %}{% set m.role = 'x' %}",
        "{{ (messages[0] | attr('setdefault'))('x', 1) }}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% do messages %}",
        "{{ raise_exception({'a': 'b'}) }}",
        "{{ nothing | tojson }}",
        "{{ nothing + 'x' }}",
        "{{ messages[0].content + none }}",
        "{% generation %}",
        "{{ x }",
    ],
)
def test_what_neither_lets_pass(both: tuple[Any, Any], template: str) -> None:
    ours, theirs = both
    assert isinstance(rendered(theirs.apply_chat_template, [ASK], chat_template=template, tokenize=False), Exception)
    with pytest.raises(ValueError, match=r"chat template|chat_template"):
        ours.chat_prompt([ASK], chat_template=template)


@pytest.mark.parametrize("name", sorted(TAKE_PARTS))
def test_images_are_refused(both: tuple[Any, Any], name: str) -> None:
    image = says("user", [{"type": "image"}, *parts("What is it?")])
    message = str(rendered(both[0].chat_prompt, [image], chat_template=name))
    assert "type 'image'; only text is supported: llama is a text model" in message


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("qwen3_vl", "Qwen3-VL's vision tower is not loaded, its text model alone is"),
        ("qwen2_5_vl", "Qwen2.5-VL's vision tower is not loaded"),
        ("gemma3", "Gemma 3's vision tower is not loaded"),
        ("mistral3", "Mistral 3's vision tower is not loaded"),
        ("gemma3_text", "gemma3_text is a text model"),
        (["x"], "jaxinfer runs text models"),
    ],
)
def test_who_sees_no_images(tmp_path: Path, model_type: Any, why: str) -> None:
    write(tmp_path, config_json={"model_type": model_type})
    image = says("user", [{"type": "image_url", "image_url": {"url": "data:,"}}])
    made = rendered(normalize_messages, [ASK, image], folder=tmp_path)
    assert str(made).startswith(f"messages[1]: content has a part of type 'image_url'; only text is supported: {why}")
