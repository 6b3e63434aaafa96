"""`jaxinfer chat` with piped input; with a terminal see test_terminal.py."""

import shutil

import pytest

from jaxinfer import LLM, SamplingParams

SHORT = ["--max-tokens", "8"]


@pytest.fixture(scope="module")
def answers(model):
    """By the Python interface: the answers to "hi" and "more", with and without a system message."""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = {}
    with LLM(model) as llm:
        for system in (None, "be brief"):
            messages = [] if system is None else [{"role": "system", "content": system}]
            for turn in ("hi", "more"):
                messages.append({"role": "user", "content": turn})
                texts[system, turn] = llm.chat(messages, params)[0].outputs[0].text
                messages.append({"role": "assistant", "content": texts[system, turn]})
    return texts


def test_each_line_is_a_turn(cli, model, answers):
    first, second = answers[None, "hi"], answers[None, "more"]
    assert cli("chat", "-m", model, *SHORT, stdin=b"hi\n\n  \nmore\n") == (0, f"{first}\n{second}\n", "")


def test_system_and_reset(cli, model, answers):
    """/reset forgets what was said, but not the system message; /exit ends, whatever follows."""
    lines = b"hi\nmore\n/reset\nhi\n/exit\nmore\n"
    first, second = answers["be brief", "hi"], answers["be brief", "more"]
    done = cli("chat", "-m", model, *SHORT, "--system", "be brief", stdin=lines)
    assert done == (0, f"{first}\n{second}\n{first}\n", "")
    assert len(set(answers.values())) == 4


def test_help_and_what_is_no_command(cli, model, answers, monkeypatch):
    """A typo does not go to the model; a space before it sends it."""
    typed = iter(["/help", "/hlep", "/reset now", " /hlep", "/usr/bin"])

    def answer(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    asked = []
    monkeypatch.setattr("jaxinfer.cli.chat.Conversation.answer", lambda self, message, _: asked.append(message))
    code, _, err = cli("chat", "-m", model, "-q", stdin=None)
    help_said, first, second = err.splitlines()
    assert code == 0
    assert asked == [" /hlep", "/usr/bin"]
    assert all(command in help_said for command in ("/help", "/reset", "/exit", "Ctrl-C", "Ctrl-D"))
    assert first.startswith("jaxinfer: error: no command '/hlep': did you mean /help?")
    assert second.startswith("jaxinfer: error: no command '/reset now'")
    assert "no command '/hlep'" in cli("chat", "-m", model, stdin=b"/hlep\n").error()


def test_too_long_for_the_context(cli, model, answers):
    code, out, err = cli("chat", "-m", model, *SHORT, stdin=b"hi\n" + b"x" * 300 + b"\nhi\n")
    assert (code, out) == (2, f"{answers[None, 'hi']}\n")
    assert err.startswith("jaxinfer: error: the prompt has 3")
    assert err.count("\n") == 1


def test_at_a_terminal(cli, model, answers, monkeypatch):
    """What does not fit is refused, and the conversation goes on; Ctrl-D and Ctrl-C at the prompt end it."""
    too_long = "x" * 300
    for end, expected_code in ((EOFError, 0), (KeyboardInterrupt, 130)):
        typed = iter(["hi", too_long, "", "more"])

        def answer(prompt, typed=typed, end=end):
            assert prompt == "> "
            try:
                return next(typed)
            except StopIteration:
                raise end from None

        monkeypatch.setattr("builtins.input", answer)
        code, out, err = cli("chat", "-m", model, *SHORT, "-q", stdin=None)
        assert (code, out) == (expected_code, f"{answers[None, 'hi']}\n{answers[None, 'more']}\n\n")
        assert err.startswith("jaxinfer: error: the prompt has 3")
        assert err.endswith("or forget the conversation with /reset\n")
        assert err.count("\n") == 1


def test_no_template(cli, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert "chat template" in cli("chat", "-m", folder, stdin=b"hi\n").error()
