"""The same tokens whatever happens: 120 prompts in any order and company give what each one alone gives."""

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import all_logits
from tests.sampling.reference import adjusted, kept

COUNT = 120
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": 128}
# What is forced (chunked prefill, overlapped calls and many steps a call always are), and options for that.
CASES = {
    "prefix cache": {},
    "preemption": {"kv_cache_memory": 60 * 1024},
    "preemption with priorities": {"kv_cache_memory": 60 * 1024},
    "preemption without prefix cache": {"kv_cache_memory": 60 * 1024, "enable_prefix_caching": False},
}
SLOW = CASES.keys() - {"preemption"}


def requests() -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(7)
    beginnings = [rng.integers(0, 250, 40).tolist() for _ in range(4)]
    made = []
    for i in range(COUNT):
        prompt = beginnings[i % 4][: int(rng.integers(0, 41))] + rng.integers(0, 250, int(rng.integers(1, 30))).tolist()
        params = {"max_tokens": int(rng.integers(1, 40)), "ignore_eos": True}
        if i % 2:
            params |= {"seed": i, "temperature": 0.8, "top_k": 20 * (i % 3), "top_p": 0.95}
        else:
            params |= {"temperature": 0.0}
        if i % 10 > 7:
            params |= {"repetition_penalty": 1.2}
        if i % 20 > 17:
            params |= {"prompt_logprobs": 0}
        made.append((prompt, SamplingParams(**params)))
    return made


def gap(llm: LLM, prompt: list[int], output: list[int], params: SamplingParams) -> float:
    """How far apart the two best values are from which the token after `output` is taken."""
    values = adjusted(all_logits(llm, prompt + output, 128)[-1], prompt, output, params)
    if not params.greedy:
        stay = kept(values, params.temperature, 0, params.top_k, params.top_p)
        key = jax.random.wrap_key_data(np.array([0, params.seed], np.uint32), impl="threefry2x32")
        noise = jax.random.gumbel(jax.random.fold_in(key, len(prompt) + len(output)), values.shape, np.float32)
        values = np.where(stay, values / np.float32(params.temperature), -np.inf) + np.asarray(noise)
    second, best = np.sort(values)[-2:]
    return float(best - second)


@pytest.fixture(scope="module")
def alone(checkpoints):
    with LLM(checkpoints("llama").folder, enable_prefix_caching=False, **OPTIONS) as llm:
        return [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt, params in requests()]


@pytest.mark.parametrize(
    "forced",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_the_same_tokens_as_alone(checkpoints, alone, forced, monkeypatch):
    made = requests()
    order = np.random.default_rng(len(forced)).permutation(COUNT)
    priority = (order % 3).tolist() if "priorities" in forced else None
    with LLM(checkpoints("llama").folder, **(OPTIONS | CASES[forced])) as llm:
        schedules, overlaps = [], []
        launch = llm.engine.runner.launch

        def watched(shards):
            schedules.extend(shards)
            overlaps.append(len(llm.engine._in_flight))
            return launch(shards)

        monkeypatch.setattr(llm.engine.runner, "launch", watched)
        outputs = llm.generate([made[i][0] for i in order], [made[i][1] for i in order], priority=priority)
        for i, output in zip(order, outputs, strict=True):
            prompt, params = made[i]
            ours = output.outputs[0].token_ids
            assert len(ours) == len(alone[i])
            at = next((n for n, (a, b) in enumerate(zip(ours, alone[i], strict=True)) if a != b), None)
            assert at is None or gap(llm, prompt, ours[:at], params) < 1e-4, (forced, i, at)
        stats = llm.stats
        assert stats.finished == COUNT
        assert stats.pages_used == 0
        assert 1 in overlaps
        assert any(s.chunks and s.decode for s in schedules)
        assert any(s.start[len(s.decode) + n] > 0 for s in schedules for n, _ in enumerate(s.chunks))
        assert any(s.steps > 4 for s in schedules)
        assert (stats.hit_tokens > 500) == ("without" not in forced)
        assert (stats.preemptions > 10) == ("preemption" in forced)
