"""Prompts that end inside the last message: beside transformers', but for what it gets wrong."""

from typing import Any

import pytest

from .test_messages import LOOP, render, transformers_renders

USER = {"role": "user", "content": "Say yes twice: yes yes"}
HEADER = "<{{ m.role }}>\n"
# How templates write a message; what follows is written after it.
WRITES = {
    "as it is": "{{ m.content }}<end>\n",
    "joined": "{{ '' + m['content'] + '<end>' }}",
    "trimmed": "{{ m.content | trim }}<end>\n",
    "trimmed, a space after it": "{{ m.content | trim }} <end>",
    "trimmed, a newline after it": "{{ m.content | trim }}\nend",
    "nothing after it": "{{ m.content }}",
    "text or parts": "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<end>",
    "without thoughts": "{{ m.content.split('</think>')[-1] }}<end>",
    "as JSON": "{{ m.content | tojson }}<end>",
    "the same at its end": "{{ m.content }}yes<end>",
}
CONTENTS = ["yes", "yes ", "yes\n\n", " yes", "y", "<think>\nhm\n</think>yes", "<end>", "Say"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("content", CONTENTS)
def test_as_transformers(write: str, content: str) -> None:
    template = LOOP.replace("BODY|", HEADER + WRITES[write])
    messages = [USER, {"role": "assistant", "content": content}]
    ours = render(template, messages, continue_final_message=True)
    known = write in ("trimmed, a space after it",) and content != content.rstrip()
    known = known or (write == "as JSON" and "\n" in content) or (write == "without thoughts" and "</think>" in content)
    if not known:
        assert ours == transformers_renders(template, messages, continue_final_message=True)
    # What follows the last message is gone, and what comes before stays as it was written.
    assert render(template, messages, add_generation_prompt=False).startswith(ours)
    assert ours.startswith(render(template, messages[:1], add_generation_prompt=False))


def test_what_transformers_gets_wrong() -> None:
    """A header's newline goes with a message trimmed to nothing; a space of the template's is taken for the mark's."""
    trimmed = LOOP.replace("BODY|", HEADER + WRITES["trimmed"])
    for content in ("", " \n"):
        messages = [USER, {"role": "assistant", "content": content}]
        assert render(trimmed, messages, continue_final_message=True).endswith("<assistant>\n")
        assert transformers_renders(trimmed, messages, continue_final_message=True).endswith("<assistant>")
    spaced = LOOP.replace("BODY|", HEADER + WRITES["trimmed, a space after it"])
    messages = [USER, {"role": "assistant", "content": "yes \n"}]
    assert render(spaced, messages, continue_final_message=True).endswith("<assistant>\nyes")
    assert transformers_renders(spaced, messages, continue_final_message=True).endswith("<assistant>\nyes \n")


def test_a_message_that_is_written_twice() -> None:
    template = "last: {{ messages[-1].content }}\n" + LOOP.replace("BODY|", "{{ m.content }}<end>")
    messages = [{"role": "user", "content": "9081726354"}, {"role": "assistant", "content": "a"}]
    assert render(template, messages, continue_final_message=True) == "last: a\n9081726354<end>a"


def test_letters_that_change() -> None:
    template = LOOP.replace("BODY|", "{{ m.content | upper }}<end>")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a "}]
    assert render(template, messages, continue_final_message=True) == "Q<end>A "


def test_parts_and_other_fields() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    messages = [USER, {"role": "assistant", "content": parts}]
    for name, expected in (("as it is", "a\nb "), ("trimmed", "a\nb"), ("text or parts", "ab ")):
        template = LOOP.replace("BODY|", HEADER + WRITES[name])
        assert render(template, messages, continue_final_message=True).endswith(f"<assistant>\n{expected}")
    for read in ("reasoning_content", "thinking"):
        template = LOOP.replace("BODY|", "<t>{{ m." + read + " }}</t>{{ m.content }}<end>")
        for field in ("reasoning", "reasoning_content", "thinking"):
            messages = [USER, {"role": "assistant", "content": "a", field: "so far"}]
            seen = render(template, messages, continue_final_message=field)
            assert seen == transformers_renders(template, messages, continue_final_message=field)
            assert seen.endswith("<t>so far")


def test_the_header_of_the_answer() -> None:
    template = LOOP.replace("BODY|", "{{ m.content }}<end>") + "{% if add_generation_prompt %}answer{% endif %}"
    assert render(template, [USER]).endswith("<end>answer")
    assert render(template, [USER], add_generation_prompt=False).endswith("<end>")
    assert render(template, [USER], continue_final_message=True) == USER["content"]
    assert render(template, [USER], add_generation_prompt=False, continue_final_message=True) == USER["content"]
    with pytest.raises(ValueError, match="add_generation_prompt and continue_final_message exclude each other"):
        render(template, [USER], add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "message", "field", "problem"),
    [
        ("{{ m.content }}", {"content": None}, True, "the last message has no text in 'content' to continue"),
        ("{{ m.content }}", {"content": "a"}, "thinking", "the last message has no text in 'thinking'"),
        (
            "{{ m.content }}",
            {"content": "a", "thinking": "t"},
            "thinking",
            "doesn't write the end of the last 'thinking'",
        ),
        ("{{ m.content[:3] }}", {"content": "abcd"}, True, "doesn't write the end of the last 'content'"),
    ],
)
def test_what_can_not_be_continued(template: str, message: dict[str, Any], field: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        render(LOOP.replace("BODY|", template), [USER, {"role": "assistant"} | message], continue_final_message=field)
