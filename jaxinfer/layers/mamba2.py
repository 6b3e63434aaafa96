"""Mamba-2 (Dao and Gu, arXiv:2405.21060): a state space whose decay is one number a head."""

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


@dataclass(frozen=True)
class Mamba2Config:
    """What shapes one.

    heads, head_dim: of x.
    groups, state_size: of B and C, each of which is for several heads.
    width: tokens that the convolution sees.
    activation: after the convolution, a name in ACTIVATIONS.
    conv_bias, in_bias, out_bias: the convolution has a bias, and the projections.
    limits: between which time steps stay.
    normed: what comes out is normed, by groups, and not only gated.
    norm_first: before it is gated.
    in_scale: a factor of what goes in.
    scales: factors of the projections' results: of z, x, B, C and dt.
    """

    heads: int
    head_dim: int
    groups: int
    state_size: int
    width: int
    activation: str
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    limits: tuple[float, float] = (0.0, float("inf"))
    normed: bool = True
    norm_first: bool = False
    in_scale: float = 1.0
    scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def heads_of(self, features: int) -> int:
        return self.heads

    def module(self, features: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> Mamba2:
        return Mamba2(features, self, eps=eps, dtype=dtype, rngs=rngs)


class Mamba2(nnx.Module):
    """With time steps `dt = softplus(dt(x) + dt_bias)` and after a short convolution of x, B and C:

    h_t = exp(-exp(A_log) dt_t) h_(t-1) + B_t (dt_t x_t)^T,    y_t = h_t^T C_t + D x_t,    out(norm(y_t silu(z_t)))
    """

    def __init__(self, features: int, config: Mamba2Config, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        inner, shared = config.heads * config.head_dim, 2 * config.groups * config.state_size

        def into(size: int, axis: str | None = "heads") -> Linear:
            return Linear(features, size, axes=(axis, "embed"), bias=config.in_bias, dtype=dtype, rngs=rngs)

        def of_heads(value: float) -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.full(config.heads, value, "float32"), axes=("heads",))

        self.z_proj, self.x_proj, self.bc_proj, self.dt_proj = (
            into(inner),
            into(inner),
            into(shared, None),
            into(config.heads),
        )
        self.conv1d = Convolution(inner + shared, config.width, bias=config.conv_bias, dtype=dtype)
        self.A_log, self.D, self.dt_bias = of_heads(0.0), of_heads(1.0), of_heads(0.0)
        norm = RMSNorm(inner, eps=eps, dtype=dtype, axes=("heads",), wide=True, groups=config.groups)
        self.norm = norm if config.normed else None
        self.out_proj = Linear(inner, features, axes=("embed", "heads"), bias=config.out_bias, dtype=dtype, rngs=rngs)
        self.config = config
        state = config.heads, config.state_size, config.head_dim
        past = config.width - 1, config.heads, config.head_dim
        self.cache_spec = RecurrentSpec((past, (config.width - 1, shared), state), ("float32",) * 3, (1, None, 0))
        self.cell = LinearAttention(state)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]`, and the states after this step."""
        config, dtype = self.config, x.dtype
        held = cast(tuple[jax.Array, jax.Array, jax.Array], cache) if cache is not None else (None, None, None)
        z, x, bc, dt = linears(_times(x, config.in_scale), self.z_proj, self.x_proj, self.bc_proj, self.dt_proj)
        of_z, of_x, of_b, of_c, of_dt = config.scales
        z, x, dt = _times(z, of_z), _times(x, of_x), _times(dt, of_dt)
        b, c = jnp.split(bc, 2, axis=-1)
        bc = jnp.concatenate([_times(b, of_b), _times(c, of_c)], axis=-1)
        x, bc, pasts = self._convolved(x.reshape(-1, config.heads, config.head_dim), bc, held[:2], batch)
        b, c = jnp.split(bc.reshape(len(x), -1, config.state_size), 2, axis=1)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias.get_value())
        dt = jnp.clip(dt, *config.limits)
        decay = -jnp.exp(self.A_log.get_value()) * dt
        y, states = recur(self.cell, (c, b, x * dt[..., None], decay), held[2], batch)
        y = (y + self.D.get_value()[:, None] * x).reshape(len(x), -1)
        gate = jax.nn.silu(z.astype(jnp.float32))
        if self.norm is None:
            y = y * gate
        else:
            y = self.norm(y) * gate if config.norm_first else self.norm(y * gate)
        return self.out_proj(y.astype(dtype)), None if cache is None else cast(LayerCache, (*pasts, states))

    def _convolved(
        self, x: jax.Array, bc: jax.Array, pasts: tuple[jax.Array | None, ...], batch: ForwardBatch
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array | None, ...]]:
        """x by heads, and B and C, which are whole on every device; float32."""
        activation = ACTIVATIONS[self.config.activation]
        weight, bias = self.conv1d.weight.get_value()[:, 0], self.conv1d.bias
        inner = x.shape[1] * x.shape[2]
        outs, after = [], []
        for part, own, past in ((x, slice(inner), pasts[0]), (bc, slice(inner, None), pasts[1])):
            shape = part.shape[1:]
            own_bias = None if bias is None else bias.get_value()[own].reshape(shape)
            y, past = causal_convolution(part, weight[own].reshape(*shape, -1), own_bias, past, batch)
            outs.append(activation(y.astype(part.dtype)).astype(jnp.float32))
            after.append(past)
        return outs[0], outs[1], tuple(after)


def _times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
