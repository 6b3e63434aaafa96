"""Rotary embeddings: the rotation itself in float64, and frequencies against transformers with real models' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.rotary import Rope
from jaxinfer.models.config import ConfigReader, rope_of


def test_pairs_turn_by_position_times_frequency():
    """Dimensions i and i + d/2 are the real and imaginary part of a number that is multiplied by e^(i angle)."""
    rope = Rope(dim=16, theta=100.0)
    positions = np.array([0, 1, 7, 1000], np.int32)
    x = np.random.default_rng(0).standard_normal((4, 3, 16)).astype(np.float32)
    frequencies = 100.0 ** (-np.arange(8) / 8)
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * positions[:, None, None] * frequencies)
    result = np.asarray(rope.rotate(jnp.asarray(x), rope.cos_sin(jnp.asarray(positions))))
    np.testing.assert_allclose(result, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)
    np.testing.assert_allclose(result[0], x[0])  # position 0 stays as it is


def test_angles_are_computed_once():
    """Not in each layer that turns by them, where XLA would put them."""

    def layers(x, positions):
        rope = Rope(16, 10_000.0)
        angles = rope.cos_sin(positions)
        for _ in range(3):
            x = jnp.tanh(rope.rotate(x, angles)) * 3
        return x

    program = jax.jit(layers).trace(jnp.ones((4, 2, 16)), jnp.arange(4, dtype=jnp.int32))
    assert program.lower().compile().as_text().count(" cosine(") == 1
    for platform, branches in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = program.lower(lowering_platforms=(platform,)).as_text()
        # Of a branch, whether any position turns.
        assert ("stablehlo.reduce" in text, "stablehlo.optimization_barrier" in text) == (branches, not branches)


def test_scores_depend_on_distance_alone():
    rope = Rope(dim=32)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 32)).astype(np.float32)) for _ in range(2))

    def score(query: int, key: int) -> float:
        at = [rope.cos_sin(jnp.asarray([p], jnp.int32)) for p in (query, key)]
        return jnp.sum(rope.rotate(q, at[0]) * rope.rotate(k, at[1])).item()

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)


def test_low_precision_is_turned_in_float32():
    rope = Rope(dim=8)
    cos_sin = rope.cos_sin(jnp.asarray([3, 50_000], jnp.int32))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 8)), jnp.bfloat16)
    result = rope.rotate(x, cos_sin)
    assert result.dtype == jnp.bfloat16
    expected = rope.rotate(x.astype(jnp.float32), cos_sin).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(expected, np.float32))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REAL = {
    "Llama 3.1 8B": (128, 131072, {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    "Llama 3.2 1B": (64, 131072, {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "factor": 32.0}),
    "Llama 4 Scout": (
        128,
        10485760,
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "factor": 16.0, "high_freq_factor": 1.0},
    ),
    "Qwen2.5 with yarn": (
        128,
        32768,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "Vicuna 16k": (128, 16384, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "Qwen3": (128, 40960, {"rope_type": "default", "rope_theta": 1e6}),
}


@pytest.mark.parametrize("name", REAL)
def test_frequencies_are_transformers(name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim, context, parameters = REAL[name]
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        dim=head_dim,
        max_position_embeddings=context,
        rope_parameters=dict(parameters),
    )
    theirs = LlamaRotaryEmbedding(config)
    ours, _ = rope_of(ConfigReader({"max_position_embeddings": context, "rope_parameters": parameters}), head_dim)
    np.testing.assert_allclose(ours.inv_freq(), theirs.inv_freq.numpy(), rtol=2e-6)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)
