"""What breaks a step off: an error reaches all who wait, Ctrl-C only its own caller; the next call finds everything in
order."""

import os
import signal
import threading

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.batch_builder import BatchBuilder
from jaxinfer.engine.generation import SequenceOutput
from jaxinfer.engine.programs import Program
from jaxinfer.engine.runner import PendingStep, Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.shards import DataParallelScheduler
from tests.settled import settled

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    return [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)]


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (BatchBuilder, "build"),
        (Runner, "call"),
        (Program, "run"),  # it runs, and its results, the cache among them, never arrive
        (PendingStep, "wait"),
        (DataParallelScheduler, "add"),
        (Scheduler, "schedule"),
        (Scheduler, "publish"),
        (Scheduler, "finish"),
        (SequenceOutput, "accept"),
    ],
)
def test_a_broken_off_step_leaves_nothing_behind(llm, expected, monkeypatch, owner, method):
    """The method does its work, and its result is lost."""
    original = getattr(owner, method)

    def broken_off(*arguments):
        result = original(*arguments)
        raise RuntimeError(f"lost: {result}")

    monkeypatch.setattr(owner, method, broken_off)
    with pytest.raises(RuntimeError, match="lost"):
        llm.generate(["one"], GREEDY)
    with pytest.raises(RuntimeError, match="lost"):
        list(llm.stream("two", GREEDY))
    monkeypatch.undo()
    assert [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)] == expected
    settled(llm)


def test_an_error_of_the_device_reaches_all_who_wait(llm, expected, slowly):
    slow = slowly(llm)
    stream = llm.stream("two", GREEDY)
    other = llm.generate_iter(iter(["one"]), GREEDY)
    errors = []

    def run():
        with pytest.raises(RuntimeError, match="the device is gone") as caught:
            list(other)
        errors.append(caught)

    thread = threading.Thread(target=run)
    thread.start()
    slow.until(calls=3)
    slow.fail(RuntimeError("the device is gone"))
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(stream)
    thread.join(20)
    assert len(errors) == 1
    slow.stop()
    assert [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)] == expected


def test_control_c_ends_its_own_call_alone(llm, expected, slowly):
    slow = slowly(llm)
    stream = llm.stream("two", GREEDY)
    threading.Thread(target=lambda: (slow.until(calls=3), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one"] * 3, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True), use_tqdm=False)
    slow.stop()
    assert "".join(stream) == expected[1]
    settled(llm)
    assert [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)] == expected
