"""What adapters make of products, by the CPU kernel and by XLA, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels import cpu
from jaxinfer.quantization.quantize import dequantize, quantize
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.weights import Adapted, Dense, LowRank, QArray, dots, grouped_dots, take
from tests.kernels.test_cpu import needs_them, random, set_level  # noqa: F401  (a fixture)

SLOTS, RANK = 3, 5
SIZES = [(1, 1, 1), (1, 64, 24), (2, 1025, 13), (4, 129, 97), (9, 33, 70), (40, 50, 65)]


def case(tokens, depth, columns, dtype, seed=0):
    """Activations, which slot each has, a weight of these columns and of one, and what adapters make of both."""
    generator = np.random.default_rng(seed + tokens)
    x = random((tokens, depth), "float32")
    slot = np.sort(generator.integers(0, SLOTS + 1, tokens)) if tokens % 2 else generator.integers(0, SLOTS + 1, tokens)
    slot[slot == 1] = 2  # nobody has the second
    weights, beside = [], []
    for own in (columns, 1):
        weights.append(random((own, depth), dtype))
        a, b = random((SLOTS, RANK, depth), dtype), random((SLOTS, RANK, own), dtype)
        gain, shift = random((SLOTS, own), "float32"), random((SLOTS, own), "float32")
        beside.append([a, b, gain, shift])
    return x, slot.astype(np.int32), weights, beside


def expected(x, slot, weight, own, rounded=None):
    """rounded: activations as the product without an adapter has them."""
    a, b, gain, shift = (np.asarray(array, np.float64) for array in own)
    out = np.asarray(x if rounded is None else rounded, np.float64) @ np.asarray(weight, np.float64).T
    for t, s in enumerate(slot):
        if s < SLOTS:
            out[t] = gain[s] * (out[t] + (a[s] @ x[t].astype(np.float64)) @ b[s]) + shift[s]
    return out


def adapted(x, slot, weights, beside):
    return [
        Adapted(Dense(jnp.asarray(weight)), jnp.asarray(slot), LowRank(*map(jnp.asarray, own)))
        for weight, own in zip(weights, beside, strict=True)
    ]


@pytest.mark.parametrize("level", ["none", pytest.param("portable", marks=needs_them), *cpu.LEVELS[1:]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(dtype, level, request, monkeypatch):
    if level == "none":
        monkeypatch.setattr(cpu, "kernels", lambda: cpu.Kernels(None, ""))
    else:
        request.getfixturevalue("set_level")(level)
    for sizes in SIZES:
        x, slot, weights, beside = case(*sizes, dtype)
        if level != "none":  # which is not read
            beside = [
                [
                    np.where(np.arange(SLOTS).reshape(-1, *[1] * (a.ndim - 1)) == 1, np.nan, a).astype(a.dtype)
                    for a in own
                ]
                for own in beside
            ]
        found = jax.jit(lambda *given: dots(*given))(jnp.asarray(x), adapted(x, slot, weights, beside))  # anew
        rounded = x.astype("bfloat16") if (level, dtype) == ("avx512", "bfloat16") and len(x) >= 16 else x
        for weight, own, got in zip(weights, beside, found, strict=True):
            wanted = expected(x, slot, weight, own, rounded)
            assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max() * np.sqrt(sizes[1] * RANK)


@needs_them
@pytest.mark.parametrize(
    ("name", "target"), [("int8", cpu.ADAPTED_DOT), ("int4", cpu.LOW_RANK), ("int8-w8a8", cpu.LOW_RANK)]
)
def test_beside_quantized_weights(name, target):
    """Scales of products come before what is added to them; all at once where products are with the values."""
    scheme = SCHEMES[name]
    for tokens in (1, 7, 17):
        x, slot, weights, beside = case(tokens, 256, 24, "float32")
        slot[0] = SLOTS
        values, scales = quantize(weights[0], scheme)
        weight = Adapted(
            QArray(jnp.asarray(values), jnp.asarray(scales), scheme),
            jnp.asarray(slot),
            LowRank(*map(jnp.asarray, beside[0])),
        )
        call = jax.jit(lambda *given: dots(*given))
        (found,) = call(jnp.asarray(x), [weight])
        assert target in call.lower(jnp.asarray(x), [weight]).as_text()
        (alone,) = jax.jit(lambda *given: dots(*given))(jnp.asarray(x), [weight.base])
        np.testing.assert_array_equal(found[0], alone[0])
        wanted = expected(x, slot, dequantize(values, scales, scheme), beside[0])
        tolerance = 2e-2 if scheme.activations else 1e-4
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("level", ["none", pytest.param("best", marks=needs_them)])
def test_experts(level, monkeypatch):
    if level == "none":
        monkeypatch.setattr(cpu, "kernels", lambda: cpu.Kernels(None, ""))
    experts, sizes = 4, np.array([3, 0, 5, 1], np.int32)
    x, slot = random((11, 24), "float32"), np.array([0, 3, 2, 2, 0, 1, 3, 2, 0, 1, 1], np.int32)
    weight = random((experts, 13, 24), "float32")
    a, b = random((experts, SLOTS, RANK, 24), "float32"), random((experts, SLOTS, RANK, 13), "float32")
    own = Adapted(Dense(jnp.asarray(weight)), jnp.asarray(slot), LowRank(jnp.asarray(a), jnp.asarray(b)))
    (found,) = jax.jit(lambda *given: grouped_dots(*given))(jnp.asarray(x), jnp.asarray(sizes), [own])
    owners = np.repeat(np.arange(experts), sizes)
    for t in range(11):
        wanted = np.zeros(13)
        if t < len(owners):
            e, s = owners[t], slot[t]
            wanted = weight[e] @ x[t] + ((a[e, s] @ x[t]) @ b[e, s] if s < SLOTS else 0)
        np.testing.assert_allclose(found[t], wanted, atol=1e-4 * np.abs(x).max() * np.sqrt(24 * RANK))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_table(dtype):
    table, a = random((30, 16), dtype), random((SLOTS, 30, RANK), dtype)
    b, gain, shift = random((SLOTS, RANK, 16), dtype), random((SLOTS, 16), "float32"), random((SLOTS, 16), "float32")
    ids, slot = np.array([3, 29, 3, 0], np.int32), np.array([0, 2, 3, 1], np.int32)
    beside = LowRank(*map(jnp.asarray, (a, b, gain, shift)))
    weight = Adapted(Dense(jnp.asarray(table)), jnp.asarray(slot), looked_up=beside)
    found = take(weight, jnp.asarray(ids), "float32")
    for got, i, s in zip(found, ids, slot, strict=True):
        row = table[i].astype(np.float64)
        if s < SLOTS:
            row = gain[s] * (row + a[s, i].astype(np.float64) @ b[s].astype(np.float64)) + shift[s]
        np.testing.assert_allclose(got, row, atol=1e-4)


@needs_them
def test_what_does_not_fit_is_refused():
    x, slot, _, ((a, b, gain, shift), _) = case(4, 8, 6, "float32")
    call = jax.ffi.ffi_call(cpu.LOW_RANK, [jax.ShapeDtypeStruct((4, 6), np.float32)])
    out = np.zeros((4, 6), np.float32)
    both = jax.ffi.ffi_call(cpu.ADAPTED_DOT, [jax.ShapeDtypeStruct((4, 6), np.float32)])
    w, scales = np.zeros((6, 8), np.int8), np.zeros(6, np.float32)
    for scaled, arguments in [
        (True, (x, slot, w, scales[:5], a, b)),
        (True, (x, slot, w, a, b)),
        (False, (x, slot, w[:5], a, b)),
        (False, (x, slot, w[:, :7], a, b)),
        (False, (x[:3], slot, w, a, b)),
    ]:
        with pytest.raises(Exception, match=r"jaxinfer_(adapted_dot|dot|low_rank)"):
            jax.block_until_ready(both(*arguments, share=np.float32(1), rounds=False, scaled=scaled))
    wrong = [
        (x[:3], slot, out, a, b),
        (x, slot, out, a[:, :2], b),
        (x, slot, out, a, b, gain[:2], shift),
        (x, slot, out, a),
    ]
    for arguments in wrong:
        with pytest.raises(Exception, match="jaxinfer_low_rank"):
            jax.block_until_ready(call(*arguments, share=np.float32(1)))
