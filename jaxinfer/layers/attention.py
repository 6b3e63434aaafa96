"""The self-attention block of decoders with rotary positions."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch, attend
from jaxinfer.cache import LayerCache, attention_spec
from jaxinfer.layers.linear import Linear, linears
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rotary import rotate


class SelfAttention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245): H query heads share K key/value heads."""

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None,
        spec: AttentionSpec,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inside, kv = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(features, inside, axes=("heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(features, kv, axes=("kv_heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(features, kv, axes=("kv_heads", "embed"), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(inside, features, axes=("embed", "heads"), bias=out_bias, dtype=dtype, rngs=rngs)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype, axes=(None,))
            self.k_norm = RMSNorm(head_dim, eps=qk_norm_eps, dtype=dtype, axes=(None,))
        self.qk_norm = qk_norm_eps is not None
        self.head_dim = head_dim
        self.spec = spec
        self.cache_spec = attention_spec(num_kv_heads, head_dim, spec.window, num_heads // num_kv_heads)

    def __call__(
        self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]` and the layer's cache with this step's keys and values."""
        tokens = x.shape[0]
        projected = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (out.reshape(tokens, -1, self.head_dim) for out in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(rotate(q, cos_sin), rotate(k, cos_sin), v, cache, batch, self.spec)
        return self.o_proj(out.reshape(tokens, -1)), cache
