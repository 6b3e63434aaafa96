"""The self-attention block of decoders with rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch, attend
from jaxinfer.attention.relative import Relative
from jaxinfer.cache import LayerCache, attention_spec
from jaxinfer.layers.linear import Linear, linears
from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.temperature import Temperature

Norm = Callable[[jax.Array], jax.Array]
# Of each embedding cos and sin, of each temperature the factors.
Angles = Mapping[Rope | Temperature, Any]


class SelfAttention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245): H query heads share K key/value heads.

    qk_norm: makes the norm of queries, or of keys, from how many heads there are; None: they have none. It is called
        with `[T, heads, head_dim]`.
    clip: queries, keys and values are cut off there, after the norms; None: nowhere.
    rope: how positions turn them, after that; None: not at all.
    norm_after_rope: the norms come after that instead.
    sinks: each head attends to one more score, a parameter, which has no value.
    temperature: how queries grow with their position, at last; None: not at all.
    gated: what a head makes is multiplied with the sigmoid of as many features more that the query projection has of
        each head.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        out_bias: bool,
        spec: AttentionSpec,
        rope: Rope | None,
        qk_norm: Callable[[int], Norm] | None = None,
        clip: float | None = None,
        norm_after_rope: bool = False,
        sinks: bool = False,
        temperature: Temperature | None = None,
        gated: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inside, kv = num_heads * head_dim, num_kv_heads * head_dim
        queries = inside * (1 + gated)
        self.q_proj = Linear(features, queries, axes=("heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(features, kv, axes=("kv_heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(features, kv, axes=("kv_heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(inside, features, axes=("embed", "heads"), bias=out_bias, dtype=dtype, rngs=rngs)
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(num_heads), qk_norm(num_kv_heads)
        self.qk_norm, self.norm_after_rope = qk_norm is not None, norm_after_rope
        self.head_dim, self.clip, self.gated = head_dim, clip, gated
        self.spec, self.rope, self.temperature = spec, rope, temperature
        self.sinks = nnx.Param(jnp.zeros(num_heads, "float32"), axes=("heads",)) if sinks else None
        kept = spec.window, num_heads // num_kv_heads, spec.chunk, sinks
        self.cache_spec = attention_spec(num_kv_heads, head_dim, *kept)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        cache: LayerCache | None,
        batch: ForwardBatch,
        relative: Relative | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]` and the layer's cache with this step's keys and values. angles: of each embedding and
        each temperature that a layer has. relative: see `attend`."""
        tokens = x.shape[0]
        q, k, v = linears(x, self.q_proj, self.k_proj, self.v_proj)
        if self.gated:
            q, gate = jnp.split(q.reshape(tokens, -1, 2 * self.head_dim), 2, axis=-1)
        q, k, v = (out.reshape(tokens, -1, self.head_dim) for out in (q, k, v))
        if self.qk_norm and not self.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (jnp.clip(heads, -self.clip, self.clip) for heads in (q, k, v))
        if self.rope is not None:
            q, k = (self.rope.rotate(heads, angles[self.rope]) for heads in (q, k))
        if self.qk_norm and self.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.temperature is not None:
            q = (q.astype(jnp.float32) * angles[self.temperature][:, None, None]).astype(q.dtype)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out, cache = attend(q, k, v, cache, batch, self.spec, sinks, relative)
        if self.gated:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(tokens, -1)), cache
