import datetime
import enum
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.text.chat import ChatTemplates, load_chat_templates
from jaxinfer.text.files import read_json
from jaxinfer.text.tokenizer import load_tokenizer

from .tiny import byte_level, write

transformers = pytest.importorskip("transformers")

CHATML = """{%- for message in messages %}
    {{- bos_token if loop.first }}
    {%- generation %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
    {%- endgeneration %}

{% endfor %}
{% if tools %}
{{ tools | tojson(indent=2) }}
{% for tool in tools %}{% if loop.index > 1 %}{% break %}{% endif %}{{ tool.function.name }}{% endfor %}
{% endif %}
{% if add_generation_prompt %}
    {% if enable_thinking is defined and enable_thinking is false %}no thought{% endif %}
<|im_start|>assistant
{%- endif %}
{% if documents is none %}-{% endif %}{{ pad_token }}"""

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Grüße, 日本 'x' \"y\""},
    {"role": "assistant", "content": ""},
]
SCHEMA = {"type": "function", "function": {"name": "größe", "description": "<a> & 'b'", "parameters": {}}}


def render(template: str, messages: Any = MESSAGES, **kwargs: Any) -> str:
    return ChatTemplates(Path("checkpoint"), {"default": template}, {"bos_token": "<s>"}).render(messages, **kwargs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level(["<s>", "</s>", "<|im_start|>", "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
    return write(
        tmp_path,
        tokenizer_config_json={
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "chat_template": CHATML,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        config_json={"model_type": "llama"},
    )


@pytest.mark.parametrize("tools", [None, [SCHEMA], [SCHEMA, SCHEMA], []])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"documents": [{"title": "a", "text": "b"}]}])
def test_as_transformers(folder: Path, tools: Any, kwargs: dict[str, Any]) -> None:
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        options = {"tools": tools, "add_generation_prompt": prompt, **kwargs}
        assert ours.chat_prompt(MESSAGES, **options) == theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        ids = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **options)
        assert ours.apply_chat_template(MESSAGES, **options) == ids


def test_bos_is_not_doubled(sp_chat: Path) -> None:
    tokenizer = load_tokenizer(sp_chat)
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], chat_template=template)
    hello = tokenizer.encode("<s>hello", add_special_tokens=False)[1:]
    assert ids == [1, *hello, tokenizer.eos_token_id]


LAYOUTS = ["string", "list", "dict", "jinja", "additional_chat_templates", "chat_templates", "json", "jinja wins"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_templates_come_from(tmp_path: Path, layout: str) -> None:
    two = {"default": "plain", "tool_use": "with tools"}
    if layout == "string":
        write(tmp_path, tokenizer_config_json={"chat_template": "plain"})
    elif layout == "list":
        listed = [{"name": name, "template": template} for name, template in two.items()]
        write(tmp_path, tokenizer_config_json={"chat_template": listed})
    elif layout == "dict":
        write(tmp_path, tokenizer_config_json={"chat_template": two})
    elif layout == "json":
        write(tmp_path, chat_template_json={"chat_template": "plain"})
    else:
        (tmp_path / "chat_template.jinja").write_text("plain")
        if layout == "jinja wins":
            write(tmp_path, tokenizer_config_json={"chat_template": "older"})
        if layout.endswith("chat_templates"):
            (tmp_path / layout).mkdir()
            (tmp_path / layout / "tool_use.jinja").write_text("with tools")
    templates = load_chat_templates(tmp_path, read_json(tmp_path / "tokenizer_config.json"), {})
    assert templates.render(MESSAGES) == "plain"
    has_two = layout in ("list", "dict", "additional_chat_templates", "chat_templates")
    assert templates.render(MESSAGES, tools=[SCHEMA]) == ("with tools" if has_two else "plain")
    assert templates.render(MESSAGES, chat_template="default") == "plain"
    assert templates.render(MESSAGES, tools=[SCHEMA], chat_template="{{ messages | length }}") == "3"
    if has_two:
        assert templates.render(MESSAGES, chat_template="tool_use") == "with tools"


def test_a_name_is_no_template() -> None:
    templates = ChatTemplates(Path("checkpoint"), {"default": "plain", "tool_use": "with tools"})
    for wrong in ("tool-use", "plain", "default.jinja", "", 3):
        with pytest.raises(ValueError, match=r"neither the name of one of the checkpoint's \(default, tool_use\) nor"):
            templates.render(MESSAGES, chat_template=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"checkpoint's \(none\)"):
        ChatTemplates(Path("checkpoint")).render(MESSAGES, chat_template="chatml")


def test_additional_templates_as_transformers_reads_them(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    write(folder, tokenizer_config_json=config)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ bos_token }}rag")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.chat_templates.templates == theirs.chat_template
    for options in (
        {},
        {"tools": [SCHEMA]},
        {"chat_template": "rag"},
        {"chat_template": "tool_use", "tools": [SCHEMA]},
    ):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **options)
        assert ours.chat_prompt(MESSAGES, **options) == expected


def test_no_template(gpt2: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt2)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"has no chat template; use generate with a plain prompt, or pass chat_tem"):
        tokenizer.chat_prompt(MESSAGES)
    templates = ChatTemplates(tmp_path, {"rag": "x", "tool_use": "y"})
    with pytest.raises(ValueError, match="choose one of rag, tool_use"):
        templates.render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "chat template: roles must alternate"),
        ("{% if %}", "chat template line 1:"),
        ("a\n{% endfor %}", "chat template line 2:"),
        ("{{ messages.nothing.here }}", "chat template: .*nothing"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
        ("{{ messages.append(1) }}", "chat template: .*append"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*__class__"),
        ("{{ messages[0].update({'role': 'x'}) }}", "chat template: .*update"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template: Range too big"),
        ("{% include 'file' %}", "chat template: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template: maximum recursion"),
    ],
)
def test_template_errors(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_what_templates_rely_on() -> None:
    assert render("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\nx\nx\n"
    assert render("{{ {'ü': '<&>\\''} | tojson }}") == '{"ü": "<&>\'"}'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(sort_keys=true, separators=(',', ':')) }}") == '{"a":[2],"b":1}'
    assert render("{{ {'é': 1} | tojson(ensure_ascii=true, indent=1) }}") == json.dumps({"é": 1}, indent=1)
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }} {% endfor %}")
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "3"
    )
    assert render("{{ unknown }}{{ eos_token }}|{{ bos_token }}") == "|<s>"
    assert render("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}") == "21"
    assert render("{{ x.y[0] }}", x={"y": (True,)}) == "True"


def test_rich_values_become_plain() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    class Text(str):
        def secret(self) -> str:
            return "called"

    assert render("{{ messages[0].role }}", [{"role": Role.USER, "content": "x"}]) == "user"
    assert render("{{ messages[0].content.secret is defined }}", [{"role": "user", "content": Text("x")}]) == "False"
    with pytest.raises(ValueError, match="x: keys must be strings, found 3"):
        render("x", x={3: 4})
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[0\]\.image: .*found object"):
        render("x", [{"role": "user", "content": [{"type": "image", "image": object()}]}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: expected a list"),
        ({"role": "user", "content": "x"}, "messages: expected a list"),
        ([], "messages: the list is empty"),
        (["hi"], r"messages\[0\]: expected a dict"),
        ([{"content": "x"}], r"messages\[0\]: role must be a string"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]: role must be a string"),
        ([*MESSAGES, {"role": "user"}], r"messages\[3\]: content must be .*found nothing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: content must be"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]: content must be"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render("x", messages)


def test_messages_of_tool_calls() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [call]) == '{"a": 1}'
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": None}]
    assert render("{{ messages[0].content[0].text }}", parts) == "hi"


def test_options_of_transformers_are_refused() -> None:
    with pytest.raises(ValueError, match="tokenize: not supported here"):
        render("x", tokenize=True)
    with pytest.raises(ValueError, match=r"tools\[0\]: expected a JSON schema"):
        render("x", tools=["f"])
