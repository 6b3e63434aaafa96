"""Attention without a softmax, whose state is a matrix a head that decays: a recurrence, and the same in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.cpu import Recurred, Rows, linear_attention
from jaxinfer.layers.recurrence import Inputs

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearAttention:
    """A Cell of H heads of values, each K-th part of which shares a head of keys and queries, state `[H, d_k, d_v]`:

        S_t = a_t S_(t-1) + k_t u_t^T,    o_t = S_t^T q_t

    where u_t is v_t (Mamba-2: Dao and Gu, arXiv:2405.21060), or, by the delta rule, what v_t is more than the decayed
    state gives for k_t, times beta_t (Yang et al., arXiv:2412.06464).

    Inputs: q and k `[T, K, d_k]`, v `[T, H, d_v]`, log a `[T, H]`, and, for the delta rule, beta `[T, H]`.

    state: see Cell.
    """

    state: tuple[int, ...] = field(metadata={"static": True})

    def step(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, *beta = (x.astype(jnp.float32) for x in inputs)
        heads = v.shape[1]
        q, k = (jnp.repeat(x, heads // x.shape[1], axis=1)[..., None] for x in (q, k))
        state = state * jnp.exp(decay)[..., None, None]
        for factor in beta:
            v = (v - jnp.sum(state * k, axis=-2)) * factor[..., None]
        state = state + k * v[..., None, :]
        return jnp.sum(state * q, axis=-2), state

    def chunk(self, state: jax.Array, inputs: Inputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In matrix products: with g_i = a_1 ... a_i, and the state S before the chunk,

        u_i = beta_i (v_i - g_i S^T k_i - sum_(j<i) (g_i / g_j) (k_i . k_j) u_j)     (by the delta rule)
        o_i = g_i S^T q_i + sum_(j<=i) (g_i / g_j) (q_i . k_j) u_j
        """
        index = jnp.arange(inputs[0].shape[0], dtype=jnp.int32)
        own = index < count
        q, k, v, decay, *beta = (
            jnp.where(own.reshape(-1, *(1,) * (x.ndim - 1)), x.astype(jnp.float32), 0) for x in inputs
        )
        # Heads come first from here on, those of one head of keys together: [K, H / K, tokens, ...].
        size, keys = len(index), k.shape[1]
        before = state.reshape(keys, -1, *state.shape[1:])
        v = v.reshape(size, keys, -1, v.shape[-1]).transpose(1, 2, 0, 3)
        total = jnp.cumsum(decay, axis=0).T.reshape(keys, -1, size)
        so_far = jnp.exp(total)[..., None]
        causal = index[:, None] >= index
        between = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
        for factor in beta:
            factor = factor.T.reshape(keys, -1, size, 1)
            overlap = _einsum("ikd,jkd->kij", k, k)[:, None] * between * factor
            error = (v - so_far * _einsum("ikd,khdv->khiv", k, before)) * factor
            v = lax.linalg.triangular_solve(overlap, error, left_side=True, lower=True, unit_diagonal=True)
        scores = _einsum("ikd,jkd->kij", q, k)[:, None] * between
        out = so_far * _einsum("ikd,khdv->khiv", q, before) + _einsum("khij,khjv->khiv", scores, v)
        left = jnp.exp(total[..., -1:] - total)[..., None]
        after = before * so_far[..., -1:, :] + _einsum("ikd,khiv->khdv", k, v * left)
        return out.transpose(2, 0, 1, 3).reshape(size, -1, v.shape[-1]), after.reshape(state.shape)

    def run(self, inputs: Inputs, states: jax.Array, rows: Rows, reference: Callable[[], Recurred]) -> Recurred:
        """The kernel takes steps, in prompts, too: a state's columns stay in a core's cache meanwhile."""
        return linear_attention(inputs, states, rows, reference)
