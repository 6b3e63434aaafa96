"""Sampling against numpy: which tokens may be drawn, how often they are, and what a row's draw depends on."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from jaxinfer import SamplingParams
from jaxinfer.kernels import cpu
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays
from jaxinfer.sampling.filters import cut_off, filter_top
from jaxinfer.sampling.logprobs import logprobs, token_logprobs
from jaxinfer.sampling.params import MAX_LOGPROBS
from jaxinfer.sampling.sampler import (
    NONE_LEFT,
    NOT_FINITE,
    Sampler,
    _likeliest,
    _likeliest_in_one,
    _likeliest_in_two,
    stops,
)
from jaxinfer.sampling.slots import DecodeState
from tests.kernels.test_cpu import needs_them, set_level  # noqa: F401
from tests.sampling.reference import distribution, kept

DRAWS, VOCAB = 20_000, 24
# temperature, min_p, top_k, top_p
SETTINGS = [
    (1.0, 0.0, 0, 1.0),
    (0.5, 0.0, 0, 1.0),
    (2.0, 0.0, 0, 1.0),
    (1.0, 0.0, 5, 1.0),
    (1.0, 0.0, 0, 0.8),
    (1.0, 0.1, 0, 1.0),
    (1.3, 0.05, 7, 0.9),
    (0.7, 0.0, 8, 0.85),
    (1.5, 0.02, 0, 0.95),
]

jit_sample = {full: jax.jit(Sampler(full).tokens) for full in (False, True)}
run_filter = jax.jit(lambda logits, sampling: cut_off(filter_top(logits, sampling), sampling))
run_logprobs = jax.jit(logprobs)


def no_slots(slots: int, vocab: int) -> DecodeState:
    """Slots full of what must not matter to rows that have neither penalties nor masks."""
    return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), DecodeState.shapes(slots, vocab))


def run_sample(logits, sampling, lengths, full=True):
    rows, vocab = logits.shape
    slots = no_slots(1, vocab)  # one for all: 20,000 of them take too much memory
    return jit_sample[full](logits, sampling, lengths, slots, np.zeros(rows, np.int32))


def arrays(rows: int, seeds=None, stop_ids=(), prompt_length=0, **params) -> SamplingArrays:
    seeds = range(rows) if seeds is None else seeds
    return SamplingArrays.of_rows(
        [RowSampling(SamplingParams(**params), int(seed), stop_ids, prompt_length) for seed in seeds], rows
    )


def random_logits(seed: int, *shape: int) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("temperature", "min_p", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(temperature, min_p, top_k, top_p, vary):
    logits = random_logits(3, VOCAB) / 3  # flat enough that each setting leaves several tokens
    seeds = np.arange(DRAWS) if vary == "seed" else np.full(DRAWS, 7)
    sampling = arrays(DRAWS, seeds, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    lengths = np.full(DRAWS, 40, np.int32) if vary == "seed" else np.arange(DRAWS, dtype=np.int32)
    drawn = np.asarray(run_sample(np.broadcast_to(logits, (DRAWS, VOCAB)), sampling, lengths))
    counts = np.bincount(drawn, minlength=VOCAB)
    expected = distribution(logits, temperature, min_p, top_k, top_p) * DRAWS
    assert not counts[expected == 0].any()
    frequent = expected >= 5  # chi-square needs that; the rare ones are one class together
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    assert frequent.sum() > 2
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def same_set(logits: np.ndarray, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0):
    sampling = arrays(len(logits), temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    ours = np.asarray(run_filter(logits / np.float32(temperature), sampling)) > -np.inf
    for row, values in zip(ours, logits, strict=True):
        np.testing.assert_array_equal(row, kept(values, temperature, min_p, top_k, top_p))


@pytest.mark.parametrize(("temperature", "min_p", "top_k", "top_p"), SETTINGS)
def test_the_kept_set_is_exactly_numpys(temperature, min_p, top_k, top_p):
    same_set(random_logits(0, 64, 500), temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 499, 500, 1000, -1])
def test_top_k_with_ties_infinities_and_extreme_values(top_k):
    logits = random_logits(1, 64, 500)
    logits[0] = 0  # all equal
    logits[1, 5:] = -np.inf
    logits[2, 1:] = -np.inf
    logits[3] = np.round(logits[3])  # many ties
    logits[4] = np.linspace(-3e38, 3e38, 500)
    logits[5] = np.linspace(1e-40, 1e-38, 500, dtype=np.float32)  # next to zero
    logits[6] = 1 + np.arange(500, dtype=np.float32) * np.float32(2**-23)  # neighbouring numbers
    logits[7] = -logits[6]
    logits[8, ::2], logits[8, 1::2] = 0.0, -0.0
    same_set(logits, top_k=top_k)


@pytest.mark.parametrize("top_p", [1e-6, 0.25, 0.5, 0.999])
def test_top_p_on_its_edges(top_p):
    logits = np.full((64, 500), -np.inf, np.float32)
    logits[0, :4] = 0  # a quarter each
    logits[1, :3] = np.log([2, 1, 1])  # a half, two quarters
    logits[2, 7] = 3.0
    logits[3, :2] = [0.0, -0.0]
    logits[4, :4] = [50.0, 50.0, -50.0, -80.0]
    logits[5, :] = 0
    logits[6:] = np.log(np.arange(1, 501, dtype=np.float32))
    same_set(logits, top_p=top_p)


def test_min_p_one_keeps_the_best_and_its_ties():
    logits = random_logits(4, 64, 500)
    logits[0, [3, 8]] = 9.0
    same_set(logits, min_p=1.0)


def test_filters_of_one_row_leave_the_others_alone():
    logits = random_logits(5, 64, 500)
    all_params = [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {}] * 16
    sampling = SamplingArrays.of_rows([RowSampling(SamplingParams(**p), 0, (), 0) for p in all_params], 64)
    ours = np.asarray(run_filter(logits, sampling)) > -np.inf
    for row, params in enumerate(all_params):
        reference = kept(logits[row], 1.0, params.get("min_p", 0), params.get("top_k", 0), params.get("top_p", 1))
        np.testing.assert_array_equal(ours[row], reference)
    assert ours[3::4].all()


@needs_them
@pytest.mark.parametrize("width", [301, 1, 15, 1024, 5003])
def test_the_likeliest_by_a_kernel(width, set_level):  # noqa: F811
    logits = random_logits(11, 40, width).round(1)
    logits[3, width // 2] = logits[4, -1] = logits[5, width // 3] = logits[5, width // 4] = np.nan
    logits[6], logits[7, width // 2], logits[8, 1:] = -np.inf, np.inf, -np.inf
    run = jax.jit(_likeliest)
    assert cpu.ARGMAX in run.lower(logits).as_text()
    for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
        set_level(level)
        highest, at = run(logits)
        np.testing.assert_array_equal(highest, logits.max(axis=-1))
        np.testing.assert_array_equal(at, logits.argmax(axis=-1))


def test_the_likeliest_by_one_reduction_and_by_two():
    logits = random_logits(7, 40, 301).round(1)  # with some that are equal
    logits[3, 7] = logits[4, 300] = logits[5, 9] = logits[5, 2] = np.nan
    logits[6], logits[7, 11], logits[8, 5:] = -np.inf, np.inf, -np.inf
    logits[9] = np.where(np.arange(301) % 2, -0.0, 0.0)
    for call in (_likeliest_in_one, _likeliest_in_two):
        highest, at = jax.jit(call)(logits)
        np.testing.assert_array_equal(highest, logits.max(axis=-1))
        assert at.dtype == np.int32
        np.testing.assert_array_equal(at, logits.argmax(axis=-1))


def test_a_draw_depends_on_seed_and_position_alone():
    logits = random_logits(6, 64, 500)
    lengths = np.arange(10, 74, dtype=np.int32)
    settings = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 9}] * 16
    rows = [RowSampling(SamplingParams(**s), 100 + i, (), 0) for i, s in enumerate(settings)]
    together = np.asarray(run_sample(logits, SamplingArrays.of_rows(rows, 64), lengths))
    assert all(row.params.is_plain for row in rows)
    plain = np.asarray(run_sample(logits, SamplingArrays.of_rows(rows, 64), lengths, full=False))
    np.testing.assert_array_equal(plain, together)
    order = np.random.default_rng(0).permutation(64)
    shuffled = np.asarray(
        run_sample(logits[order], SamplingArrays.of_rows([rows[i] for i in order], 64), lengths[order])
    )
    np.testing.assert_array_equal(shuffled, together[order])
    for size in (1, 5):  # another batch size, among other rows
        for row in (1, 2, 3):
            there = slice(row, row + size)
            ours = run_sample(logits[there], SamplingArrays.of_rows(rows[there], size), lengths[there])
            np.testing.assert_array_equal(np.asarray(ours), together[there])
    elsewhere = np.asarray(run_sample(logits, SamplingArrays.of_rows(rows, 64), lengths + 1))
    reseeded = [dataclasses.replace(row, seed=row.seed + 2**32) for row in rows]  # its upper half counts too
    other = np.asarray(run_sample(logits, SamplingArrays.of_rows(reseeded, 64), lengths))
    greedy = np.array([s.get("temperature") == 0 for s in settings])
    np.testing.assert_array_equal(together[greedy], logits.argmax(-1)[greedy])
    for changed in (elsewhere, other):
        np.testing.assert_array_equal(changed[greedy], together[greedy])
        assert (changed != together)[~greedy].mean() > 0.5


@pytest.mark.parametrize(
    "setting",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words_ids": [[3, 4]]},
        {"suppress_tokens": [3]},
        {"begin_suppress_tokens": [3]},
        {"no_repeat_ngram_size": 2},
        {"bad_words": ["x"]},
        {"min_tokens": 1},
        {"min_length": 1},
        {"forced_bos_token_id": 0},
        {"forced_eos_token_id": 0},
        {"exponential_decay_length_penalty": (1, 1.1)},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_what_a_plain_sampler_would_leave_out(setting):
    assert not SamplingParams(**setting).is_plain
    assert SamplingParams(top_p=0.5, top_k=3, min_p=0.1, temperature=0.3, seed=4, stop_token_ids=[1]).is_plain


def test_rows_beyond_the_given_ones_are_greedy_and_stop_nowhere():
    sampling = SamplingArrays.of_rows([RowSampling(SamplingParams(), 1, (5,), 0)], 3)
    logits = random_logits(7, 3, 50)
    tokens = np.asarray(run_sample(logits, sampling, np.zeros(3, np.int32)))
    np.testing.assert_array_equal(tokens[1:], logits.argmax(-1)[1:])
    tokens, lengths = np.array([5, 5, 0], np.int32), np.zeros(3, np.int32)
    assert np.asarray(stops(tokens, sampling, lengths)).tolist() == [True, False, False]


def test_resolved_parameters():
    rows = [
        RowSampling(SamplingParams(top_k=-1, min_tokens=3), -1, (1, 2), 9),
        RowSampling(SamplingParams(temperature=9e-6, top_k=2**31 - 1, logprobs=0), 2**63 - 1, range(8), 0),
    ]
    arrays = SamplingArrays.of_rows(rows, 2)
    assert arrays.top_k.tolist() == [0, 2**31 - 1]
    assert arrays.temperature.tolist() == [1, 0]  # below 1e-5 is greedy
    assert arrays.seed.tolist() == [[2**32 - 1, 2**32 - 1], [2**31 - 1, 2**32 - 1]]
    assert arrays.stop_ids.tolist() == [[1, 2, -1, -1, -1, -1, -1, -1], list(range(8))]
    assert arrays.prompt_length.tolist() == [9, 0]
    assert arrays.min_tokens.tolist() == [3, 0]
    assert not arrays.penalized.any()
    assert not arrays.masked.any()
    assert arrays.wants_logprobs.tolist() == [False, True]


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.ignore_eos, params.include_stop_str_in_output, params.skip_special_tokens) == (False, False, True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_masks_stop_ids(temperature):
    logits = np.tile(random_logits(8, 50), (4, 1))
    order = np.argsort(-logits[0])
    logits[:, order[:2]] += 100  # the two best by far, and both stop
    # With prompts of 4 tokens, and 10 tokens in all, this is the seventh new one.
    rows = [
        RowSampling(SamplingParams(temperature=temperature, min_tokens=n), i, order[:2].tolist(), 4)
        for i, n in enumerate((0, 6, 7, 7))
    ]
    rows[3] = dataclasses.replace(
        rows[3], stop_ids=(order[0].item(), 10**6)
    )  # an id beyond the vocabulary harms nothing
    sampling, lengths = SamplingArrays.of_rows(rows, 4), np.full(4, 10, np.int32)
    tokens = np.asarray(run_sample(logits, sampling, lengths))
    assert tokens[0] in order[:2]
    assert tokens[1] in order[:2]
    assert tokens[2] not in order[:2]
    assert tokens[3] == order[1]
    # An early stop id that is forced ends nothing, here as on the host.
    assert np.asarray(stops(np.full(4, order[0], np.int32), sampling, lengths)).tolist() == [True, True, False, False]


def test_logprobs_and_ranks():
    logits = random_logits(9, 64, 500)
    logits[0, :3] = logits[0].max() + 1  # three of rank 1
    tokens = np.random.default_rng(0).integers(0, 500, 64).astype(np.int32)
    tokens[0] = 1
    # Temperature, filters and masks have no influence.
    sampling = arrays(64, temperature=0.3, top_k=3, logprobs=5, stop_ids=(1,), min_tokens=9, presence_penalty=1.0)
    info = run_logprobs(logits, tokens, sampling)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    chosen = np.take_along_axis(expected, tokens[:, None], -1)
    np.testing.assert_allclose(np.asarray(info.sampled), chosen[:, 0], atol=1e-5)
    np.testing.assert_array_equal(
        np.asarray(info.rank), 1 + (logits > np.take_along_axis(logits, tokens[:, None], -1)).sum(-1)
    )
    np.testing.assert_allclose(np.asarray(info.top), -np.sort(-expected)[:, :MAX_LOGPROBS], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, np.asarray(info.top_ids), -1), info.top, atol=1e-5)
    assert info.rank[0] == 1


def test_logprobs_cost_nothing_where_no_row_asks():
    logits = random_logits(9, 64, 500)
    info = run_logprobs(logits, np.zeros(64, np.int32), arrays(64))
    assert not any(np.asarray(part).any() for part in info)


def test_a_vocabulary_below_the_most_logprobs():
    info = run_logprobs(random_logits(1, 2, 7), np.zeros(2, np.int32), arrays(2, logprobs=20))
    assert info.top_ids.shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("typical_p", [0.1, 0.5, 0.9, 0.999]),
        ("epsilon_cutoff", [1e-4, 0.003, 0.05, 0.9]),
        ("eta_cutoff", [1e-4, 0.01, 0.9]),
    ],
)
def test_transformers_own_filters(name, values):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    warper = {
        "typical_p": theirs.TypicalLogitsWarper,
        "epsilon_cutoff": theirs.EpsilonLogitsWarper,
        "eta_cutoff": theirs.EtaLogitsWarper,
    }[name]
    logits = random_logits(12, 64, 500)
    logits[:8, 40:] = -np.inf
    for value in values:
        ours = np.asarray(run_filter(logits, arrays(64, **{name: value}))) > -np.inf
        expected = warper(value)(None, torch.tensor(logits.astype(np.float64))).numpy() > -np.inf
        assert (ours != expected).mean() < 1e-3  # float32 may put one on the edge on its other side
        assert (ours.sum(-1) >= 1).all()
        assert (ours.sum(-1) < np.isfinite(logits).sum(-1)).any()
    together = arrays(64, top_k=50, typical_p=0.9, epsilon_cutoff=0.001, eta_cutoff=0.002)
    chain = [
        theirs.TopKLogitsWarper(50),
        theirs.TypicalLogitsWarper(0.9),
        theirs.EpsilonLogitsWarper(0.001),
        theirs.EtaLogitsWarper(0.002),
    ]
    expected = torch.tensor(logits.astype(np.float64))
    for processor in chain:
        expected = processor(None, expected)
    assert ((np.asarray(run_filter(logits, together)) > -np.inf) != (expected.numpy() > -np.inf)).mean() < 1e-3


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.2}, {"typical_p": 0.5, "epsilon_cutoff": 0.1}],
    ids=str,
)
def test_rows_without_a_sound_logit_say_so(setting):
    """And rows beside them draw what they draw alone; minus infinity, of some tokens, is nothing special."""
    logits = random_logits(11, 8, 50)
    sampling, lengths = arrays(8, **setting), np.full(8, 9, np.int32)
    expected = np.asarray(run_sample(logits, sampling, lengths))
    damaged = logits.copy()
    damaged[0] = np.nan
    damaged[1, 7] = np.nan
    damaged[2, 49] = -np.nan
    damaged[3, 3] = np.inf
    damaged[4] = -np.inf
    damaged[5, :] = -np.inf
    damaged[5, 31] = -80.0
    tokens = np.asarray(run_sample(damaged, sampling, lengths))
    assert tokens[:6].tolist() == [NOT_FINITE] * 4 + [NONE_LEFT, 31]
    np.testing.assert_array_equal(tokens[6:], expected[6:])
    assert np.asarray(stops(tokens, sampling, lengths))[:6].tolist() == [True] * 5 + [False]


def test_the_rank_of_what_is_no_number_is_the_last():
    logits = random_logits(13, 4, 50)
    logits[0, 4], logits[1, 4], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :40] = -np.inf
    info = jax.jit(token_logprobs)(logits, np.array([4, 5, 0, 3], np.int32))
    assert np.isnan(info.sampled[:3]).all()
    assert info.rank[:3].tolist() == [51] * 3
    assert info.sampled[3] == -np.inf
    assert info.rank[3] == 11
