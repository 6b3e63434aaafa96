"""Normalization, computed in float32 whatever the activations are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    wide: weights are multiplied before the result is rounded to the activations' dtype, not after.
    offset: is added to the weights, which are multiplied wide then: Gemma's checkpoints have what is more than 1.
    scale: whether it has weights.
    groups: into how many parts the axis is cut, each of which is normed by itself.
    """

    def __init__(
        self,
        features: int | tuple[int, ...],
        *,
        eps: float,
        dtype: DTypeLike,
        axes: tuple[str | None, ...] = ("embed",),
        wide: bool = False,
        offset: float = 0.0,
        scale: bool = True,
        groups: int = 1,
    ):
        self.weight = nnx.Param(jnp.ones(features, dtype), axes=axes) if scale else None
        self.eps, self.wide, self.offset, self.groups = eps, wide or offset != 0, offset, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        values = x.astype(jnp.float32)
        values = values if self.groups == 1 else values.reshape(*x.shape[:-1], self.groups, -1)
        values = values * lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + self.eps)
        values = values.reshape(x.shape)
        if self.weight is None:
            return values.astype(x.dtype)
        weight = self.weight.get_value()
        if self.wide:
            return (values * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return values.astype(x.dtype) * weight


class HeadsRMSNorm(RMSNorm):
    """Over all heads of `[T, heads, d]` together, with a weight for each of their features."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(x.shape[0], -1)).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis (Ba et al., arXiv:1607.06450). scale, bias: whether it has weights, and biases."""

    def __init__(
        self,
        features: int | tuple[int, ...],
        *,
        eps: float,
        dtype: DTypeLike,
        axes: tuple[str | None, ...] = ("embed",),
        scale: bool = True,
        bias: bool = True,
    ):
        self.weight = nnx.Param(jnp.ones(features, dtype), axes=axes) if scale else None
        self.bias = nnx.Param(jnp.zeros(features, dtype), axes=axes) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        values = x.astype(jnp.float32)
        values = values - jnp.mean(values, axis=-1, keepdims=True)
        values = values * lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            values = values * self.weight.get_value().astype(jnp.float32)
        if self.bias is not None:
            values = values + self.bias.get_value().astype(jnp.float32)
        return values.astype(x.dtype)
