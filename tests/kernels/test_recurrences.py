"""Recurrences and short convolutions by the CPU kernels, at each level that this machine has, against float64, and
against XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.kernels import cpu
from jaxinfer.layers.convolution import causal_convolution
from jaxinfer.layers.linear_attention import LinearAttention
from jaxinfer.layers.mamba import SelectiveScan
from jaxinfer.layers.recurrence import recur
from tests.kernels.test_cpu import needs_them, random, set_level  # noqa: F401  (a fixture)

# One that decodes, one that has stopped, prompts that begin and that go on, one of a token; then padding.
STARTS, LENGTHS, SLOTS = (0, 1, 2, 39, 44, 45), (20, 0, 37, 9, 1), (3, 6, 0, 5, 1)
TOKENS, HELD = 48, 7
LIVE = [row for row, length in enumerate(LENGTHS) if length]
FRESH = [row for row in LIVE if LENGTHS[row] == STARTS[row + 1] - STARTS[row]]


def batch():
    ints = functools.partial(np.array, dtype=np.int32)
    owners = np.repeat(np.arange(5), np.diff(STARTS))
    return ForwardBatch(
        tokens=np.zeros(TOKENS, np.int32),
        positions=np.zeros(TOKENS, np.int32),
        segment_ids=ints([*owners, *[4] * (TOKENS - len(owners))]),
        cu_q_lens=ints(STARTS),
        kv_lens=ints(LENGTHS),
        tables=(),
        distribution=ints([2, 5, 5]),
        slots=ints(SLOTS),
    )


def linear_attention(keys, group, depth, width, delta):
    heads = keys * group
    k = random((TOKENS, keys, depth), "float32")
    inputs = [random((TOKENS, keys, depth), "float32"), k / np.linalg.norm(k, axis=-1, keepdims=True)]
    inputs += [random((TOKENS, heads, width), "float32"), -np.abs(random((TOKENS, heads), "float32"))]
    inputs += [1 / (1 + np.exp(random((TOKENS, heads), "float32")))] if delta else []
    cell = LinearAttention((heads, depth, width))

    def step(state, q, k, v, decay, *beta):
        q, k = (np.repeat(x, group, axis=0) for x in (q, k))
        state = state * np.exp(decay)[:, None, None]
        for factor in beta:
            v = (v - np.einsum("hdv,hd->hv", state, k)) * factor[:, None]
        state = state + k[:, :, None] * v[:, None]
        return np.einsum("hdv,hd->hv", state, q), state

    return functools.partial(recur, cell), step, inputs, cell.state


def selective_scan(channels, size):
    a = -np.exp(random((channels, size), "float32"))
    inputs = [random((TOKENS, channels), "float32"), np.abs(random((TOKENS, channels), "float32"))]
    inputs += [random((TOKENS, 1, size), "float32") for _ in range(2)]

    def step(state, x, dt, b, c):
        state = state * np.exp(dt[:, None] * a) + (dt * x)[:, None] * b
        return np.sum(state * c, axis=-1), state

    def call(inputs, states, batch):
        return recur(SelectiveScan(jnp.asarray(a), (channels, size)), inputs, states, batch)

    return call, step, inputs, (channels, size)


def convolution(channels, width, with_bias):
    weight = random((*channels, width), "float32")
    bias = random(channels, "float32") if with_bias else None

    def step(state, x):
        seen = np.concatenate([state, x[None]])
        return np.sum(np.moveaxis(seen, 0, -1) * weight, axis=-1) + (0 if bias is None else bias), seen[1:]

    def call(inputs, states, batch):
        return causal_convolution(inputs[0], jnp.asarray(weight), bias, states, batch)

    return call, step, [random((TOKENS, *channels), "float32")], (width - 1, *channels)


CASES = {
    "gated delta": lambda: linear_attention(2, 2, 16, 40, True),
    "odd sizes": lambda: linear_attention(1, 3, 5, 3, True),
    "no delta rule": lambda: linear_attention(3, 1, 7, 33, False),
    "scan": lambda: selective_scan(40, 16),
    "a scan of odd sizes": lambda: selective_scan(13, 3),
    "convolution": lambda: convolution((10, 40), 4, False),
    "a convolution of odd sizes": lambda: convolution((21,), 3, True),
}


def given(inputs, state):
    """With poison wherever nothing may be read: padding, slots of sequences that begin, of no row, and of nobody."""
    states = random((HELD, *state), "float32")
    going_on = [SLOTS[row] for row in LIVE if row not in FRESH]
    states[[slot for slot in range(HELD) if slot not in going_on]] = np.nan
    inputs = tuple(x.copy() for x in inputs)
    for x in inputs:
        x[STARTS[1] : STARTS[2]] = np.nan  # of the row that has stopped
        x[STARTS[-1] :] = np.nan
    return inputs, states, batch()


@needs_them
@pytest.mark.parametrize("case", CASES)
def test_ragged_rows(case, request, monkeypatch):
    to_level = request.getfixturevalue("set_level")
    call, step, inputs, state = CASES[case]()
    arrays = given(inputs, state)
    own = jax.jit(lambda *given: call(*given))
    assert any(target in own.lower(*arrays).as_text() for target in cpu.RECURRENCES)
    for_tpu = own.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert not any(target in for_tpu for target in cpu.RECURRENCES)
    found = {}
    for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
        to_level(level)
        out, after = (np.asarray(x) for x in own(*arrays))
        assert not out[STARTS[1] : STARTS[2]].any()
        assert not out[STARTS[-1] :].any()
        others = [slot for slot in range(HELD) if slot not in [SLOTS[row] for row in LIVE]]
        np.testing.assert_array_equal(after[others], arrays[1][others])
        for _ in range(20):
            again = own(*arrays)
            np.testing.assert_array_equal(again[0], out)
            np.testing.assert_array_equal(again[1], after)
        found[level] = out, after
    monkeypatch.setattr(cpu, "kernels", lambda: cpu.Kernels(None, ""))
    found["none"] = [np.asarray(x) for x in jax.jit(lambda *given: call(*given))(*arrays)]
    for row in LIVE:
        now, slot = np.zeros(state) if row in FRESH else arrays[1][SLOTS[row]].astype(np.float64), SLOTS[row]
        for t in range(STARTS[row], STARTS[row + 1]):
            wanted, now = step(now, *(x[t].astype(np.float64) for x in inputs))
            for level, (out, _) in found.items():
                np.testing.assert_allclose(
                    out[t], wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=f"{level} {row} {t}"
                )
        for level, (_, after) in found.items():
            np.testing.assert_allclose(after[slot], now, atol=2e-5 * np.abs(now).max(), err_msg=f"{level}: row {row}")


@needs_them
def test_what_does_not_fit_is_refused():
    rows = [np.array(values, np.int32) for values in ((0, 2, 3), (2, 1), (0, 1))]
    keys, values, numbers = (random(shape, "float32") for shape in ((3, 1, 4), (3, 2, 5), (3, 2)))
    linear = [random((2, 2, 4, 5), "float32"), *rows, keys, keys, values, numbers, numbers]
    x, b, a = (random(shape, "float32") for shape in ((3, 6), (3, 2), (6, 2)))
    scan = [random((2, 6, 2), "float32"), *rows, x, x, b, b, a]
    convolution = [random((2, 3, 6), "float32"), *rows, x, random((6, 4), "float32"), random(6, "float32")]
    for target, arrays, out in zip(cpu.RECURRENCES, (linear, scan, convolution), (values, x, x), strict=True):
        like = jax.ShapeDtypeStruct(arrays[0].shape, np.float32), jax.ShapeDtypeStruct(out.shape, np.float32)
        call = jax.ffi.ffi_call(target, like)
        jax.block_until_ready(call(*arrays))
        for i in range(len(arrays)):
            if 1 <= i <= 3:
                wrong = [arrays[i][:-1], arrays[i] + 7] if i != 2 else [arrays[i][:-1]]
            else:
                wrong = [arrays[i][..., :-1], arrays[i][None, :1]]
            for other in wrong:
                with pytest.raises(Exception, match=r"jaxinfer_|rows must follow each other"):
                    jax.block_until_ready(call(*arrays[:i], other, *arrays[i + 1 :]))
