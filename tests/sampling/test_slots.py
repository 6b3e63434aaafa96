"""Penalties, biases and masks, which are kept in slots on the device, against numpy and transformers' processors."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.engine.bad_words import BadWords
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays
from jaxinfer.sampling.params import MOST_COPIES
from jaxinfer.sampling.processors import process
from jaxinfer.sampling.sampler import Sampler
from jaxinfer.sampling.slots import DecodeState, Masks, TokenCounts, copies, count, prepare_slot
from jaxinfer.text.tokenizer import load_tokenizer
from tests.sampling.reference import adjusted

VOCAB, ROWS = 77, 12  # no multiple of 32
STOP_IDS = (3, 70)
SETTINGS = [
    {},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"presence_penalty": -2.0, "frequency_penalty": 1.5, "repetition_penalty": 1.9},
    {"logit_bias": {5: 10.0, 76: -100.0, 0: 0.5}},
    {"allowed_token_ids": [0, 31, 32, 64, 76]},
    {"allowed_token_ids": [1, 2, 3], "logit_bias": {2: 3.0, 9: 50.0}},
    {"min_tokens": 9},
    {"min_tokens": 9, "repetition_penalty": 1.2, "logit_bias": {3: 99.0}, "allowed_token_ids": list(range(70, 77))},
    {"logit_bias": {i: float(i) for i in range(VOCAB)}},
]


adjust = jax.jit(process)


def filled(rng, params, slots, histories):
    """Slots whose owners have had other owners before, then these; `slots` of each row."""
    state = jax.tree.map(
        lambda s: rng.integers(0, 2, s.shape).astype(s.dtype), DecodeState.shapes(len(params), VOCAB)
    )  # what others have left
    prepare = jax.jit(prepare_slot)
    for p, slot, history in zip(params, slots, histories, strict=True):
        if p.has_masks:
            state = prepare(state, np.int32(slot), Masks.of(VOCAB, p.allowed_token_ids, [], p.logit_bias))
        if p.has_penalties:
            state = prepare(state, np.int32(slot), TokenCounts.of(VOCAB, *history))
    return state


@pytest.mark.parametrize("seed", range(3))
def test_logits_are_numpys(seed):
    rng = np.random.default_rng(seed)
    params = [SamplingParams(**setting) for setting in SETTINGS]
    histories = [(rng.integers(0, VOCAB, 6).tolist(), rng.integers(0, 9, 4 + i).tolist()) for i in range(ROWS)]
    slots = rng.permutation(ROWS).astype(np.int32)
    state = filled(rng, params, slots, histories)
    logits = (3 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    rows = [RowSampling(p, 0, STOP_IDS, len(h[0])) for p, h in zip(params, histories, strict=True)]
    length = np.array([len(prompt) + len(output) for prompt, output in histories], np.int32)
    sampling = SamplingArrays.of_rows(rows, ROWS)
    ours = np.asarray(adjust(logits, sampling, length, state, slots))
    for i, (prompt, output) in enumerate(histories):
        expected = adjusted(logits[i], prompt, output, params[i], STOP_IDS)
        np.testing.assert_allclose(ours[i], expected, rtol=1e-6, atol=1e-6, err_msg=str(SETTINGS[i]))
    np.testing.assert_array_equal(ours[0], logits[0])  # whatever its slot holds
    drawn = np.asarray(jax.jit(Sampler().tokens)(logits, sampling, length, state, slots))
    for i, allowed in ((7, [0, 31, 32, 64, 76]), (8, [1, 2, 3])):
        assert drawn[i] in allowed


def test_transformers_processors_agree(checkpoints):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(5)
    tokenizer = load_tokenizer(checkpoints("llama").folder)
    words = ["ab", "b", "cab", " x"]
    spelled = BadWords(words, tokenizer)
    as_ids = [[ids] for ids in spelled.single] + [list(ids) for ids in spelled.sequences]
    assert len(spelled.single) >= 2
    assert len(spelled.sequences) >= 3
    alphabet = tokenizer.encode("abcx ", add_special_tokens=False)
    for _ in range(200):
        output = rng.choice(alphabet, 5).tolist()
        logits = rng.standard_normal(300).astype(np.float32)
        ids, scores = torch.tensor([output]), torch.tensor(logits)[None]
        expected = theirs.NoBadWordsLogitsProcessor(as_ids)(ids, scores.clone())[0].numpy()
        assert sorted(set(spelled.forbidden(output))) == np.flatnonzero(np.isneginf(expected)).tolist()
        np.testing.assert_array_equal(adjusted(logits, [], output, SamplingParams(), (), as_ids), expected)
        prompt = rng.integers(0, 300, 9).tolist()
        ids = torch.tensor([[*prompt, *output]])
        penalty = float(rng.uniform(0.5, 2))
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())[0].numpy()
        ours = adjusted(logits, prompt, output, SamplingParams(repetition_penalty=penalty))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        bias = {int(i): float(rng.normal()) for i in rng.integers(0, 300, 4)}
        processor = theirs.SequenceBiasLogitsProcessor({(i,): value for i, value in bias.items()})
        ours = adjusted(logits, [], output, SamplingParams(logit_bias=bias))
        np.testing.assert_allclose(ours, processor(ids, scores.clone())[0].numpy(), rtol=1e-6)
        shortest = theirs.MinNewTokensLengthLogitsProcessor(9, int(rng.integers(3, 8)), [7, 8])
        expected = shortest(ids, scores.clone())[0].numpy()
        params = SamplingParams(min_tokens=shortest.min_new_tokens)
        np.testing.assert_array_equal(adjusted(logits, prompt, output, params, (7, 8)), expected)


@pytest.mark.parametrize("wanted", ["everything", "plain", "greedy"])
def test_a_block_of_rows_at_a_time(monkeypatch, wanted):
    """As all at once, to the bit: 13 rows, five at a time, each with wishes of its own; and where nobody has any."""
    draw = Sampler(full=wanted == "everything")
    rng = np.random.default_rng(5)
    settings = [s | {"temperature": 0.9 * (i % 3 > 0), "logprobs": i % 2} for i, s in enumerate(SETTINGS)]
    params = [SamplingParams(**s) for s in [*settings, {"top_p": 0.6}]]
    if wanted != "everything":
        params = [SamplingParams(temperature=0.9 * (i % 3 > 0) * (wanted == "plain")) for i, _ in enumerate(params)]
        assert all(p.is_plain for p in params)
    histories = [([1, 2, 3, 70], [5, 5, 6]) for _ in params]
    slots = rng.permutation(len(params)).astype(np.int32)
    state = filled(rng, params, slots, histories)
    sampling = SamplingArrays.of_rows([RowSampling(p, 9, STOP_IDS, 4) for p in params], len(params))
    logits = 3 * rng.standard_normal((len(params), VOCAB), np.float32)
    arguments = logits, sampling, np.full(len(params), 7, np.int32), state, slots
    expected = jax.jit(draw)(*arguments)
    monkeypatch.setattr("jaxinfer.sampling.sampler.BLOCK", 5 * 4 * VOCAB)
    program = jax.jit(lambda *arguments: draw(*arguments))  # or it would be that of before
    assert "5,77" in str(program.trace(*arguments).jaxpr)
    result = program(*arguments)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert (result[1] is not None and np.asarray(result[1].top).any()) == (wanted == "everything")
    assert (wanted == "greedy") == (result[0].tolist() == logits.argmax(axis=-1).tolist())


def test_counts_end_where_they_would_overflow():
    """A token that is written 40,000 times, then in chunks of many copies, as after a preemption: never fewer."""
    counts = np.zeros((3, VOCAB), np.uint16)
    counts[1, 5] = MOST_COPIES - 2
    slot, slots = np.ones(1, np.int32), np.ones(70_000, np.int32)
    add = jax.jit(count)
    for seen in (MOST_COPIES - 1, MOST_COPIES, MOST_COPIES, MOST_COPIES):
        counts = np.array(add(counts, slot, 5 * slot, slot > 0))
        assert copies(counts, np.array([1]))[0, 5] == seen
    tokens = np.where(np.arange(70_000) % 2 == 0, 5, 6).astype(np.int32)
    for _ in range(3):
        counts = np.array(add(counts, slots, tokens, slots > 0))
        assert np.asarray(copies(counts, np.array([1])))[0, 5:7].tolist() == [MOST_COPIES, MOST_COPIES]
    counts = np.array(add(np.zeros_like(counts), slots[:9], tokens[:9], np.arange(9) < 7))
    assert np.asarray(copies(counts, np.array([1])))[0, 5:7].tolist() == [4, 3]
    assert not counts[[0, 2]].any()
    same = np.array(add(counts, slot, 5 * slot, slot < 0))
    np.testing.assert_array_equal(same, counts)


def test_counts_begin_where_they_would_overflow():
    counts = TokenCounts.of(VOCAB, [3, 3], [5] * 70_000 + [6])
    assert np.flatnonzero(counts.in_prompt).tolist() == [3]
    assert {i: int(n) for i, n in enumerate(counts.in_output) if n} == {5: MOST_COPIES, 6: 1}


def test_a_token_far_beyond_the_most_copies_keeps_its_penalties():
    params = SamplingParams(frequency_penalty=0.001, presence_penalty=1.0, repetition_penalty=1.5)
    state = filled(np.random.default_rng(0), [params], [0], [([], [])])
    counts = np.array(state.in_output)
    counts[0, 5] = 50_000
    state = dataclasses.replace(state, in_output=counts)
    sampling = SamplingArrays.of_rows([RowSampling(params, 0, (), 1)], 1)
    ours = np.asarray(
        adjust(np.full((1, VOCAB), 3.0, np.float32), sampling, np.full(1, 9, np.int32), state, np.zeros(1, np.int32))
    )
    assert ours[0, 5] == pytest.approx(2.0 - 1 - 0.001 * MOST_COPIES, rel=1e-5)


def test_first_and_forced_tokens():
    """begin_suppress_tokens count once; a forced token is the only one, whatever else is said of it."""
    params = [
        SamplingParams(begin_suppress_tokens=[5, 6]),
        SamplingParams(forced_bos_token_id=9, suppress_tokens=[9], begin_suppress_tokens=[5]),
        SamplingParams(forced_eos_token_id=3, min_tokens=8),
        SamplingParams(forced_bos_token_id=9),
    ]
    rows = [RowSampling(p, 0, STOP_IDS, n, 12) for p, n in zip(params, (4, 1, 4, 2), strict=True)]
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), DecodeState.shapes(4, VOCAB))
    for i, p in enumerate(params):
        masks = Masks.of(VOCAB, None, p.suppress_tokens or (), None, p.begin_suppress_tokens or ())
        state = jax.jit(prepare_slot)(state, np.int32(i), masks)
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, [5, 6, 7]] = [5.0, 4.0, 3.0]
    sampling, slots = (
        SamplingArrays.of_rows(
            [dataclasses.replace(r, params=r.params.with_changes(temperature=0.0)) for r in rows], 4
        ),
        np.arange(4, dtype=np.int32),
    )
    run = jax.jit(Sampler().tokens)
    seen = [
        np.asarray(run(logits, sampling, np.array(at, np.int32), state, slots)).tolist()
        for at in ((4, 1, 10, 2), (5, 2, 11, 1))
    ]
    assert seen == [[7, 9, 5, 5], [5, 6, 3, 5]]


def test_stop_ids_gain_as_in_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import ExponentialDecayLengthPenalty

    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal((6, VOCAB))).astype(np.float32)
    decay = [(2, 1.1), (0, 1.5), (5, 0.5), (30, 2.0), (0, 1.0), (1, 3.0)]
    rows = [RowSampling(SamplingParams(exponential_decay_length_penalty=d), 0, STOP_IDS, 4) for d in decay]
    sampling, length = SamplingArrays.of_rows(rows, 6), np.full(6, 15, np.int32)
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), DecodeState.shapes(6, VOCAB))

    def decayed(logits, sampling, length):
        return np.asarray(adjust(logits, sampling, length, state, np.arange(len(logits), dtype=np.int32)))

    ours = decayed(logits, sampling, length)
    for i, pair in enumerate(decay):
        theirs = ExponentialDecayLengthPenalty(pair, torch.tensor(STOP_IDS), 4)
        expected = theirs(torch.zeros((1, 15), dtype=torch.long), torch.tensor(logits[i : i + 1]))[0].numpy()
        np.testing.assert_allclose(ours[i], expected, rtol=1e-5)
    masked = logits.copy()
    masked[:, STOP_IDS] = -np.inf  # not NaN, as there, where min_tokens is not over yet
    np.testing.assert_array_equal(decayed(masked, sampling, length), masked)
    huge = SamplingArrays.of_rows(
        [RowSampling(SamplingParams(exponential_decay_length_penalty=(0, 1e3)), 0, STOP_IDS, 4)], 1
    )
    assert np.isfinite(decayed(logits[:1], huge, np.full(1, 2**20, np.int32))).all()
