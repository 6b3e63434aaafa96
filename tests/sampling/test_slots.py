"""Penalties, biases and masks, which are kept in slots on the device, against numpy and transformers' processors."""

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.engine.bad_words import BadWords
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays
from jaxinfer.sampling.sample import _mask, _mask_stop_ids, _penalize, draw, sample
from jaxinfer.sampling.slots import Masks, Slots, prepare_slot
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


@jax.jit
def adjust(logits, sampling, length, slots, slot):
    logits = _mask_stop_ids(_mask(logits, sampling, slots, slot), sampling, length)
    return _penalize(logits, sampling, slots, slot)


def filled(rng, params, slots, histories):
    """Slots whose owners have had other owners before, then these; `slots` of each row."""
    state = jax.tree.map(
        lambda s: rng.integers(0, 2, s.shape).astype(s.dtype), Slots.shapes(len(params), VOCAB)
    )  # what others have left
    prepare = jax.jit(prepare_slot)
    for p, slot in zip(params, slots, strict=True):
        if p.has_penalties or p.has_masks:
            masks = Masks.of(VOCAB, p.allowed_token_ids, [], p.logit_bias)
            state = prepare(state, np.int32(slot), masks, np.bool_(True))
    seen, counts = np.array(state.in_prompt), np.array(state.in_output)
    for p, slot, (prompt, output) in zip(params, slots, histories, strict=True):
        if p.has_penalties:
            seen[slot, prompt] = True
            np.add.at(counts[slot], output, 1)
    return Slots(state.token, state.alive, seen, counts, state.allowed, state.bias_ids, state.bias)


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
    drawn = np.asarray(jax.jit(sample)(logits, sampling, length, state, slots))
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


@pytest.mark.parametrize("wanted", ["everything", "greedy"])
def test_a_block_of_rows_at_a_time(monkeypatch, wanted):
    """As all at once, to the bit: 13 rows, five at a time, each with wishes of its own; and where nobody has any."""
    rng = np.random.default_rng(5)
    settings = [s | {"temperature": 0.9 * (i % 3 > 0), "logprobs": i % 2} for i, s in enumerate(SETTINGS)]
    params = [SamplingParams(**s) for s in [*settings, {"top_p": 0.6}]]
    if wanted == "greedy":
        params = [SamplingParams(temperature=0.0) for _ in params]
    histories = [([1, 2, 3, 70], [5, 5, 6]) for _ in params]
    slots = rng.permutation(len(params)).astype(np.int32)
    state = filled(rng, params, slots, histories)
    sampling = SamplingArrays.of_rows([RowSampling(p, 9, STOP_IDS, 4) for p in params], len(params))
    logits = 3 * rng.standard_normal((len(params), VOCAB), np.float32)
    given = logits, sampling, np.full(len(params), 7, np.int32), state, slots
    expected = jax.jit(draw)(*given)
    monkeypatch.setattr("jaxinfer.sampling.sample.BLOCK", 5 * 4 * VOCAB)
    program = jax.jit(lambda *given: draw(*given))  # or it would be that of before
    assert "5,77" in str(program.trace(*given).jaxpr)
    found = program(*given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (wanted == "greedy") == (not np.asarray(found[1].top).any())
