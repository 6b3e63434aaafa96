"""Many threads on one model: each gets what it would get alone."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import jaxinfer
from jaxinfer import LLM, AsyncEngine, SamplingParams
from tests.settled import settled

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, dtype="float32", **OPTIONS) as llm:
        yield llm


def work(i):
    """A prompt and parameters; no two alike."""
    prompt = [1 + (7 * i + n) % 250 for n in range(1 + i % 23)]
    return prompt, SamplingParams(
        temperature=0.8 if i % 3 else 0.0, seed=i, max_tokens=1 + i % 17, ignore_eos=True, detokenize=True
    )


@pytest.mark.parametrize(("threads", "each"), [(16, 10), pytest.param(16, 60, marks=pytest.mark.slow)])
def test_threads_get_what_one_gets(llm, threads, each):
    """Lists, streams, iterations, scores; every seventh leaves its stream at once."""
    count = threads * each
    asked = [work(i) for i in range(count)]
    expected = [o.outputs[0] for o in llm.generate([p for p, _ in asked], [q for _, q in asked], use_tqdm=False)]
    scores = [o.logprobs for o in llm.score([[1, *p, 5] for p, _ in asked[:threads]], use_tqdm=False)]

    def run(thread):
        mine = range(thread, count, threads)
        for n, i in enumerate(mine):
            prompt, params = asked[i]
            if n % 7 == 6:
                next(llm.stream(prompt, LONG))
            if n % 3 == 0:
                assert "".join(llm.stream(prompt, params)) == expected[i].text, i
            elif n % 3 == 1:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
                assert output.outputs[0].token_ids == expected[i].token_ids, i
            else:
                (output,) = llm.generate_iter(iter([(prompt, params)]))
                assert output.outputs[0].token_ids == expected[i].token_ids, i
        (score,) = llm.score([[1, *asked[thread][0], 5]], use_tqdm=False)
        assert score.logprobs == pytest.approx(scores[thread], abs=1e-4)
        return len(mine)

    before = llm.stats.aborted
    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(run, range(threads))) == count
    settled(llm)
    assert llm.stats.aborted > before


def test_beam_search_beside_others(llm):
    expected = llm.beam_search([[1, 2, 3]], beam_width=3, max_tokens=8)
    with ThreadPoolExecutor(4) as pool:
        beams = [pool.submit(llm.beam_search, [[1, 2, 3]], beam_width=3, max_tokens=8) for _ in range(2)]
        others = [pool.submit(llm.generate, [work(i)[0]], LONG, use_tqdm=False) for i in range(4)]
        for other in others:
            assert len(other.result()[0].outputs[0].token_ids) == 200
        for beam in beams:
            assert [s.token_ids for s in beam.result()[0].sequences] == [s.token_ids for s in expected[0].sequences]


def test_the_calls_of_the_package_from_many_threads(checkpoints):
    """Two models in turn: who runs on one keeps it."""
    folders = [checkpoints(name).folder for name in ("llama", "gpt2")]
    options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | OPTIONS
    expected = [jaxinfer.generate("abc", model=folder, **options) for folder in folders]
    assert expected[0] != expected[1]

    def run(i):
        texts = [jaxinfer.generate("abc", model=folders[i // 8], **options) for _ in range(2)]
        assert texts == [expected[i // 8]] * 2

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, range(16)))
    jaxinfer.unload()


def test_closing_ends_what_others_wait_for(checkpoints, slowly):
    llm = LLM(checkpoints("llama").folder, **OPTIONS)
    slow = slowly(llm)
    stream = llm.stream("two", LONG)
    with ThreadPoolExecutor(2) as pool:
        listed = pool.submit(llm.generate, ["one"] * 20, LONG, use_tqdm=False)
        slow.until(calls=4)
        llm.close()
        with pytest.raises(ValueError, match="this LLM was closed"):
            listed.result(20)
    with pytest.raises(ValueError, match="this LLM was closed"):
        list(stream)
    with pytest.raises(ValueError, match="this LLM was closed"):
        llm.stream("a")


def test_an_abandoned_model_ends_its_thread(checkpoints):
    llm = LLM(checkpoints("llama").folder, **OPTIONS)
    llm.generate("a", LONG, use_tqdm=False)
    thread, engine = llm.engine_thread._thread, weakref.ref(llm.engine)
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


# --- sources that are slow, wait, or fail


def test_answers_come_while_the_source_is_waited_for(llm):
    """It waits for each answer before it gives the next prompt."""
    answered = threading.Semaphore(1)

    def source():
        for i in range(5):
            assert answered.acquire(timeout=20)
            yield [1, 2, i]

    places = []
    for output in llm.generate_iter(source(), SamplingParams(max_tokens=3, temperature=0.0)):
        places.append(output.index)
        answered.release()
    assert places == list(range(5))


def test_the_device_does_not_wait_for_a_slow_source(llm, slowly):
    slow = slowly(llm, 0.0)
    more = threading.Event()

    def source():
        yield [1, 2, 3]
        assert more.wait(20)  # until the first prompt has been computed
        yield [4, 5]

    outputs = llm.generate_iter(source(), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    first = next(outputs)
    assert len(first.outputs[0].token_ids) == 3
    assert slow.calls >= 3
    more.set()
    assert len(list(outputs)) == 1


def test_a_fast_source_begins_together(llm, slowly):
    slow = slowly(llm, 0.0)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for prompts in ([[1, 2, i] for i in range(8)], ([1, 2, i] for i in range(8))):
        before = slow.calls
        outputs = llm.generate(prompts, params, use_tqdm=False) if isinstance(prompts, list) else None
        assert len(outputs or list(llm.generate_iter(prompts, params))) == 8
        assert slow.calls - before <= 4


@pytest.mark.parametrize("kind", ["raises", "bad prompt"])
def test_an_error_of_the_source_loses_nothing(llm, kind):
    def source():
        for i in range(30):
            yield [1, 2, i]
        if kind == "raises":
            raise OSError("the disk is gone")
        yield [999]

    params, seen = SamplingParams(max_tokens=3, temperature=0.0), []
    error = OSError if kind == "raises" else ValueError
    with pytest.raises(error, match="the disk is gone" if kind == "raises" else "prompt 30: .* 999"):
        seen.extend(output.index for output in llm.generate_iter(source(), params))
    assert sorted(seen) == list(range(30))
    settled(llm)


def test_who_leaves_while_the_source_is_waited_for_leaves_nothing(llm):
    more = threading.Event()

    def source():
        yield [1, 2, 3]
        more.wait(20)
        yield [1, 2, 3]

    outputs = llm.generate_iter(source(), LONG)
    next(outputs)
    outputs.close()
    before = llm.stats.finished
    more.set()
    time.sleep(0.05)
    settled(llm)
    assert llm.stats.finished == before


# --- AsyncEngine


def hostile(i):
    """Prompts, parameters and options of `generate` that are no good, each in its own way."""
    good = SamplingParams(max_tokens=3)
    bias = {5: 1.0}
    changed = SamplingParams(max_tokens=3, logit_bias=bias)
    bias.update(dict.fromkeys(range(600), 1.0))
    return [
        ("abc", SamplingParams(max_tokens=3, bad_words=["\ud800"]), {}),
        ("abc", SamplingParams(max_tokens=3, stop=["\ud800"]), {}),
        ("abc", changed, {}),
        ("abc", good, {"priority": "1"}),
        ("abc", good, {"priority": None}),
        ([10**9], good, {}),
        ("\ud800", good, {}),
        (None, good, {}),
        ("abc", {"temperature": 1}, {}),
        ("abc", SamplingParams(max_tokens=3, logit_bias={10**6: 1.0}), {}),
    ][i % 10]


def test_hostile_requests_harm_nobody(llm, checkpoints):
    async def last_output(engine, prompt, params, **options):
        return [output async for output in engine.generate(prompt, params, **options)][-1]

    async def run():
        async with AsyncEngine(checkpoints("llama").folder, dtype="float32", **OPTIONS) as engine:
            tasks = []
            for i in range(300):
                if i % 10 == 5:
                    prompt, params, options = hostile(i // 10)
                    tasks.append(asyncio.create_task(last_output(engine, prompt, params, **options)))
                else:
                    tasks.append(asyncio.create_task(last_output(engine, *work(i))))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(settled, engine)
            assert not engine._open
            return results

    results = asyncio.run(run())
    good = [i for i in range(300) if i % 10 != 5]
    asked = [work(i) for i in good]
    outputs = llm.generate([p for p, _ in asked], [q for _, q in asked], use_tqdm=False)
    assert [results[i].outputs[0].token_ids for i in good] == [output.outputs[0].token_ids for output in outputs]
    refused = 0
    for i in set(range(300)) - set(good):
        harmless = (i // 10) % 10 in (1, 2)  # a stop that can't come, and a dict of the caller's that was changed since
        assert harmless or isinstance(results[i], ValueError), (i, results[i])
        refused += isinstance(results[i], ValueError)
    assert refused >= 24


def test_a_name_is_free_when_its_request_has_ended(checkpoints):
    async def run():
        async with AsyncEngine(checkpoints("llama").folder, **OPTIONS) as engine:
            for _ in range(20):  # at once, from within the loop that reads its last output
                first = engine.generate([1, 2], SamplingParams(max_tokens=2, ignore_eos=True), request_id="mine")
                async for output in first:
                    if output.finished:
                        break
                second = engine.generate([1, 2], LONG, request_id="mine")
                await anext(second)
                await first.aclose()  # of the one before: the name is another's now
                output = [output async for output in second][-1]
                assert output.outputs[0].finish_reason == "length"
                assert len(output.outputs[0].token_ids) == 200

    asyncio.run(run())


def test_closing_ends_those_that_have_not_begun(checkpoints, slowly):
    async def run():
        engine = AsyncEngine(checkpoints("llama").folder, **OPTIONS)
        slow = slowly(engine, 0.05)

        async def finish_reason(i):
            return [output async for output in engine.generate(work(i)[0], LONG)][-1].outputs[0].finish_reason

        running = [asyncio.create_task(finish_reason(i)) for i in range(4)]
        await asyncio.to_thread(slow.until, 2)
        late = [asyncio.create_task(finish_reason(i)) for i in range(20)]
        await asyncio.sleep(0)  # they are submitted; the thread is within a call
        await asyncio.to_thread(engine.close)
        reasons = await asyncio.wait_for(asyncio.gather(*running, *late), 20)
        assert set(reasons) == {"abort"}

    asyncio.run(run())


def test_a_closed_event_loop_harms_nobody(checkpoints, llm):
    """Its tasks are gone without a word; the engine goes on."""
    engine = AsyncEngine(checkpoints("llama").folder, dtype="float32", **OPTIONS)

    async def leave():
        outputs = engine.generate([1, 2], LONG)
        await anext(outputs)
        return outputs

    for _ in range(random.Random(0).randrange(3, 6)):
        asyncio.run(leave())

    async def token_ids():
        return [output async for output in engine.generate(*work(4))][-1].outputs[0].token_ids

    assert asyncio.run(token_ids()) == llm.generate([work(4)[0]], work(4)[1], use_tqdm=False)[0].outputs[0].token_ids
    settled(engine)
    engine.close()


FREED_LATE = """
import threading, time
from jaxinfer.engine.thread import EngineThread

class Engine:
    idle = True
    def drop_all(self, reason): pass
    def __del__(self):
        begun.set()
        time.sleep(0.5)  # what frees the device's memory is in C++, where Python's end would abort the process
        print("freed")

begun = threading.Event()
EngineThread(Engine(), "LLM")
begun.wait()
"""


def test_the_end_waits_for_threads_that_free_what_they_had():
    done = subprocess.run([sys.executable, "-c", FREED_LATE], capture_output=True, text=True, check=True)
    assert done.stdout == "freed\n"
