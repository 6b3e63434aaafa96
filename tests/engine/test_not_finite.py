"""Models that compute NaN or infinity: what meets them ends with an error, and nothing else does."""

import asyncio
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import LLM, AsyncEngine, SamplingParams

BAD = 7  # the token whose embedding is damaged
GOOD = [5, 6, 8]
NEW = 6
GREEDY = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    {"logprobs": 3},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"logit_bias": {9: 1.0}, "min_tokens": 3},
]


def damaged(checkpoints, folder, **values):
    """A copy with this in the row of token BAD."""
    shutil.copytree(checkpoints("llama").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[{"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}[name]][BAD] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def llm(checkpoints, tmp_path_factory):
    folder = damaged(checkpoints, tmp_path_factory.mktemp("damaged") / "model", embed=np.nan)
    with LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, page_size=8) as llm:
        yield llm
        assert llm.stats.pages_used == 0
        assert llm.engine.idle


@pytest.fixture(scope="module")
def good(llm):
    """What comes of GOOD with each of the settings, without BAD in it, or near it."""
    params = [SamplingParams(**GREEDY | s, seed=3, suppress_tokens=[BAD]) for s in SETTINGS]
    return list(zip(params, llm.generate([GOOD] * len(params), params), strict=True))


def check(output, tokens, after):
    (completion,) = output.outputs
    assert output.finished
    assert completion.finish_reason == "error"
    assert completion.token_ids == tokens
    assert f"logits after {after} tokens are NaN or infinite" in output.error
    assert "float32" in output.error


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_request_ends_with_an_error_and_others_go_on(llm, good, setting):
    params = SamplingParams(**GREEDY | setting, seed=3)
    prompts = [[4, BAD], GOOD, [BAD], GOOD]
    known = next((p, o) for p, o in good if p.temperature == params.temperature)
    first, finite, second, other = llm.generate(prompts, [params, known[0], params, good[0][0]])
    check(first, [], 2)
    check(second, [], 1)
    assert finite.error is other.error is None
    assert finite.outputs[0].token_ids == known[1].outputs[0].token_ids
    assert other.outputs[0].token_ids == good[0][1].outputs[0].token_ids
    if setting.get("logprobs"):
        assert first.outputs[0].logprobs == []


def test_on_a_mesh(llm, good):
    """Also where one shard of rows has a mask and the other one none, and the vocabulary is split within a word of it:
    no device may wait for the others there."""
    masked, plain = good[0][0].with_changes(max_tokens=1), SamplingParams(temperature=0.0, max_tokens=1)
    arguments = [[4, BAD], GOOD, [BAD], GOOD], [plain, masked, plain, masked]
    with LLM(llm.folder, max_num_seqs=8, max_num_batched_tokens=64, page_size=8, mesh="data=2,tensor=2") as split:
        first, finite, second, other = split.generate(*arguments)
        (scored,) = split.score([[4, BAD, 9]])
    check(first, [], 2)
    check(second, [], 1)
    assert finite.error is other.error is None
    assert finite.outputs[0].token_ids == other.outputs[0].token_ids == good[0][1].outputs[0].token_ids[:1]
    assert "NaN or infinite" in scored.error
    assert not scored.is_greedy


def test_what_comes_before_is_kept(llm):
    """The damaged token is sampled, and its successor can't be, in the middle of a call of many steps."""
    params = SamplingParams(**GREEDY | {"logprobs": 1}, allowed_token_ids=[BAD])
    output, *_ = llm.generate([GOOD, GOOD], [params, SamplingParams(**GREEDY)])
    check(output, [BAD], len(GOOD) + 1)
    assert len(output.outputs[0].logprobs) == 1
    assert math.isfinite(output.outputs[0].cumulative_logprob)


def test_several_continuations_and_prompt_logprobs(llm):
    params = SamplingParams(**GREEDY | {"temperature": 1.0}, n=3, prompt_logprobs=2, seed=1)
    (output,) = llm.generate([[BAD, 5, 9]], params)
    assert [completion.finish_reason for completion in output.outputs] == ["error"] * 3
    assert "NaN or infinite" in output.error


def test_a_stream_raises(llm):
    assert "".join(llm.stream(GOOD, SamplingParams(**GREEDY, suppress_tokens=[BAD])))
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(llm.stream([BAD], SamplingParams(**GREEDY)))


def test_beams(llm):
    bad, fine = llm.beam_search([[BAD], [200, 201, 202]], beam_width=2, max_tokens=3, ignore_eos=True)
    assert bad.sequences == []
    assert "NaN or infinite" in bad.error
    (alone,) = llm.beam_search([[200, 201, 202]], beam_width=2, max_tokens=3, ignore_eos=True)
    assert fine == alone
    assert fine.error is None
    assert len(fine.sequences) == 2


def test_a_score_says_so_and_is_never_right(llm):
    bad, fine = llm.score([[4, BAD, 300 - 1, 9], [4, 5, 6, 7]])
    assert "NaN or infinite" in bad.error
    assert not bad.is_greedy
    assert all(math.isnan(value) for value in bad.logprobs[1:])
    assert fine.error is None
    assert all(math.isfinite(value) for value in fine.logprobs)
    (whole,) = llm.loglikelihood_rolling([[4, BAD, 5]])
    assert "NaN or infinite" in whole.error
    # One token at a time, each the likeliest there is: rank 1 is not had for nothing.
    assert not any(output.is_greedy for output in llm.score([[BAD]] * 3, [[0], [1], [299]]))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinite_logits_of_one_token(checkpoints, tmp_path, value):
    """A row of the head: its logit is infinite, either way, or NaN, whatever the text."""
    folder = damaged(checkpoints, tmp_path / "model", head=value)
    with LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, page_size=8) as llm:
        outputs = llm.generate([[i, i + 1] for i in range(10, 18)], SamplingParams(**GREEDY | {"max_tokens": 1}))
        assert any(output.error for output in outputs)
        for output in outputs:
            (completion,) = output.outputs
            if output.error is None:  # minus infinity, of one token, is a logit like others
                assert completion.token_ids != [BAD]
            else:
                check(output, [], 2)
        assert any(output.error for output in outputs)


def test_of_many_callers_one(llm):
    async def all_of_them():
        async with AsyncEngine(llm.folder, max_num_seqs=4, max_num_batched_tokens=32, page_size=8) as engine:

            async def last(prompt):
                async for _output in engine.generate(prompt, SamplingParams(**GREEDY, suppress_tokens=[BAD])):
                    pass
                return _output

            return await asyncio.gather(*map(last, [GOOD, [BAD], GOOD]))

    finite, bad, other = asyncio.run(all_of_them())
    check(bad, [], 1)
    assert finite.error is other.error is None
    assert finite.outputs[0].token_ids == other.outputs[0].token_ids
