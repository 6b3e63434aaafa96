"""The gated delta net (Yang et al., arXiv:2412.06464), as Qwen3-Next has it in place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache, RecurrentSpec
from jaxinfer.layers.convolution import Convolution, causal_convolution
from jaxinfer.layers.linear import Linear, linears
from jaxinfer.layers.linear_attention import LinearAttention
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.recurrence import recur

NORM_EPS = 1e-6  # of queries' and keys' lengths


@dataclass(frozen=True)
class DeltaNetConfig:
    """What shapes one.

    key_heads, key_dim: heads of queries and keys, and their size.
    value_heads, value_dim: the same of values; each head of keys is for several of them.
    width: tokens that the convolution sees.
    activation: after the convolution, a name in ACTIVATIONS.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    width: int
    activation: str

    def heads_of(self, features: int) -> int:
        return self.key_heads

    def module(self, features: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> GatedDeltaNet:
        return GatedDeltaNet(features, self, eps=eps, dtype=dtype, rngs=rngs)


class GatedDeltaNet(nnx.Module):
    """Queries, keys and values go through a short convolution; queries and keys have length one; what a head reads is
    normed, and times a gate. Decays are `exp(-exp(A_log) softplus(a + dt_bias))`, the delta rule's factors
    `sigmoid(b)`."""

    def __init__(self, features: int, config: DeltaNetConfig, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim

        def heads(size: int) -> Linear:
            return Linear(features, size, axes=("heads", "embed"), dtype=dtype, rngs=rngs)

        self.q_proj, self.k_proj, self.v_proj, self.z_proj = heads(keys), heads(keys), heads(values), heads(values)
        self.b_proj, self.a_proj = heads(config.value_heads), heads(config.value_heads)
        self.conv1d = Convolution(2 * keys + values, config.width, bias=False, dtype=dtype)
        self.A_log = nnx.Param(jnp.zeros(config.value_heads, "float32"), axes=("heads",))
        self.dt_bias = nnx.Param(jnp.ones(config.value_heads, "float32"), axes=("heads",))
        self.norm = RMSNorm(config.value_dim, eps=eps, dtype=dtype, axes=(None,))
        self.out_proj = Linear(values, features, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.config = config
        state = config.value_heads, config.key_dim, config.value_dim
        past = config.width - 1, config.key_heads, 2 * config.key_dim + values // config.key_heads
        self.cache_spec = RecurrentSpec((past, state), ("float32", "float32"), (1, 0))
        self.cell = LinearAttention(state)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]`, and the states after this step."""
        config, tokens, heads = self.config, x.shape[0], self.config.key_heads
        q, k, v, z, b, a = linears(x, self.q_proj, self.k_proj, self.v_proj, self.z_proj, self.b_proj, self.a_proj)
        past, states = cast(tuple[jax.Array, jax.Array], cache) if cache is not None else (None, None)
        mixed = jnp.concatenate([part.reshape(tokens, heads, -1) for part in (q, k, v)], axis=-1)
        mixed, past = causal_convolution(mixed, self._by_head(), None, past, batch)
        mixed = ACTIVATIONS[config.activation](mixed.astype(x.dtype)).astype(jnp.float32)
        q, k, v = jnp.split(mixed, [config.key_dim, 2 * config.key_dim], axis=-1)
        q, k = (part * jax.lax.rsqrt(jnp.sum(part * part, axis=-1, keepdims=True) + NORM_EPS) for part in (q, k))
        decay = -jnp.exp(self.A_log.get_value()) * jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias.get_value())
        v = v.reshape(tokens, -1, config.value_dim)
        inputs = q * config.key_dim**-0.5, k, v, decay, jax.nn.sigmoid(b)
        out, states = recur(self.cell, inputs, states, batch)
        out = self.norm(out.astype(x.dtype))
        gate = jax.nn.silu(z.reshape(out.shape).astype(jnp.float32))
        out = (out.astype(jnp.float32) * gate).astype(x.dtype)
        return self.out_proj(out.reshape(tokens, -1)), None if past is None or states is None else (past, states)

    def _by_head(self) -> jax.Array:
        """The convolution's weight, `[K, channels of a head of keys, width]`: a mesh splits it as it does heads."""
        config, weight = self.config, self.conv1d.weight.get_value()
        keys = config.key_heads * config.key_dim
        parts = jnp.split(weight[:, 0], [keys, 2 * keys])
        return jnp.concatenate([part.reshape(config.key_heads, -1, config.width) for part in parts], axis=1)
