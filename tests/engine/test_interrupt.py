"""Ctrl-C in the middle of a step, as in a notebook: the next call must find everything in order."""

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.generation import Generation
from jaxinfer.engine.runner import Launched, Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.shards import Shards

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
        (Runner, "_launch_step"),
        (Runner, "_launch_decode"),
        (Runner, "_executable"),  # the program runs, and its results, the cache among them, never arrive
        (Launched, "wait"),
        (Shards, "add"),
        (Scheduler, "schedule"),
        (Scheduler, "publish"),
        (Scheduler, "finish"),
        (Generation, "accept"),
    ],
)
def test_an_interrupted_step_leaves_nothing_behind(llm, expected, monkeypatch, owner, method):
    """The method does its work, and its result is lost."""
    stream = llm.stream_output("two", GREEDY)  # a second one, in the middle of its text
    pieces = [next(stream)[0], next(stream)[0]]
    original = getattr(owner, method)

    def broken_off(*arguments):
        result = original(*arguments)
        raise KeyboardInterrupt(f"lost: {result}")

    monkeypatch.setattr(owner, method, broken_off)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one"], GREEDY)
    monkeypatch.undo()
    assert [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)] == expected
    if method != "accept":  # its token is taken, its text is not
        assert "".join([*pieces, *(piece for piece, _ in stream)]) == expected[1]
    stream.close()
    assert llm.engine.scheduler.pages_used == 0
    assert not llm.engine.scheduler.running
