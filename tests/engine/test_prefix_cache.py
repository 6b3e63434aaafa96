"""The prefix cache: what it has is not computed again, and nobody can tell from the tokens."""

import json
import shutil

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import all_logits, same

SHARED, REQUESTS, NEW = 512, 200, 4
OPTIONS = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 640}


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    """The tiny Llama, for a longer context."""
    folder = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(checkpoints("llama").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 250, SHARED).tolist()
    return [shared + rng.integers(0, 250, 1 + i % 23).tolist() for i in range(REQUESTS)]


PARAMS = [
    SamplingParams(
        temperature=float(i % 2), seed=i, max_tokens=NEW, ignore_eos=True, logprobs=2, presence_penalty=i % 3 / 2
    )
    for i in range(REQUESTS)
]


def run(llm):
    outputs = llm.generate(prompts(), PARAMS)
    assert llm.stats.pages_used == 0
    return [output.outputs[0] for output in outputs]


@pytest.fixture(scope="module")
def without(folder):
    with LLM(folder, enable_prefix_caching=False, **OPTIONS) as llm:
        completions = run(llm)
        assert llm.stats.hit_tokens == 0
        return completions, llm.stats


def check_same(llm, ours, theirs):
    """Tokens are equal but where the two best logits lie within 1e-4 (greedy; a draw is compared by its logits)."""
    different = 0
    for prompt, params, a, b in zip(prompts(), PARAMS, ours, theirs, strict=True):
        if a.token_ids == b.token_ids:
            continue
        different += 1
        if params.greedy and not params.has_penalties:
            values = np.sort(all_logits(llm, prompt + b.token_ids, 640)[len(prompt) - 1 : -1], axis=-1)
            assert same(a.token_ids, b.token_ids, values[:, -1] - values[:, -2])
    assert different <= REQUESTS // 100


@pytest.mark.slow
def test_a_common_beginning_is_computed_once(folder, without):
    completions, stats = without
    with LLM(folder, **OPTIONS) as llm:
        ours = run(llm)
        assert llm.stats.prefill_tokens * 8 <= stats.prefill_tokens
        assert llm.stats.hit_tokens >= SHARED * (REQUESTS - 16)
        assert llm.stats.queried_tokens == sum(map(len, prompts()))
        assert 0.9 < llm.stats.hit_rate < 1
        check_same(llm, ours, completions)
        hits = llm.stats.hit_tokens
        check_same(llm, run(llm), completions)  # now even the first one finds it
        assert llm.stats.hit_tokens - hits >= SHARED * REQUESTS


@pytest.mark.slow
def test_with_hardly_any_room(folder, without):
    """Room for two sequences: pages are evicted and requests preempted all the time."""
    bytes_per_page = 256 * 16
    with LLM(folder, kv_cache_memory=bytes_per_page * 42, page_size=16, **OPTIONS) as llm:
        assert llm.sizes.num_pages == 42
        others = [np.random.default_rng(100 + i).integers(0, 250, 600).tolist() for i in range(3)]
        kept = llm.generate(others, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        check_same(llm, run(llm), without[0])
        hits = llm.stats.hit_tokens
        assert hits >= SHARED * (REQUESTS - 16)
        again = llm.generate(others, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        assert llm.stats.hit_tokens == hits  # evicted
        assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in kept]


def test_prompts_of_another_salt_share_nothing(checkpoints):
    prompt = np.random.default_rng(3).integers(0, 250, 40).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    def hits(salt):
        before = llm.stats.hit_tokens
        request = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        (output,) = llm.generate([request], params, use_tqdm=False)
        tokens.add(tuple(output.outputs[0].token_ids))
        return llm.stats.hit_tokens - before

    tokens = set()
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=32, page_size=8) as llm:
        assert [hits(salt) for salt in ("", "", "a", "a", "b", "")] == [0, 32, 0, 32, 0, 32]
        (beams,) = llm.beam_search([{"prompt_token_ids": prompt, "cache_salt": "c"}], beam_width=2, max_tokens=2)
        assert llm.stats.hit_tokens == 4 * 32 - 32 + 2 * 40  # both beams of the second step, of that salt alone
        for salt in ("", 5, ["a"]):
            with pytest.raises(ValueError, match=r"cache_salt is .*: it must be a text"):
                llm.generate([{"prompt": "x", "cache_salt": salt}], params, use_tqdm=False)
        llm.generate([{"prompt": "x", "cache_salt": None}], params, use_tqdm=False)
    assert len(tokens) == 1
    assert beams.sequences[0].token_ids
