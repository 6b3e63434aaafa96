"""Prefixes of models whose layers keep a state of a sequence: what is known is not computed again, and nobody can tell
from the tokens. That is seen by a salt, under which nothing is known."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.test_recurrent import ALONE, DELTA_NETS, OPTIONS
from tests.plain import random_tensors, write_checkpoint

CONVOLUTIONS = {
    "model_type": "lfm2",
    **{name: DELTA_NETS[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")},
    "layer_types": ["conv", "full_attention"],
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "block_multiple_of": 8,
    "max_position_embeddings": 2048,
}
MODELS = {"delta nets": DELTA_NETS, "mamba": ALONE, "convolutions": CONVOLUTIONS}
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
RNG = np.random.default_rng(6)


def ids(count):
    return RNG.integers(0, 256, count).tolist()


def folder_of(name, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("states") / "model", MODELS[name], random_tensors(MODELS[name]))


@pytest.fixture(
    scope="module", params=["delta nets", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def llm(request, tmp_path_factory):
    with LLM(folder_of(request.param, tmp_path_factory), **OPTIONS) as llm:
        yield llm


def run(llm, prompts, params, salt=None):
    """Tokens, and how many were computed of prompts."""
    before = llm.stats.prefill_tokens
    asked = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts]
    outputs = llm.generate(asked, params, use_tqdm=False)
    tokens = [each.token_ids for output in outputs for each in output.outputs]
    return tokens, llm.stats.prefill_tokens - before


def test_a_chat(llm):
    """Each turn computes what is new, and the token that was sampled last. It is the same where nothing is known."""
    said = ids(20)
    for turn in range(10):
        (answer,), work = run(llm, [said], GREEDY)
        assert work == (20 if turn == 0 else 6)
        if turn in (1, 9):
            assert run(llm, [said], GREEDY, f"turn {turn}") == ([answer], len(said))
        said += answer + ids(5)


def test_continuations_and_beams(llm):
    """They compute their prompt once, but for less than a page; and a beam the token that it was chosen for."""
    prompt, params = ids(61), {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True}
    tokens, work = run(llm, [prompt], SamplingParams(n=3, seed=5, **params))
    assert work == 61 + 2 * (61 - 56)
    assert tokens == [run(llm, [prompt], SamplingParams(seed=5 + i, **params), f"{i}")[0][0] for i in range(3)]
    before = llm.stats.prefill_tokens
    llm.beam_search([{"prompt_token_ids": ids(77)}], beam_width=3, max_tokens=5)
    assert llm.stats.prefill_tokens - before == 77 + 4 * 3


def test_where_a_stop_is(llm):
    """One that the device sees in the middle of a loop ends where it is; after one that only the host sees the state is
    further, and what is known ends with the prompt."""
    prompt = ids(41)
    (answer,), _ = run(llm, [prompt], GREEDY)
    for stop, known in (({"stop_token_ids": [answer[6]]}, True), ({"stop": llm.tokenizer.decode(answer[4:7])}, False)):
        params = replace(GREEDY, max_tokens=30, **stop)
        (cut,), _ = run(llm, [prompt], params, str(known))
        assert cut == answer[: len(cut)]
        said = [*prompt, *cut, *ids(9)]
        tokens, work = run(llm, [said], GREEDY, str(known))
        assert work == (10 if known else len(said) - 40)
        assert (tokens, len(said)) == run(llm, [said], GREEDY, f"new {known}")


SHARED = ids(100)
PROMPTS = [SHARED + ids(40) for _ in range(20)]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A folder, and what comes of prompts where nothing is shared."""
    folder = folder_of("delta nets", tmp_path_factory)
    with LLM(folder, enable_prefix_caching=False, **OPTIONS) as llm:
        assert llm.stats.snapshots_total == llm.sizes.snapshots == 0
        assert ("copy", 4) not in llm.engine.runner.programs.table
        tokens, work = run(llm, PROMPTS, GREEDY)
        return folder, tokens, work, llm.sizes.bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "less"),
    [({}, 2.5), ({"mesh": "data=2,tensor=2"}, 1.8), ({"quantization": "int8"}, 2.5), ({"kv_cache_memory": 0.35}, 2.2)],
    ids=str,
)
def test_many_that_share(hybrid, more, less):
    """Twenty at once, that have 100 of 140 tokens in common: also on a mesh, whose shards of rows share nothing, and
    with so little memory that rows are preempted, and copies and pages evicted."""
    folder, expected, without, size = hybrid
    if "kv_cache_memory" in more:
        more = {"kv_cache_memory": int(more["kv_cache_memory"] * size), "max_model_len": 160}
    with LLM(folder, **OPTIONS | more) as llm:
        tokens, work = run(llm, PROMPTS, GREEDY)
        assert tokens == expected or "quantization" in more
        assert work * less <= without
        stats = llm.stats
        assert (
            0 < stats.snapshots_used <= stats.snapshots_total == llm.sizes.snapshots * len(llm.engine.scheduler.shards)
        )
        assert stats.stateless_tokens >= 96
        assert (stats.preemptions > 0) == ("kv_cache_memory" in more)
        assert run(llm, PROMPTS, GREEDY)[0] == tokens


def test_no_room_for_copies(tmp_path_factory):
    folder = folder_of("mamba", tmp_path_factory)
    with pytest.raises(
        ValueError, match=r"enable_prefix_caching is True: layers of .* a KV cache of [\d,]+ bytes has no ro"
    ):
        LLM(folder, enable_prefix_caching=True, kv_cache_memory=4608 * 5 + 4608, **OPTIONS)
