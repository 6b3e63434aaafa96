"""What `LLM` offers besides plain generation: several continuations, log-probabilities, iteration, errors, priority."""

import itertools
import tracemalloc

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import all_logits
from tests.settled import settled

GREEDY = {"temperature": 0.0, "ignore_eos": True}
ROWS = 4


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, length).tolist()


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=ROWS, max_num_batched_tokens=32, page_size=8) as llm:
        yield llm
        assert llm.stats.pages_used == llm.stats.running == llm.stats.waiting == 0


def tokens(output) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.1}, {"prompt_logprobs": 1}, {"max_tokens": 1}])
def test_n_are_the_seeds_that_follow(llm, extra):
    shared = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True} | extra
    prompts = [ids(i, 40) for i in range(3)]
    outputs = llm.generate(prompts, SamplingParams(n=5, seed=7, **shared))
    for prompt, output in zip(prompts, outputs, strict=True):
        singles = llm.generate([prompt] * 5, [SamplingParams(seed=7 + i, **shared) for i in range(5)])
        assert tokens(output) == [tokens(single)[0] for single in singles]
        assert [completion.index for completion in output.outputs] == list(range(5))
        assert [completion.text for completion in output.outputs] == [single.outputs[0].text for single in singles]
        assert len({tuple(t) for t in tokens(output)}) > 1
        assert (output.prompt_logprobs is None) == ("prompt_logprobs" not in extra)
    again = llm.generate(prompts, SamplingParams(n=5, seed=7, **shared))
    assert list(map(tokens, again)) == list(map(tokens, outputs))


def test_n_shares_the_prompts_pages(llm):
    before = llm.stats
    llm.generate(ids(90, 200), SamplingParams(n=4, seed=0, max_tokens=4))
    assert llm.stats.hit_tokens - before.hit_tokens == 3 * 192
    assert llm.stats.prefill_tokens - before.prefill_tokens < 2 * 200


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def check_ranked(ranked, token, values, wanted):
    """One position's reported log-probabilities against all `values`."""
    assert token in ranked
    assert wanted <= len(ranked) <= wanted + 1
    for i, logprob in ranked.items():
        assert abs(logprob.logprob - values[i]) < 1e-3
        assert abs(logprob.rank - 1 - (values > values[i]).sum()) <= (np.abs(values - values[i]) < 1e-4).sum() - 1
    best = sorted((logprob.logprob for logprob in ranked.values()), reverse=True)[:wanted]
    np.testing.assert_allclose(best, -np.sort(-values)[:wanted], atol=1e-3)


def test_logprobs_of_prompts_and_outputs(llm):
    """Prompts longer than a call, beside rows that don't want theirs, twice (the prefix cache has them then)."""
    lengths = (1, 2, 70, 33, 120, 5, 64)
    prompts = [ids(20 + i, n) for i, n in enumerate(lengths)]
    wanted = [0, 3, 20, None, 1, None, 2]
    params = [
        SamplingParams(max_tokens=6, prompt_logprobs=w, logprobs=None if w == 3 else i, seed=i, ignore_eos=True)
        for i, w in enumerate(wanted)
    ]
    for _ in range(2):
        for prompt, p, output in zip(prompts, params, llm.generate(prompts, params), strict=True):
            (completion,) = output.outputs
            whole = prompt + completion.token_ids
            values = log_softmax(all_logits(llm, whole))
            if p.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert len(output.prompt_logprobs) == len(prompt)
                assert output.prompt_logprobs[0] is None
                for at in range(1, len(prompt)):
                    check_ranked(output.prompt_logprobs[at], prompt[at], values[at - 1], p.prompt_logprobs)
            if p.logprobs is None:
                assert completion.logprobs is None
                assert completion.cumulative_logprob is None
            else:
                for at, ranked in enumerate(completion.logprobs, len(prompt)):
                    check_ranked(ranked, whole[at], values[at - 1], p.logprobs)
                chosen = sum(r[t].logprob for r, t in zip(completion.logprobs, completion.token_ids, strict=True))
                assert completion.cumulative_logprob == pytest.approx(chosen)


def test_prompt_logprobs_are_transformers(llm, checkpoints):
    reference = checkpoints("llama")
    prompt = reference.prompts[-1]
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=5))
    values = log_softmax(reference.logits)
    for at in range(1, len(prompt)):
        check_ranked(output.prompt_logprobs[at], prompt[at], values[at - 1], 5)


def test_without_text(llm):
    params = {"max_tokens": 12, **GREEDY}
    (plain,) = llm.generate(ids(3, 9), SamplingParams(**params))
    (bare,) = llm.generate(ids(3, 9), SamplingParams(detokenize=False, **params))
    assert plain.outputs[0].text
    assert bare.outputs[0].text == ""
    assert tokens(bare) == tokens(plain)


def test_priority_decides_who_runs_first(llm):
    prompts = [ids(i, 20) for i in range(8 * ROWS)]
    params = SamplingParams(max_tokens=8, **GREEDY)
    plain = llm.generate(prompts, params)
    outputs = llm.generate(prompts, params, priority=range(len(prompts), 0, -1))
    assert [output.index for output in outputs] == list(range(len(prompts)))
    assert list(map(tokens, outputs)) == list(map(tokens, plain))
    assert plain[0].request_id < plain[-1].request_id
    assert outputs[0].request_id > outputs[-1].request_id
    with pytest.raises(ValueError, match="priority: 1 for 2 prompts"):
        llm.generate(prompts[:2], params, priority=[1])
    with pytest.raises(ValueError, match="it must be integers"):
        llm.generate(prompts[:2], params, priority=["high", 1])
    urgent = llm.engine.add(prompts[0], params)  # and in the engine: the last one overtakes those that wait
    others = [llm.engine.add(prompt, params) for prompt in prompts[1:-1]]
    last = llm.engine.add(prompts[-1], params, priority=-1)
    while not last.finished:
        llm.engine.step()
    assert sum(group.finished for group in others) < len(others) / 2
    for group in (urgent, *others):
        llm.engine.abort(group)


def test_the_progress_bar_is_on_stderr(llm, capfd):
    params = SamplingParams(max_tokens=4, **GREEDY)
    llm.generate(["a", "b"], params)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "tokens/s" in err
    llm.generate(["a", "b"], params, use_tqdm=False)
    assert capfd.readouterr() == ("", "")


BAD = [("", "the prompt is empty"), ([999], "token id 999"), ([1] * 300, "the prompt has 300 tokens"), (7, "not int")]


def test_a_bad_prompt_raises_before_anything_runs_or_says_so_in_its_output(llm):
    params = SamplingParams(max_tokens=4, **GREEDY)
    good = ["one", "two", "three"]
    expected = [output.outputs[0].text for output in llm.generate(good, params)]
    before = llm.stats
    for bad, message in BAD:
        prompts = [*good[:1], bad, *good[1:]]
        with pytest.raises(ValueError, match=f"prompt 1: .*{message}"):
            llm.generate(prompts, params)
        assert llm.stats == before
        outputs = llm.generate(prompts, params, on_error="return")
        assert message in outputs[1].error
        assert outputs[1].finished
        assert outputs[1].outputs[0].finish_reason == "error"
        assert [output.index for output in outputs] == [0, 1, 2, 3]
        assert [outputs[i].outputs[0].text for i in (0, 2, 3)] == expected
        assert [outputs[i].error for i in (0, 2, 3)] == [None] * 3
        before = llm.stats
    with pytest.raises(ValueError, match="on_error is 'ignore': it must be"):
        llm.generate(good, params, on_error="ignore")


class Counted:
    """An endless list of prompts, and how many of them were read."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield [self.read % 250, 7, 8]


@pytest.mark.parametrize("in_order", [False, True])
def test_iteration_reads_no_further_than_it_needs(llm, in_order):
    source = Counted()
    outputs = llm.generate_iter(source, SamplingParams(max_tokens=3, **GREEDY), in_order=in_order)
    assert source.read == 0
    places = []
    for count, output in enumerate(itertools.islice(outputs, 2000), 1):
        places.append(output.index)
        assert output.prompt_token_ids[0] == (output.index + 1) % 250
        assert source.read - count <= 4 * ROWS
    assert (places == sorted(places)) if in_order else (sorted(places)[:1900] == list(range(1900)))
    outputs.close()
    settled(llm)


def test_iteration_takes_constant_memory(llm):
    def run(count):
        for _ in llm.generate_iter(itertools.islice(Counted(), count), SamplingParams(max_tokens=2, **GREEDY)):
            pass
        return tracemalloc.get_traced_memory()[0]

    run(100)
    tracemalloc.start()
    run(100)
    before = run(100)
    after = run(1500)
    tracemalloc.stop()
    assert after - before < 60_000  # 40 bytes a prompt


def test_order_is_kept_beside_one_that_takes_long(llm):
    short, long = SamplingParams(max_tokens=1, **GREEDY), SamplingParams(max_tokens=120, **GREEDY)
    pairs = [([1, 2, 3], long if i % 40 == 0 else short) for i in range(120)]
    assert [output.index for output in llm.generate_iter(iter(pairs), in_order=True)] == list(range(120))
    places = [output.index for output in llm.generate_iter(iter(pairs))]
    assert sorted(places) == list(range(120))
    assert places != sorted(places)


def test_order_is_kept_in_bounded_memory(llm, monkeypatch):
    monkeypatch.setattr("jaxinfer.engine.feed.HELD", 20)
    source = Counted()
    short, long = SamplingParams(max_tokens=1, **GREEDY), SamplingParams(max_tokens=200, **GREEDY)
    pairs = ((prompt, long if i == 0 else short) for i, prompt in enumerate(source))
    outputs = llm.generate_iter(pairs, in_order=True)
    assert next(outputs).index == 0
    assert source.read <= 20 + 4 * ROWS
    assert [next(outputs).index for _ in range(100)] == list(range(1, 101))
    outputs.close()


def test_pairs_and_bad_prompts_in_an_iteration(llm):
    params = SamplingParams(max_tokens=3, **GREEDY)
    prompts = ["a", ("b", SamplingParams(max_tokens=5, **GREEDY)), "", {"prompt": "d"}]
    outputs = list(llm.generate_iter(iter(prompts), params, in_order=True, on_error="return"))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5, 0, 3]
    assert outputs[2].error == "the prompt is empty: give some text"
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        list(llm.generate_iter(iter(prompts), params))
    settled(llm)
    with pytest.raises(ValueError, match="takes an iterable of them"):
        llm.generate_iter("one prompt", params)


def test_a_source_that_fails_leaves_nothing_behind(llm):
    def source():
        yield from ["a", "b", "c"]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(llm.generate_iter(source(), SamplingParams(max_tokens=3)))
    settled(llm)


def test_no_call_is_kept_over_a_pause(llm):
    """Its time would count as the device's."""
    (output,) = llm.generate("abc", SamplingParams(max_tokens=40, **GREEDY))
    llm.generate("abc", SamplingParams(max_tokens=40, temperature=0.0, stop=output.outputs[0].text[10:12]))
    assert not llm.engine._in_flight
