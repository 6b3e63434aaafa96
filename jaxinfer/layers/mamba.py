"""Mamba (Gu and Dao, arXiv:2312.00752): a state space whose decay is a number of each channel's each state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache, RecurrentSpec
from jaxinfer.kernels.cpu import Recurred, Rows, selective_scan
from jaxinfer.layers.convolution import Convolution, causal_convolution
from jaxinfer.layers.linear import Linear, linears
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.recurrence import Inputs, recur


@dataclass(frozen=True)
class MambaConfig:
    """What shapes one.

    inner: its channels.
    state_size: states of each.
    rank: of the time steps' projection.
    width: tokens that the convolution sees.
    activation: after the convolution, a name in ACTIVATIONS.
    conv_bias, bias: the convolution has a bias, and the projections into it and out of it.
    norm_eps: of norms of time steps, B and C; None: there are none.
    norm_weights: those have weights.
    """

    inner: int
    state_size: int
    rank: int
    width: int
    activation: str
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float | None = None
    norm_weights: bool = False

    def heads_of(self, features: int) -> int:
        return self.inner

    def module(self, features: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> Mamba:
        return Mamba(features, self, dtype=dtype, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectiveScan:
    """A Cell, state `[channels, N]`: `h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t,  y_t = h_t C_t`.

    Inputs: x and dt `[T, channels]`, B and C `[T, 1, N]`.

    a: A, `[channels, N]`.
    state: see Cell.
    """

    a: jax.Array
    state: tuple[int, ...] = field(metadata={"static": True})

    def step(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c = inputs
        state = state * jnp.exp(dt[..., None] * self.a) + (dt * x)[..., None] * b
        return jnp.sum(state * c, axis=-1), state

    def chunk(self, state: jax.Array, inputs: Inputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One after the other: nothing of it is a matrix product."""

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            out, state = carry
            made, after = self.step(state[None], tuple(lax.dynamic_slice_in_dim(x, i, 1) for x in inputs))
            return lax.dynamic_update_slice_in_dim(out, made, i, 0), after[0]

        return lax.fori_loop(0, count, step, (jnp.zeros_like(inputs[0]), state))

    def run(self, inputs: Inputs, states: jax.Array, rows: Rows, reference: Callable[[], Recurred]) -> Recurred:
        x, dt, b, c = inputs
        return selective_scan((x, dt, b[:, 0], c[:, 0], self.a), states, rows, reference)


class Mamba(nnx.Module):
    """After a short convolution, time steps, B and C are made of x, and what comes out is gated:

    `out((y + D x) silu(z))`, with `y` of a SelectiveScan where `A = -exp(A_log)`, `dt = softplus(dt(dt_x) + bias)`.
    """

    def __init__(self, features: int, config: MambaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner, eps, scale = config.inner, config.norm_eps, config.norm_weights

        def linear(size: int, to: int, axes: tuple[str | None, str | None], bias: bool) -> Linear:
            return Linear(size, to, axes=axes, bias=bias, dtype=dtype, rngs=rngs)

        def norm(size: int) -> RMSNorm | None:
            return None if eps is None else RMSNorm(size, eps=eps, dtype=dtype, axes=(None,), scale=scale)

        self.in_proj, self.z_proj = (linear(features, inner, ("heads", "embed"), config.bias) for _ in range(2))
        self.conv1d = Convolution(inner, config.width, bias=config.conv_bias, dtype=dtype)
        self.x_proj = linear(inner, config.rank + 2 * config.state_size, (None, "heads"), False)
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = map(norm, (config.rank, *(config.state_size,) * 2))
        self.dt_proj = linear(config.rank, inner, ("heads", None), True)
        self.A_log = nnx.Param(jnp.zeros((inner, config.state_size), "float32"), axes=("heads", None))
        self.D = nnx.Param(jnp.ones(inner, "float32"), axes=("heads",))
        self.out_proj = linear(inner, features, ("embed", "heads"), config.bias)
        self.config, self.state = config, (inner, config.state_size)
        self.cache_spec = RecurrentSpec(((config.width - 1, inner), self.state), ("float32",) * 2, (1, 0))

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]`, and the states after this step."""
        config, dtype = self.config, x.dtype
        past, states = cast(tuple[jax.Array, jax.Array], cache) if cache is not None else (None, None)
        x, z = linears(x, self.in_proj, self.z_proj)
        weight, bias = self.conv1d.weight.get_value()[:, 0], self.conv1d.bias
        x, past = causal_convolution(x, weight, None if bias is None else bias.get_value(), past, batch)
        x = ACTIVATIONS[config.activation](x.astype(dtype))
        parts = jnp.split(self.x_proj(x), [config.rank, config.rank + config.state_size], axis=-1)
        norms = self.dt_layernorm, self.b_layernorm, self.c_layernorm
        dt, b, c = (part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True))
        dt = jax.nn.softplus(self.dt_proj(dt).astype(jnp.float32))
        x, z, b, c = (part.astype(jnp.float32) for part in (x, z, b, c))
        cell = SelectiveScan(-jnp.exp(self.A_log.get_value()), self.state)
        y, states = recur(cell, (x, dt, b[:, None], c[:, None]), states, batch)
        y = (y + self.D.get_value() * x) * jax.nn.silu(z)
        return self.out_proj(y.astype(dtype)), None if past is None or states is None else (past, states)
