"""Quantized weights against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quantization import quantize as quantizing
from jaxinfer.quantization.quantize import dequantize, quantize
from jaxinfer.quantization.schemes import SCHEMES, TABLES, check_quantization, scheme_of
from jaxinfer.weights import Dense, QArray, dot, dots, quantized, take

RNG = np.random.default_rng(0)


def weight(rows=24, columns=40, dtype=np.float32):
    """Channels of very different sizes, and one of zeros."""
    values = RNG.normal(size=(rows, columns)) * 10.0 ** RNG.integers(-6, 3, (rows, 1))
    values[3] = 0
    return values.astype(dtype)


def real(values, scales, scheme=SCHEMES["int8"], zeros=0, biases=0):
    """What they stand for: of each byte of int4 the low half first; each scale for its block."""
    values, scales = np.asarray(values), np.asarray(scales, np.float64)
    if values.ndim > 2:  # experts
        zeros, biases = zeros + 0 * scales, biases + 0 * scales
        each = zip(values, scales, zeros, biases, strict=True)
        return np.stack([real(value, scale, scheme, *more) for value, scale, *more in each])
    if scheme.packed == 2:
        halves = np.stack([values % 16, values // 16], axis=-1).reshape(len(values), -1).astype(int)
        values = np.asarray(TABLES[scheme.table])[halves] if scheme.table else halves - 16 * (halves > 7)
    rows, columns = values.shape
    high, wide = scheme.rows, scheme.columns or columns
    scales, zeros, biases = (
        np.kron(array, np.ones((high, wide)))[:rows, :columns]
        for array in (scales, zeros + 0 * scales, biases + 0 * scales)
    )
    return (values.astype(np.float64) - zeros) * scales + biases


# Blocks of the last rows and columns are cut, groups are not.
SHAPES = {"int4": (24, 96), "int4-g128": (24, 384), "fp8-block": (300, 200), "nf4": (24, 192), "mxfp4": (24, 96)}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_nearest_values(name, dtype, monkeypatch):
    shape = SHAPES.get(name, (24, 40))
    scheme, matrix = SCHEMES[name], weight(*shape, dtype=dtype)
    monkeypatch.setattr(quantizing, "BLOCK", 100)  # few rows at a time
    values, scales = quantize(matrix, scheme)
    groups = dict.fromkeys(("int4", "int4-g128", "nf4", "mxfp4"), (24, 3)) | {"fp8-block": (3, 2)}
    kinds = jnp.dtype(scheme.values), jnp.dtype(scheme.scales), groups.get(name, (24, 1))
    assert (values.dtype, scales.dtype, scales.shape) == kinds
    np.testing.assert_allclose(dequantize(values, scales, scheme), real(values, scales, scheme), rtol=1e-6)
    error = np.abs(real(values, scales, scheme) - matrix.astype(np.float64))
    steps = real(np.full(matrix.shape, 1), scales, dataclasses.replace(scheme, packed=1))
    if scheme.table:
        table = np.asarray(TABLES[scheme.table]) * steps[..., None]
        np.testing.assert_allclose(error, np.abs(table - matrix.astype(float)[..., None]).min(axis=-1), rtol=1e-3)
        return
    if scheme.values == "float8_e4m3fn":
        assert np.all(error <= np.maximum(np.abs(matrix.astype(np.float64)) * 2**-4, steps * 2**-10) * 1.001)
    else:
        assert np.all(error <= steps * 0.501)
        assert np.abs(real(values, np.ones_like(scales), scheme)).max() == {"int8": 127, "uint8": 7}[scheme.values]
    assert not np.any(real(values, scales, scheme)[3])
    assert np.array_equal(quantize(np.asfortranarray(matrix), scheme)[0], values)


def test_the_better_power_of_two():
    """Of those around what the largest weight asks for, by the error of the whole block; none is better by much."""
    scheme, matrix = SCHEMES["mxfp4"], weight(64, 320)
    _, scales = quantize(matrix, scheme)
    blocks, table = matrix.reshape(64, -1, 32), np.asarray(TABLES["e2m1"])

    def error(powers):
        scaled = blocks / powers[..., None]
        nearest = table[np.abs(scaled[..., None] - table).argmin(axis=-1)]
        return np.sum(np.square((nearest - scaled) * powers[..., None]), axis=-1)

    chosen = scales.astype(np.float64)
    least = np.min([error(chosen * 2.0**more) for more in (-2, -1, 0, 1, 2)], axis=0)
    np.testing.assert_allclose(error(chosen), least, rtol=1e-5, atol=1e-30)
    largest = np.abs(blocks).max(axis=-1)
    assert np.any(largest > 6 * chosen)  # some are cut off
    assert np.all(largest < 12 * np.maximum(chosen, 1e-30))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    matrix = weight()
    matrix[5, 6] = bad
    with pytest.raises(ValueError, match="not finite, which can't be quantized to int8"):
        quantize(matrix, SCHEMES["int8"])


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
    rng = np.random.default_rng(2)  # of its own: an activation half way between two steps may go either way
    values, scales = quantize(rng.normal(size=(24, 40)).astype(np.float32), scheme)
    x = jnp.asarray(rng.normal(size=(7, 40)) * 10.0 ** np.arange(-3, 4)[:, None], dtype).at[2].set(0)
    got = dot(x, QArray(jnp.asarray(values), jnp.asarray(scales), scheme), "float32")
    rows = np.asarray(x, np.float32)
    steps = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    expected = np.rint(rows / steps).astype(int) @ values.astype(int).T * (steps.astype(float) * scales.T)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)
    assert not np.any(got[2])


@pytest.mark.parametrize("name", ["int4", "int4-g128", "fp8-block"])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("rows", [128, 1024])
def test_products_with_blocks(name, dtype, error, rows, monkeypatch):
    """All rows of the weight at once, and some at a time, of which 44 remain."""
    scheme, columns = SCHEMES[name], {"fp8-block": 200}.get(name, 384)
    monkeypatch.setattr(quantized, "PRODUCT", rows * columns)
    values, scales = quantize(RNG.normal(size=(300, columns)).astype(np.float32), scheme)
    x = jnp.asarray(RNG.normal(size=(7, columns)), dtype)
    expected = np.asarray(x, np.float64) @ real(values, scales, scheme).T
    got = jax.jit(lambda x, w: dot(x, w, "float32"))(x, QArray(jnp.asarray(values), jnp.asarray(scales), scheme))
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= error * np.abs(expected).max()


@pytest.mark.parametrize(("values", "bits"), [("uint8", 4), ("int8", 8)])
def test_zero_points(values, bits):
    """Of each group, in products and in tables."""
    scheme = dataclasses.replace(SCHEMES["int4"], values=values, packed=8 // bits, zeros=True)
    stored = RNG.integers(0, 256, (24, 96 * bits // 8)).astype(np.uint8).view(values)
    zeros, scales = RNG.integers(-8, 8, (24, 3)).astype(np.int8), RNG.uniform(0.1, 1, (24, 3)).astype(np.float32)
    held = QArray(*map(jnp.asarray, (stored, scales)), scheme, zero_point=jnp.asarray(zeros))
    expected = real(stored, scales, scheme, zeros)
    x = jnp.asarray(RNG.normal(size=(7, 96)), "float32")
    np.testing.assert_allclose(dot(x, held), np.asarray(x, np.float64) @ expected.T, atol=1e-3)
    np.testing.assert_allclose(take(held, jnp.arange(24), "float32"), expected, rtol=1e-6)


def test_the_layout_of_int4():
    """As others write it: the even input in the low four bits, two's complement."""
    scheme = SCHEMES["int4"]
    values, scales = quantize(np.array([[7.0, -2.0] + [0.0] * 29 + [-7.0]]), scheme)
    assert values.tolist() == [[0xE7] + [0] * 14 + [0x90]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("name", ["int8", "int4", "fp8-block"])
def test_rows_of_a_table(name):
    scheme = SCHEMES[name]
    values, scales = quantize(weight(*SHAPES.get(name, (24, 40))), scheme)
    held, last = QArray(jnp.asarray(values), jnp.asarray(scales), scheme), len(values) - 1
    ids = jnp.asarray([0, 23, 5, last + 99], jnp.int32)
    got = take(held, ids, "float32")
    np.testing.assert_allclose(got, real(values, scales, scheme)[[0, 23, 5, last]], rtol=1e-6)
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
    with pytest.raises(
        ValueError, match=r"^quantization (is|has) .*one of int8, int8-w8a8, int4, int4-g128, nf4, mxfp4, fp8, fp8-b"
    ):
        check_quantization(wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_copy_is_made_of_a_table_of_16_bits(dtype):
    table, ids = weight(dtype=dtype), jnp.asarray([3, 70, 0])
    held = Dense(jnp.asarray(table))
    call = jax.jit(lambda table, ids: take(table, ids, "float32"))
    np.testing.assert_array_equal(call(held, ids), table.astype(np.float32)[[3, 23, 0]])
    assert "f32[24,40]" not in call.lower(held, ids).compile().as_text()


@pytest.mark.parametrize("name", SCHEMES)
def test_of_more_axes(name):
    """Each matrix as if it were alone, and one of them taken out is a weight."""
    scheme, shape = SCHEMES[name], SHAPES.get(name, (24, 40))
    stack = np.stack([weight(*shape) for _ in range(3)])
    values, scales = quantize(stack, scheme)
    held = QArray(jnp.asarray(values), jnp.asarray(scales), scheme, ("experts", "mlp", "embed"))
    assert held.shape == stack.shape
    assert held.array_axes[0] == held.axes
    x = jnp.asarray(RNG.normal(size=(5, shape[1])), jnp.float32)
    for i, matrix in enumerate(stack):
        alone = QArray(*map(jnp.asarray, quantize(matrix, scheme)), scheme, ("mlp", "embed"))
        assert (held[i].axes, held[i].shape) == (alone.axes, alone.shape)
        np.testing.assert_array_equal(dot(x, held[i]), dot(x, alone))
    dense = Dense(jnp.asarray(stack), ("experts", "mlp", "embed"))
    assert (dense[1].axes, dense[1:].axes, dense[1:].shape) == (dense.axes[1:], dense.axes, (2, *shape))


def test_kinds_are_multiplied_in_groups():
    """Of weights with one input, those of one kind at once, and all where they were asked for."""
    x = jnp.asarray(RNG.normal(size=(5, 96)), jnp.float32)
    plain = [Dense(jnp.asarray(weight(n, 96))) for n in (8, 24)]
    fewer = [
        QArray(*map(jnp.asarray, quantize(weight(n, 96), SCHEMES[k])), SCHEMES[k])
        for n, k in ((4, "int4"), (16, "int8"))
    ]
    mixed = [plain[0], fewer[0], plain[1], fewer[1]]
    for got, matrix in zip(dots(x, mixed), mixed, strict=True):
        np.testing.assert_array_equal(got, dot(x, matrix))
