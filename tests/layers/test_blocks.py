"""Linear layers, norms and activations against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.layers.linear import Embedding, Linear
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.norm import LayerNorm, RMSNorm
from jaxinfer.weights import Dense, dot

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.standard_normal(shape).astype(jnp.dtype(dtype))


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dot_accumulates_in_float32(dtype):
    """A thousand products of 16-bit numbers, summed in 16 bits, would be off by percents."""
    x, weight = normal(3, 1000, dtype=dtype), normal(5, 1000, dtype=dtype)
    result = dot(jnp.asarray(x), Dense(jnp.asarray(weight)), out_dtype="float32")
    np.testing.assert_allclose(wide(result), wide(x) @ wide(weight).T, atol=1e-4)
    assert dot(jnp.asarray(x), Dense(jnp.asarray(weight))).dtype == x.dtype


@pytest.mark.parametrize("platform", ["tpu", "cuda"])  # a CPU's kernel has no other
def test_float32_is_multiplied_at_full_precision_on_every_device(platform):
    traced = jax.jit(dot).trace(jnp.ones((2, 8)), Dense(jnp.ones((4, 8))))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("HIGHEST") == 2


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    layer = Linear(6, 4, axes=("mlp", "embed"), bias=bias, dtype="float32", rngs=nnx.Rngs(0))
    assert layer.weight.get_value().shape == (4, 6)
    assert layer.weight.get_metadata()["axes"] == ("mlp", "embed")
    x = normal(3, 6)
    expected = x @ wide(layer.weight.get_value().array).T
    if bias:
        layer.bias.set_value(jnp.arange(4.0))
        expected = expected + np.arange(4)
        assert layer.bias.get_metadata()["axes"] == ("mlp",)
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))), expected, atol=1e-6)


def test_embedding():
    table = Embedding(10, 4, dtype="float32", rngs=nnx.Rngs(0))
    weight = np.asarray(table.weight.get_value().array)
    np.testing.assert_array_equal(table(jnp.asarray([3, 9, 0], jnp.int32)), weight[[3, 9, 0]])
    # Positions of padding and of finished rows may lie beyond the table: any row does, but not NaN.
    np.testing.assert_array_equal(table(jnp.asarray([10, 1000], jnp.int32)), weight[[9, 9]])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_norms(scale):
    x = scale * normal(5, 64) + scale
    rms, layer = RMSNorm(64, eps=1e-6, dtype="float32"), LayerNorm(64, eps=1e-5, dtype="float32")
    weight, bias = normal(64), normal(64)
    for norm in (rms, layer):
        norm.weight.set_value(jnp.asarray(weight))
    layer.bias.set_value(jnp.asarray(bias))
    exact = wide(x)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(np.asarray(rms(jnp.asarray(x))), expected, atol=1e-5)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_of_float16_do_not_overflow(kind):
    """300 squared is beyond float16."""
    norm = kind(64, eps=1e-5, dtype="float16")
    x = (300 * normal(2, 64)).astype(np.float16)
    result = norm(jnp.asarray(x))
    assert result.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(result), np.asarray(norm(jnp.asarray(x / 64))), atol=5e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers(name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.asarray(ACTIVATIONS[name](jnp.asarray(x))), expected, atol=2e-6)


def test_gated_mlp():
    mlp = GatedMLP(6, 10, activation="relu", dtype="float32", rngs=nnx.Rngs(0))
    x = normal(3, 6)
    gate, up, down = (wide(getattr(mlp, f"{n}_proj").weight.get_value().array) for n in ("gate", "up", "down"))
    expected = (np.maximum(x @ gate.T, 0) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(np.asarray(mlp(jnp.asarray(x))), expected, atol=1e-7)
