"""At a terminal: the progress line, text that streams, Ctrl-C."""

import re
import time

from tests.cli.run import Terminal

PROMPT = "\x1b[?2004h> "  # after which a terminal marks what is pasted
SHOW_CURSOR = "\x1b[?25h"  # the end of the progress line


def test_generate_streams_until_ctrl_c(endless):
    with Terminal("generate", "hello", "-m", endless, "--max-tokens", "9000") as terminal:
        before = terminal.wait_for(SHOW_CURSOR)
        assert "starting JAX" in before
        assert re.search("compiling|running|generating", before)  # a line that is gone at once is never drawn
        for _ in range(3):  # it comes in pieces
            start = len(terminal.seen)
            terminal.wait_for("\n", start)
        terminal.interrupt()
        assert terminal.exit_code() == 130
        assert terminal.seen.endswith("\n")
        assert "Traceback" not in terminal.seen
        assert "KeyboardInterrupt" not in terminal.seen


def test_ctrl_c_while_programs_are_compiled(model, monkeypatch):
    """XLA can't be interrupted, and is at it for most of a minute here."""
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    with Terminal("bench", "latency", "--num-prompts", 64, "-m", model) as terminal:
        terminal.wait_for("compiled 0 of")
        time.sleep(1)
        start = time.monotonic()
        terminal.interrupt()
        assert terminal.exit_code() == 130
        assert time.monotonic() - start < 10
        assert "Traceback" not in terminal.seen


def test_chat(endless):
    with Terminal("chat", "-m", endless, "--max-tokens", "9000") as terminal:
        terminal.wait_for(PROMPT)
        assert "/reset forgets" in terminal.seen
        for message in ("hi", "more"):
            start = len(terminal.seen)
            terminal.type(f"{message}\n")
            terminal.wait_for(f"{message}\r\n", start)
            terminal.wait_for("\ufffd", start)  # the answer: what a random model says has broken characters
            start = len(terminal.seen)
            terminal.interrupt()
            terminal.wait_for(PROMPT, start)  # the conversation goes on
        prompts = terminal.seen.count(PROMPT)
        start = len(terminal.seen)
        terminal.type("half a li")
        terminal.wait_for("half a li", start)
        time.sleep(1)  # Python forgets a signal between a key and its wait for the next one
        terminal.interrupt()  # clears the line
        terminal.wait_for(PROMPT, start)
        terminal.type("/hlep\n")
        terminal.wait_for("did you mean /help?", start)
        terminal.wait_for(PROMPT, terminal.seen.rindex("did you mean"))
        assert terminal.seen.count(PROMPT) == prompts + 2
        for pasted in ("\x1b[200~some\nlines\x1b[201~\n", "some\nlines\n"):  # with and without a word that it is pasted
            start = len(terminal.seen)
            terminal.type(pasted)
            terminal.wait_for("\ufffd", start)
            terminal.interrupt()
            terminal.wait_for(PROMPT, start)
            assert terminal.seen[start:].count(PROMPT) == 1
        terminal.type("/exit\n")
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.seen
