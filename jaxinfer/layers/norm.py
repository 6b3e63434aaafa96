"""Normalization, computed in float32 whatever the activations are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, axes: tuple[str | None, ...] = ("embed",)):
        self.weight = nnx.Param(jnp.ones(features, dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight.get_value()


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias over the last axis (Ba et al., arXiv:1607.06450)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(features, dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(features, dtype), axes=("embed",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = wide * self.weight.get_value().astype(jnp.float32) + self.bias.get_value().astype(jnp.float32)
        return wide.astype(x.dtype)
