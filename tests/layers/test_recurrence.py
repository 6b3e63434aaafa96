"""Recurrences over the flat stream: however prompts are cut and whatever runs beside them, each row's numbers are those
of its own tokens, one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.kernels import cpu
from jaxinfer.layers.convolution import causal_convolution
from jaxinfer.layers.linear_attention import LinearAttention
from jaxinfer.layers.recurrence import CHUNK, recur

ROWS, TOKENS, SLOTS = 4, 100, 6  # the last slot is nobody's
LENGTH = 2 * CHUNK + 2
HEADS, GROUP, KEY, VALUE, WIDTH = 2, 2, 4, 3, 4
RNG = np.random.default_rng(0)
SIZES = [pytest.param(range(1, 71), marks=pytest.mark.slow, id="all"), pytest.param((1, 2, 63, 64, 65, 70), id="some")]


@pytest.fixture(params=["by XLA", "by kernels"], autouse=True)
def path(request, monkeypatch):
    if request.param == "by XLA":
        monkeypatch.setattr(cpu, "kernels", lambda: cpu.Kernels(None, ""))


def unit(*shape):
    values = RNG.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def inputs(length, delta):
    """Of one sequence: q, k, v, the logarithm of its decay, beta."""
    values = RNG.normal(size=(length, HEADS, GROUP, VALUE))
    decay = -RNG.exponential(0.3, size=(length, HEADS, GROUP))
    beta = (RNG.uniform(0, 1, size=(length, HEADS, GROUP)),) if delta else ()
    heads = (array.reshape(length, HEADS * GROUP, *array.shape[3:]) for array in (values, decay, *beta))
    arrays = unit(length, HEADS, KEY), unit(length, HEADS, KEY), *heads
    return tuple(array.astype(np.float32) for array in arrays)


def one_by_one(delta, q, k, v, decay, beta=None):
    """By the definition, in float64."""
    state = np.zeros((HEADS * GROUP, KEY, VALUE))
    q, k = (np.repeat(array, GROUP, axis=1) for array in (q, k))
    outs = []
    for t in range(len(q)):
        state = state * np.exp(decay[t].astype(np.float64))[..., None, None]
        new = v[t] if not delta else beta[t][..., None] * (v[t] - np.einsum("hdv,hd->hv", state, k[t]))
        state = state + np.einsum("hd,hv->hdv", k[t], new)
        outs.append(np.einsum("hdv,hd->hv", state, q[t]))
    return np.stack(outs), state


def convolved(x, weight, bias):
    padded = np.concatenate([np.zeros((WIDTH - 1, *x.shape[1:])), x])
    return sum(padded[i : i + len(x)] * weight[..., i] for i in range(WIDTH)) + bias


class Flat:
    """Runs pieces of sequences in one batch after the other: one program, whatever the pieces.

    call: of a stream's arrays, states and a batch.
    """

    def __init__(self, call, states, like):
        self.call = jax.jit(call)
        self.states = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, np.nan, np.float32)), states)  # others' rest
        self.like = like

    def run(self, pieces, decoding=0, dead=()):
        """pieces: of each row its slot, how many tokens it had, and arrays of its new ones. decoding: how many of them,
        the first ones, decode. dead: rows that have stopped."""
        counts = [len(piece[2][0]) for piece in pieces]
        total, more = sum(counts), ROWS - len(pieces)
        stream = [np.full((TOKENS, *x.shape[1:]), np.nan, np.float32) for x in self.like]  # padding is anything
        for i, array in enumerate(stream):
            if total:
                array[:total] = np.concatenate([piece[2][i] for piece in pieces])
        ints = functools.partial(np.array, dtype=np.int32)
        lens = [
            0 if row in dead else past + n for row, ((_, past, _), n) in enumerate(zip(pieces, counts, strict=True))
        ]
        rows = np.repeat(np.arange(len(pieces)), counts)
        batch = ForwardBatch(
            tokens=ints(np.zeros(TOKENS)),
            positions=ints(np.zeros(TOKENS)),
            segment_ids=ints([*rows, *[ROWS - 1] * (TOKENS - total)]),
            cu_q_lens=ints([*np.cumsum([0, *counts]), *[total] * more]),
            kv_lens=ints([*lens, *[0] * more]),
            tables=(),
            distribution=ints([decoding, len(pieces), len(pieces)]),
            slots=ints([*(slot for slot, *_ in pieces), *[SLOTS - 1] * more]),
        )
        out, self.states = self.call(tuple(stream), self.states, jax.tree.map(jnp.asarray, batch))
        return np.split(np.asarray(out)[:total], np.cumsum(counts)[:-1])


def attention(delta):
    cell = LinearAttention((HEADS * GROUP, KEY, VALUE))
    states = jax.ShapeDtypeStruct((SLOTS, *cell.state), jnp.float32)
    return Flat(lambda stream, states, batch: recur(cell, stream, states, batch), states, inputs(1, delta))


def cuts(arrays, start, size):
    return tuple(array[start : start + size] for array in arrays)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("delta", [False, True])
def test_pieces_of_every_size(delta, sizes):
    flat, own = attention(delta), inputs(LENGTH, delta)
    expected, state = one_by_one(delta, *own)
    found = []
    for size in sizes:
        slot = size % (SLOTS - 1)
        outs = [flat.run([(slot, at, cuts(own, at, size))])[0] for at in range(0, LENGTH, size)]
        found.append(np.concatenate(outs))
        np.testing.assert_allclose(found[-1], expected, atol=2e-5, err_msg=str(size))
        if cpu.kernels().level is not None:  # to the bit
            np.testing.assert_array_equal(found[-1], found[0])
        np.testing.assert_allclose(flat.states[slot], state, atol=2e-5, err_msg=str(size))


@pytest.mark.parametrize("delta", [False, True])
def test_rows_beside_each_other(delta):
    """Three sequences: what decodes goes on one token at a time beside prompts of all lengths, one has stopped."""
    flat = attention(delta)
    own = [inputs(LENGTH, delta) for _ in range(3)]
    expected = [one_by_one(delta, *arrays)[0] for arrays in own]
    flat.run([(3, 0, cuts(own[0], 0, CHUNK - 1))])
    stopped = np.asarray(flat.states[3])
    flat.run([(1, 0, cuts(own[1], 0, CHUNK))])
    at = 0
    for i, size in enumerate([1, CHUNK, 7, 2, 3, CHUNK - 10, 4]):
        one = CHUNK + i
        decoded, _, chunk = flat.run(
            [(1, one, cuts(own[1], one, 1)), (3, one, cuts(own[0], one, 1)), (0, at, cuts(own[2], at, size))], 2, [1]
        )
        np.testing.assert_allclose(decoded, expected[1][one : one + 1], atol=2e-5)
        np.testing.assert_allclose(chunk, expected[2][at : at + size], atol=2e-5)
        at += size
    np.testing.assert_array_equal(flat.states[3], stopped)


@pytest.mark.slow
def test_against_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k, v, decay, beta = inputs(LENGTH, True)
    theirs = [torch.tensor(x)[None] for x in (q, k, v, decay, beta)]
    out, state = torch_recurrent_gated_delta_rule(*theirs, initial_state=None, output_final_state=True)
    flat = attention(True)
    ours = [flat.run([(0, at, cuts((q * KEY**-0.5, k, v, decay, beta), at, 90))])[0] for at in range(0, LENGTH, 90)]
    np.testing.assert_allclose(np.concatenate(ours), out[0], atol=2e-5)
    np.testing.assert_allclose(flat.states[0], state[0], atol=2e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_convolutions(sizes):
    weight, bias = (RNG.normal(size=shape).astype(np.float32) for shape in ((HEADS, 3, WIDTH), (HEADS, 3)))
    states = jax.ShapeDtypeStruct((SLOTS, WIDTH - 1, HEADS, 3), jnp.float32)
    x = RNG.normal(size=(2, 75, HEADS, 3)).astype(np.float32)
    expected = [convolved(row, weight, bias) for row in x]
    flat = Flat(lambda stream, *rest: causal_convolution(stream[0], weight, bias, *rest), states, [x[0]])
    for size in sizes:
        outs = [
            flat.run([(1, at, [x[0, at : at + size]]), (2, at // size, [x[1, at // size][None]])])
            for at in range(0, 75, size)
        ]
        np.testing.assert_allclose(np.concatenate([out for out, _ in outs]), expected[0], atol=1e-5, err_msg=str(size))
        np.testing.assert_allclose(np.concatenate([one for _, one in outs]), expected[1][: len(outs)], atol=1e-5)
    held = np.asarray(flat.states[2])
    flat.run([(1, 0, [x[0, :5]]), (2, 70, [x[1, 70:71]])], dead=[1])
    np.testing.assert_array_equal(flat.states[2], held)
