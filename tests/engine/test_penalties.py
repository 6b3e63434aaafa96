"""Penalties, biases and masks through the whole engine, against generation step by step in numpy and transformers."""

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import greedy, same
from tests.refusals import line

NEW = 30
SETTINGS = [
    {"presence_penalty": 1.5},
    {},
    {"frequency_penalty": 0.9},
    {"repetition_penalty": 1.4},
    {"presence_penalty": -1.0, "frequency_penalty": 0.3, "repetition_penalty": 0.8},
    {"logit_bias": {7: 3.0, 200: 2.5, 11: -50.0}},
    {"allowed_token_ids": list(range(40, 90))},
    {"bad_words": ["a", "th"], "logit_bias": dict.fromkeys(range(83, 95), 5.0)},
    {"repetition_penalty": 1.2, "bad_words": ["q"], "allowed_token_ids": list(range(250))},
]


@pytest.fixture(scope="module")
def llm(checkpoints):
    # 37 pages of four tokens: not enough for four rows.
    with LLM(
        checkpoints("llama").folder,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        page_size=4,
        max_model_len=120,
        kv_cache_memory=38 * 1024,
    ) as llm:
        assert llm.sizes.num_pages == 38
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    prompts = [np.random.default_rng(i).integers(0, 250, 20 + 4 * (i % 3)).tolist() for i in range(len(SETTINGS))]
    params = [SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, **s) for s in SETTINGS]
    return [(p, s, *greedy(llm, p, s)) for p, s in zip(prompts, params, strict=True)]


def check(llm, cases):
    outputs = llm.generate([case[0] for case in cases], [case[1] for case in cases])
    for output, (_, params, tokens, gaps) in zip(outputs, cases, strict=True):
        assert same(output.outputs[0].token_ids, tokens, gaps), params
    return outputs


def test_the_settings_matter(llm, expected):
    for prompt, params, tokens, _ in expected:
        plain, _ = greedy(llm, prompt, SamplingParams(temperature=0.0, max_tokens=NEW))
        assert (tokens != plain) == (params != SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True))


def test_one_by_one_in_one_slot(llm, expected):
    """Each follows another one in the same slot, which must leave nothing there."""
    for case in [*expected, *reversed(expected)]:
        check(llm, [case])


def test_together_with_preemptions(llm, expected):
    before = llm.stats.preemptions
    outputs = check(llm, expected * 3)
    assert llm.stats.preemptions > before + 5
    penalized = [o for o, case in zip(outputs, expected * 3, strict=True) if case[1].has_penalties]
    assert any(output.metrics.preemptions for output in penalized)
    assert llm.stats.pages_used == 0


def test_min_tokens_and_stop_ids(llm):
    prompt = [5, 6, 7]
    plain, _ = greedy(llm, prompt, SamplingParams(temperature=0.0, max_tokens=NEW))
    stop = plain[4]
    for least in (0, 3, 6, 12):
        params = SamplingParams(temperature=0.0, max_tokens=NEW, min_tokens=least, stop_token_ids=[stop])
        tokens, gaps = greedy(llm, prompt, params, (stop, *llm.engine.eos_token_ids))
        (output,) = check(llm, [(prompt, params, tokens, gaps)])
        assert len(tokens) > least
        assert output.outputs[0].finish_reason == ("stop" if tokens[-1] == stop else "length")


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [0], "min_tokens": 5, "stop_token_ids": [0]},
        {"allowed_token_ids": [0, 1], "min_length": 3, "stop_token_ids": [0, 1], "top_k": 5, "top_p": 0.9},
        {"allowed_token_ids": [7, 8], "suppress_tokens": [8], "begin_suppress_tokens": [7]},
        {"allowed_token_ids": [7], "bad_words_ids": [[7], [8, 9]]},
        {"suppress_tokens": list(range(300))},
    ],
)
def test_parameters_that_leave_no_token_are_refused(llm, fields):
    """Each excludes what it does, so there is no answer; what can be seen beforehand is."""
    text = line(lambda: llm.generate([5, 6], SamplingParams(max_tokens=9, **fields)))
    assert text.startswith("sampling parameters ")
    assert text.endswith("leave no token to sample: exclude fewer")
    assert all((name in text) == (name not in ("top_k", "top_p")) for name in fields)


def test_parameters_that_leave_no_token_on_the_way(llm, expected):
    """The second token can't be: that request ends there with an error, and those beside it don't notice."""
    alone = SamplingParams(temperature=0.0, max_tokens=9, allowed_token_ids=[7], no_repeat_ngram_size=1)
    drawn = SamplingParams(max_tokens=9, allowed_token_ids=[7], no_repeat_ngram_size=2, top_p=0.5, min_p=0.1, seed=1)
    prompts, params = [[5, 6], [5, 6], expected[0][0]], [alone, drawn, expected[0][1]]
    *failed, good = llm.generate(prompts, params)
    for output, tokens in zip(failed, ([7], [7, 7]), strict=True):
        assert output.outputs[0].token_ids == tokens
        assert output.outputs[0].finish_reason == "error"
        assert output.error == f"no token is left after {2 + len(tokens)}: the sampling parameters exclude all of them"
    assert good.error is None
    assert same(good.outputs[0].token_ids, *expected[0][2:])
    assert llm.engine.idle


def test_transformers_generate_agrees(checkpoints, llm):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama").folder).eval()
    # transformers counts the prompt among what bad words follow; the prompts here have none of their letters.
    bad = [llm.tokenizer.encode(word, add_special_tokens=False) for word in ("ab", "a")]
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(100, 250, 12).tolist()
        ids = torch.tensor([prompt])
        bias = {3 + seed: 4.0, 90: 3.0}
        shared = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
        # transformers applies the bias after the penalty, so they are compared one at a time.
        (only,) = llm.generate(prompt, SamplingParams(repetition_penalty=1.3, **shared))
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, repetition_penalty=1.3
        )[0, len(prompt) :].tolist()
        _, gaps = greedy(llm, prompt, SamplingParams(repetition_penalty=1.3, **shared))
        assert same(only.outputs[0].token_ids, theirs, gaps)
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            bad_words_ids=bad,
            sequence_bias={(i,): b for i, b in bias.items()},
        )[0, len(prompt) :].tolist()
        params = SamplingParams(bad_words=["ab", "a"], logit_bias=bias, **shared)
        (only,) = llm.generate(prompt, params)
        _, gaps = greedy(llm, prompt, params)
        assert same(only.outputs[0].token_ids, theirs, gaps)
