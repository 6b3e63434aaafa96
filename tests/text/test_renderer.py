"""Chat templates that take too much, and the processes that render them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.text import renderer
from jaxinfer.text.chat import ChatTemplates

TWICE = "{% set x = namespace(s=START) %}{% for i in range(99) %}{% set x.s = STEP %}{% endfor %}"
BURNS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 7 ** 30000000 % 10 }}",
    "power in the compiler": "{% if 7 ** 30000000 %}{% endif %}",
    "text times": "{{ 'x' * 1500000000 }}",
    "list times": "{{ ([0] * 1500000000) | length }}",
    "integer times itself": TWICE.replace("START", "9").replace("STEP", "x.s * x.s"),
    "text twice as long": TWICE.replace("START", "'ab'").replace("STEP", "x.s ~ x.s"),
    "a list of itself": TWICE.replace("START", "[1]").replace("STEP", "[x.s, x.s]")
    + "{{ x.s == x.s | list }}{{ x.s }}",
    "a width": "{{ '%2000000000d' % 1 }}",
    "a width of format": "{{ '{:2000000000}'.format(1) }}",
    "a width of ljust": "{{ 'x'.ljust(2000000000) | length }}",
    "center": "{{ 'x' | center(2000000000) | length }}",
    "indent": "{{ 'x\ny' | indent(2000000000) | length }}",
    "tojson": "{{ [[[1]]] | tojson(indent=2000000000) | length }}",
    "batch": "{{ [1] | batch(2000000000, 0) | list | length }}",
    "slice": "{{ [1] | slice(2000000000) | list | length }}",
    "round": "{{ 1.5 | round(2000000000, 'ceil') }}",
    "replace": "{{ ('x' * 99999) | replace('', 'y' * 99999) | length }}",
    "lipsum": "{{ lipsum(n=99999, max=99999) | length }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "loop": "{% for x in [[[1]]] recursive %}{{ loop(range(999)) if loop.depth < 99 else loop([9]) }}{% endfor %}",
    "a long prompt": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 0.3)


def render(template: str, text: str = "x", **kwargs: Any) -> str:
    return ChatTemplates(Path("some-model"), {"default": template}).render(
        [{"role": "user", "content": text}], **kwargs
    )


def test_the_limit_holds_where_the_signal_is_ignored() -> None:
    """As some profilers leave it, and new programs inherit it."""
    code = f"""
import signal
signal.signal(signal.SIGPROF, signal.SIG_IGN)
from jaxinfer.text import renderer
renderer.SECONDS = 0.3
try:
    renderer.render({BURNS["loops"]!r}, {{}})
except renderer.LimitError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("took more than 0.3 s of processor time"), done


@pytest.mark.parametrize("template", BURNS.values(), ids=BURNS)
def test_templates_that_take_too_much(short: None, template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError) as raised:
        render(template)
    message = str(raised.value)
    if "the limit here" in message:
        assert message.startswith("some-model: the chat template 'default' "), message
        assert " more than " in message, message
    assert "\n" not in message
    assert len(message) < 500
    assert time.monotonic() - begin < 30
    assert render("{{ messages[0].content }}", "still there") == "still there"


def test_limits_are_said(short: None) -> None:
    with pytest.raises(ValueError, match=r"the chat template 'default' took more than 0\.3 s of processor time"):
        render(BURNS["loops"])
    with pytest.raises(ValueError, match="the chat template 'default' took more than 256 MiB of memory"):
        render(BURNS["text times"])
    with pytest.raises(ValueError, match=r"^chat_template wrote more than 10[0-9]* characters, the limit here; use"):
        render("x", chat_template=BURNS["a long prompt"])


def test_limits_grow_with_what_is_given() -> None:
    text = "é" * 2_000_000
    assert render("{{ messages[0].content * 8 }}", text) == text * 8


def test_text_comes_back_as_it_is() -> None:
    text = "\x00\r\n\u2028\ud800 \U0001f600 </s> \\u0041 \x7f"
    assert render("{{ messages[0].content }}", text) == text
    values = {"x": [1, -0.0, 1e300, 2**70, None, True, {"b": 1, "a": 2}]}
    assert render("{{ v }}", v=values) == str(values)


def test_threads() -> None:
    wrong: list[object] = []

    def many(who: int) -> None:
        for i in range(25):
            try:
                if (text := render("{{ messages[0].content }}", f"{who} {i}" * 50)) != f"{who} {i}" * 50:
                    wrong.append(text)
                if i % 5 == who % 5:
                    with pytest.raises(ValueError, match="mine"):
                        render("{{ raise_exception('mine') }}")
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=many, args=(who,)) for who in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= len(renderer._pool._idle) <= renderer.PROCESSES


def test_a_process_that_somebody_killed_is_replaced() -> None:
    render("x")
    for process in renderer._pool._idle:
        os.kill(process._process.pid, signal.SIGKILL)
    assert render("{{ messages[0].content }}", "still there") == "still there"


def test_what_breaks_in_leaves_no_answer_to_others() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            render(BURNS["power"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("{{ messages[0].content }}", "still there") == "still there"


def test_a_fork_has_processes_of_its_own_and_all_end() -> None:
    code = """
import os, sys
from jaxinfer.text import renderer
echo = lambda text: renderer.render("{{ text }}", {"text": text})
assert echo("before") == "before"
child = os.fork()
for i in range(200):
    assert echo(f"{child} {i}") == f"{child} {i}"
print(renderer._pool._idle[0]._process.pid, flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    pids = set(map(int, done.stdout.split()))
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
