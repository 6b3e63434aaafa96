"""AsyncEngine: many callers at once; what is aborted, cancelled or refused leaves nothing behind."""

import asyncio
import itertools

import pytest

from jaxinfer import LLM, AsyncEngine, QueueFullError, SamplingParams
from tests.settled import settled as left_nothing

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
PROMPTS = [f"prompt number {i}" for i in range(10)]


@pytest.fixture(scope="module")
def expected(checkpoints):
    with LLM(checkpoints("llama").folder, **OPTIONS) as llm:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def engine(checkpoints):
    engine = AsyncEngine(checkpoints("llama").folder, max_queued=16, **OPTIONS)
    yield engine
    engine.close()


async def last(engine, prompt, params=GREEDY, **options):
    texts = []
    async for output in engine.generate(prompt, params, **options):
        texts.append(output.outputs[0].text)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert output.finished
    return output


async def settled(engine):
    """Waits until nothing runs, and looks that nothing was left."""
    await asyncio.to_thread(left_nothing, engine)
    assert not engine._open


def test_many_at_once_give_what_each_alone_gives(engine, expected):
    async def run():
        outputs = await asyncio.gather(*(last(engine, prompt) for prompt in PROMPTS))
        assert [output.outputs[0].text for output in outputs] == expected
        await settled(engine)

    asyncio.run(run())


def test_deltas_joined_are_the_output(engine):
    """Of several prompts at once, each with several continuations; the prompt's own come with the first one."""
    params = SamplingParams(temperature=0.9, seed=1, n=2, max_tokens=12, ignore_eos=True)

    async def run():
        whole = [await last(engine, prompt, params) for prompt in PROMPTS[:3]]
        texts, counts, prompts = {}, {}, {}
        async for arrived in engine.deltas([engine.new_group(prompt, params) for prompt in PROMPTS[:3]]):
            for output in arrived:
                prompts.setdefault(output.index, output.prompt_token_ids)
                for choice in output.outputs:
                    key = output.index, choice.index
                    texts[key] = texts.get(key, "") + choice.text
                    counts[key] = counts.get(key, 0) + len(choice.token_ids)
        assert texts == {(i, choice.index): choice.text for i, o in enumerate(whole) for choice in o.outputs}
        assert set(counts.values()) == {12}
        assert [prompts[i] for i in range(3)] == [output.prompt_token_ids for output in whole]
        await settled(engine)

    asyncio.run(run())


def test_cancelling_the_task_aborts(engine, expected):
    async def run():
        task = asyncio.create_task(last(engine, PROMPTS[0], LONG))
        other = asyncio.create_task(last(engine, PROMPTS[1]))
        while not engine.stats.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).outputs[0].text == expected[1]
        await settled(engine)

    asyncio.run(run())


def test_abort_ends_the_stream(engine):
    async def run():
        outputs = []
        async for output in engine.generate(PROMPTS[0], LONG, request_id="mine"):
            outputs.append(output)
            engine.abort("mine")
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].finish_reason in ("abort", "length")
        engine.abort("mine")  # has ended
        engine.abort("never seen")
        await settled(engine)

    asyncio.run(run())


def test_a_full_queue_refuses_and_an_id_is_used_once(engine):
    async def run():
        tasks = [asyncio.create_task(last(engine, PROMPTS[0], LONG)) for _ in range(40)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in results if isinstance(r, QueueFullError)]
        assert refused
        assert "max_queued is 16" in str(refused[0])
        assert all(r.finished for r in results if not isinstance(r, BaseException))
        assert len(refused) + sum(not isinstance(r, BaseException) for r in results) == 40
        twice = [asyncio.create_task(last(engine, PROMPTS[0], LONG, request_id="one")) for _ in range(2)]
        first, second = await asyncio.gather(*twice, return_exceptions=True)
        assert first.finished
        assert isinstance(second, ValueError)
        assert "'one' is in use" in str(second)
        await settled(engine)

    asyncio.run(run())


def test_bad_input_is_refused_at_once(engine):
    async def run():
        for prompt, message in ((" " * 300, "the prompt has 300 tokens"), ("", "the prompt is empty"), ([999], "999")):
            with pytest.raises(ValueError, match=message):
                await last(engine, prompt)
        with pytest.raises(ValueError, match="sampling_params is a dict"):
            await last(engine, "x", {"temperature": 1})
        await settled(engine)

    asyncio.run(run())


def test_a_failure_reaches_every_caller_and_a_closed_engine_refuses(checkpoints):
    engine = AsyncEngine(checkpoints("llama").folder, **OPTIONS)

    def fail(schedule):
        raise RuntimeError("the device is gone")

    launch, engine.engine_thread.engine.runner.launch = engine.engine_thread.engine.runner.launch, fail

    async def run():
        results = await asyncio.gather(*(last(engine, p) for p in PROMPTS[:3]), return_exceptions=True)
        assert all(isinstance(r, RuntimeError | ValueError) and "the device is gone" in str(r) for r in results)
        engine.engine_thread.engine.runner.launch = launch  # it is back
        assert (await last(engine, "x")).finished

    asyncio.run(run())
    engine.close()
    with pytest.raises(ValueError, match="was closed"):
        asyncio.run(last(engine, "x"))
