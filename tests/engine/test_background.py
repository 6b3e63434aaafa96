"""What can't be interrupted runs where Ctrl-C does not reach it, and reaches who waits."""

import os
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.background import afterwards, in_background, running
from jaxinfer.engine.programs import PrepareMasks
from jaxinfer.engine.runner import Runner


def interrupt_soon() -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_results_and_errors_are_each_item_s():
    with in_background(lambda n: 6 // n, [3, 0, 2], threads=2) as futures:
        assert [futures[0].result(), futures[2].result()] == [2, 3]
        with pytest.raises(ZeroDivisionError):
            futures[1].result()
    with in_background(lambda n: n, []) as futures:
        assert futures == []


def test_the_end_of_the_program_waits_whoever_began_it():
    daemons = []

    def begin():  # as an engine's own thread does
        with in_background(lambda _: threading.current_thread().daemon, [0]) as futures:
            daemons.append(futures[0].result(60))
        afterwards(lambda: daemons.append(threading.current_thread().daemon))

    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    thread.join(60)
    while running():
        time.sleep(0.001)
    assert daemons == [False, False]


def test_ctrl_c_is_heard_and_what_has_begun_runs_out():
    go_on, begun = threading.Event(), []

    def make(item):
        begun.append(item)
        go_on.wait(60)
        return item

    start = time.monotonic()
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt), in_background(make, range(9), threads=2) as futures:
        futures[0].result()
    assert time.monotonic() - start < 30
    assert running()
    assert sorted(begun) == [0, 1]
    assert all(future.cancelled() for future in futures[2:])
    go_on.set()
    assert [future.result(30) for future in futures[:2]] == [0, 1]
    assert sorted(begun) == [0, 1]


def test_an_interrupted_warm_up_is_taken_up_again(monkeypatch):
    """Programs whose compilation had begun are not compiled twice; the others are compiled when they are needed."""
    go_on, compiled = threading.Event(), []
    keys = [("decode", rows) for rows in range(1, 40)]

    def compile_slowly(self, key):
        compiled.append(key)
        go_on.wait(60)
        self._executables[key] = key

    monkeypatch.setattr(Runner, "_compile", compile_slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    runner = Runner.__new__(Runner)
    runner.leader = runner._compiled = runner.on_compile = None
    runner._executables, runner._coming, runner._abandoned, runner.compile_seconds = {}, {}, Future(), 0.0
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        runner.warm_up(keys)
    begun = list(compiled)
    assert 0 < len(begun) < len(keys)
    assert runner.compile_seconds > 0
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        runner._ready(keys[:1])
    assert compiled == begun
    go_on.set()
    assert runner._ready(keys[:1]) == keys[:1]
    runner.warm_up([*keys, PrepareMasks.key])
    assert sorted(compiled) == sorted([*keys, PrepareMasks.key])
    assert set(runner._executables) == {*keys, PrepareMasks.key}


def test_a_program_that_did_not_compile_is_compiled_again(monkeypatch):
    failing = [True]

    def compile_once_it_can(self, key):
        if failing:
            raise RuntimeError("no room")
        self._executables[key] = key

    monkeypatch.setattr(Runner, "_compile", compile_once_it_can)
    runner = Runner.__new__(Runner)
    runner.leader = runner._compiled = runner.on_compile = None
    runner._executables, runner._coming, runner._abandoned, runner.compile_seconds = {}, {}, Future(), 0.0
    with pytest.raises(RuntimeError, match="no room"):
        runner._ready([PrepareMasks.key])
    failing.clear()
    assert runner._ready([PrepareMasks.key]) == [PrepareMasks.key]


def test_closing_waits_for_no_compiler(checkpoints, monkeypatch):
    """As where Ctrl-C leaves `with LLM(...)`: the thread that steps waits for a program, and closing waits for it."""
    begun, go_on, compile_one = threading.Event(), threading.Event(), Runner._compile

    def compile_slowly(self, key):
        if key[0] == "forward":
            begun.set()
            go_on.wait(60)
        compile_one(self, key)

    monkeypatch.setattr(Runner, "_compile", compile_slowly)
    try:
        with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=32) as llm:
            stream = llm.stream("x")
            assert begun.wait(60)
            start = time.monotonic()
        assert time.monotonic() - start < 30
        with pytest.raises(ValueError, match="closed"):
            list(stream)
    finally:
        go_on.set()


def test_what_comes_next_compiles_beside_what_is_waited_for(checkpoints, monkeypatch):
    """Decoding, while a prompt's programs are compiled; not where no token comes after the first."""
    begun, compiled, compile_one = threading.Event(), [], Runner._compile

    def compile_slowly(self, key):
        compiled.append(key)
        if key[0] == "decode":
            begun.set()
        elif key[0] == "forward" and most > 1:
            assert begun.wait(60)
        compile_one(self, key)

    monkeypatch.setattr(Runner, "_compile", compile_slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for most in (1, 2):
        compiled.clear()
        with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=32) as llm:
            llm.generate(["a", "b"], SamplingParams(max_tokens=most, ignore_eos=True), use_tqdm=False)
        expected = [("zeros", 1), ("forward", 32), ("sample", 4), ("decode", 2)]
        assert compiled == expected[: 2 + most]
