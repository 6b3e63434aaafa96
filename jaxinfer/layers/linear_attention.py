"""Attention without a softmax, whose state is a matrix a head that decays: a recurrence, and the same in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.layers.recurrence import Inputs

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class LinearAttention:
    """A Cell of K heads of keys and queries, each for G heads of values, state `[K, G, d_k, d_v]`:

        S_t = a_t S_(t-1) + k_t u_t^T,    o_t = S_t^T q_t

    where u_t is v_t (Mamba-2: Dao and Gu, arXiv:2405.21060), or, by the delta rule, what v_t is more than the decayed
    state gives for k_t, times beta_t (Yang et al., arXiv:2412.06464).

    Inputs: q and k `[T, K, d_k]`, v `[T, K, G, d_v]`, log a `[T, K, G]`, and of the delta rule beta `[T, K, G]`.

    state: see Cell. delta: by the delta rule.
    """

    state: tuple[int, ...]
    delta: bool

    def step(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, *beta = (x.astype(jnp.float32) for x in inputs)
        state = state * jnp.exp(decay)[..., None, None]
        q, k = q[:, :, None, :, None], k[:, :, None, :, None]
        for factor in beta:
            v = (v - jnp.sum(state * k, axis=-2)) * factor[..., None]
        state = state + k * v[..., None, :]
        return jnp.sum(state * q, axis=-2), state

    def chunk(self, state: jax.Array, inputs: Inputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In matrix products: with g_i = a_1 ... a_i, and the state S before the chunk,

        u_i = beta_i (v_i - g_i S^T k_i - sum_(j<i) (g_i / g_j) (k_i . k_j) u_j)     (by the delta rule)
        o_i = g_i S^T q_i + sum_(j<=i) (g_i / g_j) (q_i . k_j) u_j
        """
        size = inputs[0].shape[0]
        index = jnp.arange(size, dtype=jnp.int32)
        own = index < count
        q, k, v, decay, *beta = (
            jnp.where(own.reshape(-1, *(1,) * (x.ndim - 1)), x.astype(jnp.float32), 0) for x in inputs
        )
        # From here on heads come first: [K, G, tokens, ...].
        total = jnp.moveaxis(jnp.cumsum(decay, axis=0), 0, -1)
        v = jnp.moveaxis(v, 0, 2)
        so_far = jnp.exp(total)[..., None]
        causal = index[:, None] >= index
        between = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
        for factor in beta:
            factor = jnp.moveaxis(factor, 0, -1)[..., None]
            overlap = _einsum("ikd,jkd->kij", k, k)[:, None] * between * factor
            error = (v - so_far * _einsum("ikd,kgdv->kgiv", k, state)) * factor
            v = lax.linalg.triangular_solve(overlap, error, left_side=True, lower=True, unit_diagonal=True)
        scores = _einsum("ikd,jkd->kij", q, k)[:, None] * between
        out = so_far * _einsum("ikd,kgdv->kgiv", q, state) + _einsum("kgij,kgjv->kgiv", scores, v)
        left = jnp.exp(total[..., -1:] - total)[..., None]
        state = state * so_far[..., -1:, :] + _einsum("ikd,kgiv->kgdv", k, v * left)
        return jnp.moveaxis(out, 2, 0), state
