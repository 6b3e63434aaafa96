"""`LLM.score`: log-probabilities of given texts, whatever is beside them, in the cache, or in the way."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import LLM, RequestError, SamplingParams, ScoreOutput, UnsupportedError
from jaxinfer.engine.scoring import encode_pair, encode_text, prefix_token_id, rolling_windows
from tests.engine.reference import all_logits
from tests.refusals import line

RNG = np.random.default_rng(0)


def ids(length: int) -> list[int]:
    return RNG.integers(0, 250, length).tolist()


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=200, page_size=4) as llm:
        yield llm
        assert llm.stats.pages_used == llm.stats.running == llm.stats.waiting == 0


def logprobs(llm: LLM, prompt: list[int], scored: list[int]) -> np.ndarray:
    """By a forward over the whole, without a cache."""
    whole = prompt + scored
    logits = all_logits(llm, whole[:-1]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return values[np.arange(len(prompt) - 1, len(whole) - 1), scored]


def check(llm: LLM, output, prompt: list[int], scored: list[int]) -> None:
    assert output.error is None
    assert output.token_ids == scored
    assert output.num_prompt_tokens == len(prompt)
    expected = logprobs(llm, prompt, scored)
    np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)
    assert output.logprob == pytest.approx(expected.sum(), abs=1e-3)
    assert output.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)


def test_texts_and_continuations(llm):
    texts = [ids(n) for n in (2, 3, 150, 40, 256, 17)]  # of one token that is scored, and more than a call takes
    for output, text in zip(llm.score(texts), texts, strict=True):
        check(llm, output, text[:1], text[1:])
    pairs = [(ids(a), ids(b)) for a, b in ((1, 1), (100, 1), (1, 100), (130, 120), (7, 9))]
    outputs = llm.score([prompt for prompt, _ in pairs], [scored for _, scored in pairs])
    for output, pair in zip(outputs, pairs, strict=True):
        check(llm, output, *pair)
    assert [output.index for output in outputs] == list(range(5))


def test_one_prompt_many_continuations_share_its_pages(llm):
    prompt, continuations = ids(100), [ids(3) for _ in range(12)]
    before = llm.stats
    outputs = llm.score(prompt, continuations)
    for output, scored in zip(outputs, continuations, strict=True):
        check(llm, output, prompt, scored)
    # The last token's logits are wanted; those that run in the first call find nothing.
    assert 10 * 96 <= llm.stats.hit_tokens - before.hit_tokens <= 11 * 96
    # A prompt's scored tokens are never taken from the cache, even where the cache has them.
    (again,) = llm.score([prompt])
    check(llm, again, prompt[:1], prompt[1:])


def test_greedy_is_what_generate_would_have_said(llm):
    prompts = [ids(n) for n in (5, 30, 60)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    greedy = [output.outputs[0] for output in llm.generate(prompts, params)]
    outputs = llm.score(prompts, [completion.token_ids for completion in greedy])
    for output, completion in zip(outputs, greedy, strict=True):
        assert output.is_greedy
        assert output.logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
    other = [[(t + 1) % 250 if i == 7 else t for i, t in enumerate(c.token_ids)] for c in greedy]
    assert not any(output.is_greedy for output in llm.score(prompts, other))


def test_beside_generation_and_preempted(checkpoints, slowly):
    """In a cache with room for little more than one: what is computed once more is not scored twice."""
    with LLM(
        checkpoints("llama").folder, max_num_seqs=4, page_size=4, kv_cache_memory=45 * 4 * 256, max_num_batched_tokens=8
    ) as llm:
        slowly(llm)  # or the stream may be at its end before the texts are there
        texts = [ids(120) for _ in range(3)]
        stream = llm.stream_output(ids(40), SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
        next(stream)
        for output, text in zip(llm.score(texts), texts, strict=True):
            check(llm, output, text[:1], text[1:])
        assert len(list(stream)[-1][1].outputs[0].token_ids) == 100
        assert llm.stats.preemptions > 0


def test_text_and_its_units(llm):
    text = "Zwölf Boxkämpfer jagen Viktor."
    (output,) = llm.score(text)
    assert output.text == text
    nats = -output.logprob
    assert output.word_perplexity == pytest.approx(math.exp(nats / 4))
    assert output.byte_perplexity == pytest.approx(math.exp(nats / len(text.encode())))
    (pair,) = llm.score(["Zwölf Boxkämpfer "], ["jagen Viktor."])
    assert pair.text == "jagen Viktor."
    assert pair.logprobs == pytest.approx(output.logprobs[-len(pair.logprobs) :], abs=1e-4)


def test_an_iterable_that_never_ends_and_has_bad_items(llm):
    def items():
        for i in itertools.count():
            yield [ids(3), [1, 10**6], (ids(4), ids(2)), ([], [1]), (ids(250), ids(40))][i % 5]

    with pytest.raises(ValueError, match=r"^text 1: the text has token id 1000000: the model's ids go from 0 to 299$"):
        list(llm.score_iter(items()))
    outputs = list(itertools.islice(llm.score_iter(items(), in_order=True, on_error="return"), 50))
    assert [output.index for output in outputs] == list(range(50))
    assert [len(output.token_ids) for output in outputs[:5]] == [2, 0, 2, 1, 0]
    assert "ids go from 0 to 299" in outputs[1].error
    assert outputs[4].error.startswith("the text has 290 tokens: with max_model_len 256 it may have at most 257;")


def test_what_can_not_be_scored(llm):
    for texts, continuations, message in (
        (["ab", ""], None, "text 1: the text has 0 tokens"),
        (["a", "b"], ["c"], "continuations: 1 for 2 prompts; give one each"),
        ("a", "", "adds no token to the prompt"),
        ("a", [5], "must both be text, or both be token ids"),
        ([[5]], None, "the text has 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.score(texts, continuations)
    with pytest.raises(ValueError, match="score_iter takes an iterable"):
        llm.score_iter("a")
    with pytest.raises(ValueError, match="text 1 is empty"):
        llm.loglikelihood_rolling(["a", ""])


def test_a_text_longer_than_the_context_is_scored_in_windows(llm):
    length = llm.sizes.max_model_len
    text = ids(2 * length + 100)
    first = prefix_token_id(llm.tokenizer)
    short, output = llm.loglikelihood_rolling([ids(3), text])
    assert len(short.logprobs) == 3
    assert output.token_ids == text
    expected = [
        logprobs(llm, [first], text[:length]),
        logprobs(llm, text[length - 1 : length], text[length : 2 * length]),
        logprobs(llm, text[length + 99 : 2 * length], text[2 * length :]),
    ]
    np.testing.assert_allclose(output.logprobs, np.concatenate(expected), atol=1e-4)


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_are_those_of_lm_eval(total, length):
    utils = pytest.importorskip("lm_eval.utils")
    text = list(range(1, total + 1))
    windows = utils.get_rolling_token_windows(text, 0, length, 1)
    assert list(rolling_windows(text, 0, length)) == [utils.make_disjoint_window(window) for window in windows]


def test_where_prompt_and_continuation_meet(llm):
    tokenizer = llm.tokenizer
    spaced = encode_pair("one ", "two", tokenizer)
    assert spaced == encode_pair("one", " two", tokenizer)
    assert [*spaced[0], *spaced[1]] == tokenizer.encode("one two")
    assert spaced[0] == tokenizer.encode("one")
    nothing = encode_pair("", "two", tokenizer)
    first = [prefix_token_id(tokenizer)]
    assert nothing == (first, tokenizer.encode("two", add_special_tokens=False))
    assert encode_pair("  ", "two", tokenizer)[0] == first
    whole = tokenizer.encode("one two")
    assert encode_text("one two", tokenizer) == (whole[:1], whole[1:])


@pytest.mark.parametrize("bad", [[1.7, 2.2], ["3", "4"], [True, 3], [None, 3], [np.float32(3), 4], b"hi"], ids=repr)
def test_what_is_no_token_id_is_none_anywhere(llm, bad):
    prompt = {"prompt_token_ids": bad}
    for call in (
        lambda: llm.generate(prompt),
        lambda: llm.stream(prompt),
        lambda: llm.beam_search(prompt, beam_width=2, max_tokens=2),
        lambda: llm.score([bad]),
        lambda: llm.score([bad], [[3]]),
        lambda: llm.score([[3]], [bad]),
        lambda: llm.loglikelihood_rolling([bad]),
    ):
        with pytest.raises(ValueError, match="a list of token ids, not"):
            call()
    items = ["ab", bad, (bad, [3]), ([3], bad), (None, " a"), None, 5, {"text": "a b"}, "cd"]
    outputs = list(llm.score_iter(items, on_error="return", in_order=True))
    assert [output.error is None for output in outputs] == [True, *[False] * 7, True]
    with pytest.raises(ValueError, match=r"^text 1: a text must be a string or a list of token ids, not "):
        list(llm.score_iter(["ab", bad]))


def test_ids_may_be_numpys(llm):
    tokens = ids(12)
    params = SamplingParams(temperature=0.0, max_tokens=3)
    for some in (np.array(tokens), np.array(tokens, np.uint16), list(np.array(tokens)), tuple(tokens)):
        assert llm.generate({"prompt_token_ids": some}, params)[0].prompt_token_ids == tokens
        assert llm.score([some])[0].token_ids == tokens[1:]
        assert llm.score([some], [some])[0].token_ids == tokens
    two = tuple(np.array(tokens[:2]))  # a text, and no pair of prompt and continuation
    (output,) = llm.score_iter([two])
    assert output.token_ids == tokens[1:2]


def test_other_models_scores_are_not_asked_of_a_language_model(llm):
    (scored,) = llm.score("hello", " world", use_tqdm=False)
    assert isinstance(scored, ScoreOutput)
    assert scored.logprob == llm.score(queries="hello", documents=" world", use_tqdm=False)[0].logprob  # vLLM's names
    assert "the model generates text" in line(lambda: llm.score("a", "b", truncate=True), RequestError)
    for call in (lambda: llm.rerank("a", ["b"]), lambda: llm.similarity("a", "b"), lambda: llm.encode("a")):
        assert "the model generates text" in line(call, UnsupportedError)
