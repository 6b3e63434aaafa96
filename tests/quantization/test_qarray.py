"""Quantized weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quantization import qarray
from jaxinfer.quantization.qarray import QArray, dot, quantize, take
from jaxinfer.quantization.schemes import SCHEMES, check_quantization, scheme_of

RNG = np.random.default_rng(0)


def weight(rows=24, columns=40, dtype=np.float32):
    """Channels of very different sizes, and one of zeros."""
    values = RNG.normal(size=(rows, columns)) * 10.0 ** RNG.integers(-6, 3, (rows, 1))
    values[3] = 0
    return values.astype(dtype)


def real(values, scales):
    return np.asarray(values, np.float64) * np.asarray(scales, np.float64)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_nearest_values(name, dtype, monkeypatch):
    scheme, given = SCHEMES[name], weight(dtype=dtype)
    monkeypatch.setattr(qarray, "BLOCK", 100)  # 2 rows at a time
    values, scales = quantize(given, scheme)
    assert (values.dtype, scales.dtype, scales.shape) == (jnp.dtype(scheme.values), np.float32, (24, 1))
    error = np.abs(real(values, scales) - given.astype(np.float64))
    if scheme.values == "int8":
        assert np.all(error <= scales * 0.501)
        assert np.abs(values.astype(int)).max() == 127
    else:
        assert np.all(error <= np.maximum(np.abs(given.astype(np.float64)) * 2**-4, scales * 2**-10) * 1.001)
    assert not np.any(real(values, scales)[3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    given = weight()
    given[5, 6] = bad
    with pytest.raises(ValueError, match="not finite, which can't be quantized to int8"):
        quantize(given, SCHEMES["int8"])


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_products(name, dtype, error):
    """The error is that of the activations' own dtype: the weight's values are exact in all of them."""
    values, scales = quantize(RNG.normal(size=(24, 40)).astype(np.float32), SCHEMES[name])
    x = jnp.asarray(RNG.normal(size=(7, 40)), dtype)
    held = QArray(jnp.asarray(values), jnp.asarray(scales), SCHEMES[name])
    expected = np.asarray(x, np.float64) @ real(values, scales).T
    for out_dtype in (None, "float32"):
        got = jax.jit(lambda x, w, out_dtype=out_dtype: dot(x, w, out_dtype))(x, held)
        assert got.dtype == (out_dtype or dtype)
        bound = error if out_dtype is None else 2e-6
        assert np.abs(np.asarray(got, np.float64) - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_quantized_activations(dtype):
    """Each token has a scale of its own, and sums are exact; a token of zeros gives zeros."""
    scheme = SCHEMES["int8-w8a8"]
    values, scales = quantize(RNG.normal(size=(24, 40)).astype(np.float32), scheme)
    x = jnp.asarray(RNG.normal(size=(7, 40)) * 10.0 ** np.arange(-3, 4)[:, None], dtype).at[2].set(0)
    got = dot(x, QArray(jnp.asarray(values), jnp.asarray(scales), scheme), "float32")
    rows = np.asarray(x, np.float32)
    steps = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    expected = np.rint(rows / steps).astype(int) @ values.astype(int).T * real(steps, scales.T)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)
    assert not np.any(got[2])


def test_rows_of_a_table():
    values, scales = quantize(weight(), SCHEMES["int8"])
    held = QArray(jnp.asarray(values), jnp.asarray(scales), SCHEMES["int8"])
    ids = jnp.asarray([0, 23, 5, 99], jnp.int32)
    got = take(held, ids, "float32")
    np.testing.assert_allclose(got, real(values, scales)[[0, 23, 5, 23]], rtol=1e-6)
    assert take(held, ids, jnp.bfloat16).dtype == jnp.bfloat16


def test_which_weights():
    name = "model.layers.0.mlp.up_proj.weight"
    assert scheme_of(None, name, False) is None
    assert scheme_of("int8", name, False).name == "int8"
    assert scheme_of("int8", "model.embed_tokens.weight", True) is None
    rules = {"*.mlp.*": "fp8", "lm_head.*": "none", "*": "int8"}
    assert scheme_of(rules, name, False).name == "fp8"
    assert scheme_of(rules, "lm_head.weight", False) is None
    assert scheme_of(rules, "model.embed_tokens.weight", True).name == "int8"
    assert scheme_of({"*.mlp.*": "fp8"}, "lm_head.weight", False) is None


@pytest.mark.parametrize("wrong", ["int3", "", 8, True, {}, {"*": "int3"}, {"*": None}, {3: "int8"}, ["int8"]])
def test_what_is_not_a_scheme(wrong):
    with pytest.raises(ValueError, match=r"^quantization (is|has) .*one of int8, int8-w8a8, fp8"):
        check_quantization(wrong)
