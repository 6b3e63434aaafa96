"""After the warm-up nothing compiles, whatever comes; and after thousands of requests nothing is left."""

import gc

import jax
import numpy as np
import psutil
import pytest

from jaxinfer import LLM, SamplingParams

ROWS = 8
GRAMMARS = (
    {"regex": "[0-9a-f]{2,20}(-[a-z]+)?"},
    {"choice": ["maybe", "maybe not", "never", "42"]},
    {"json": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": [1, None]}}, "required": ["b"]}},
)
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.fixture(scope="module")
def llm(checkpoints):
    messages = []
    with LLM(
        checkpoints("llama").folder,
        warmup=True,
        max_num_seqs=ROWS,
        max_num_batched_tokens=64,
        page_size=4,
        max_model_len=128,
        kv_cache_memory=100 * 1024,
        on_progress=messages.append,
    ) as llm:
        count = llm.engine.runner.compilations - 1  # without the one that made the cache
        assert f"compiled {count} of {count} programs" in messages
        yield llm


def anything(rng: np.random.Generator) -> tuple[list[int], SamplingParams]:
    """A request with any mixture of parameters."""

    def maybe(chance: float, **params):
        return params if rng.random() < chance else {}

    params = {"max_tokens": int(rng.integers(1, 30)), "temperature": float(rng.choice([0.0, 0.7, 1.5]))}
    params |= maybe(0.3, top_k=int(rng.integers(1, 400)))
    params |= maybe(0.3, top_p=float(rng.uniform(0.1, 1)))
    params |= maybe(0.2, min_p=float(rng.uniform(0, 1)))
    params |= maybe(0.2, n=int(rng.integers(2, 4)), seed=5)
    params |= maybe(0.2, presence_penalty=1.0, frequency_penalty=-0.5)
    params |= maybe(0.2, repetition_penalty=1.3)
    params |= maybe(0.2, logit_bias={int(i): 2.0 for i in rng.integers(0, 300, 3)})
    params |= maybe(0.1, allowed_token_ids=rng.integers(0, 300, 40).tolist())
    params |= maybe(0.1, bad_words=["ab", "c"])
    params |= maybe(0.2, stop=["e", "xy"], include_stop_str_in_output=True)
    params |= maybe(0.3, stop_token_ids=rng.integers(0, 300, 3).tolist())
    params |= maybe(0.3, ignore_eos=True)
    params |= maybe(0.3, logprobs=int(rng.integers(0, 21)))
    params |= maybe(0.2, prompt_logprobs=int(rng.integers(0, 21)))
    params |= {"detokenize": False} if "stop" not in params and rng.random() < 0.2 else {}
    params |= maybe(0.2, min_tokens=int(rng.integers(0, params["max_tokens"] + 1)))
    if "allowed_token_ids" not in params and rng.random() < 0.25:
        params["structured_outputs"] = GRAMMARS[rng.integers(len(GRAMMARS))]
    length = int(rng.choice([1, 5, 40, 90]))
    return rng.integers(0, 8, length).tolist(), SamplingParams(**params)


@pytest.mark.slow
def test_after_the_warm_up_nothing_compiles(llm):
    rng = np.random.default_rng(1)
    made = [anything(rng) for _ in range(500)]
    runner = llm.engine.runner
    buckets = runner.buckets
    table = len(buckets.decode) + 2 * len(buckets.full_decode) + len(buckets.tokens) + 3 * len(buckets.sample) + 6
    compilations, seconds = runner.compilations, runner.compile_seconds
    assert compilations == table
    jax.jit(lambda x: x * 3 + 1)(np.arange(7.0))
    assert COMPILED  # the count counts
    COMPILED.clear()
    outputs = llm.generate([prompt for prompt, _ in made], [params for _, params in made])
    llm.beam_search([[1, 2, 3], [4, 5]], beam_width=3, max_tokens=5)
    assert "".join(llm.stream("abc", SamplingParams(max_tokens=9)))
    assert len(list(llm.generate_iter(["a", "b"], SamplingParams(max_tokens=2)))) == 2
    assert all(output.finished for output in outputs)
    assert llm.stats.preemptions > 0
    assert (runner.compilations, runner.compile_seconds) == (compilations, seconds)
    assert COMPILED == []


def left(llm) -> tuple[int, int]:
    """Bytes of this process and live arrays."""
    gc.collect()
    return psutil.Process().memory_info().rss, len(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2000])
def test_a_soak_with_aborts(llm, count):
    rng = np.random.default_rng(count)
    engine = llm.engine
    running, aborted, finished, added, measured = [], 0, 0, 0, None
    steps = 0
    while added < count or running:
        while added < count and len(running) < 3 * ROWS:
            prompt, params = anything(rng)
            group = engine.add(prompt, params, priority=int(rng.integers(0, 3)))
            running.append((group, int(rng.integers(0, 12)) if rng.random() < 0.2 else None))
            added += 1
        engine.step()
        steps += 1
        still = []
        for group, ends in running:
            if group.finished:
                finished += 1
            elif ends is not None and ends <= 0:
                engine.abort(group)
                assert all(member.finished for member in group.members)
                aborted += 1
            else:
                still.append((group, None if ends is None else ends - 1))
        running = still
        assert steps < 40 * count, "it hangs"
        if added >= count // 2 and measured is None:
            measured = left(llm)
    assert finished + aborted == count
    assert aborted > count / 20
    assert engine.scheduler.pages_used == 0
    assert engine.idle
    assert engine.scheduler.idle
    assert not [*engine._in_flight, *engine._followers]
    rss, arrays = left(llm)
    assert arrays <= measured[1]
    assert rss - measured[0] < 30e6
