"""Filters: which tokens a row may draw. What is not kept becomes minus infinity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.arrays import SamplingArrays


def filter_top(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """min_p, top_k and top_p; top_p is of the mass that the other two keep."""
    wanted = jnp.any((sampling.min_p > 0) | (sampling.top_k > 0) | (sampling.top_p < 1))
    return lax.cond(wanted, lambda: _filter_top(logits, sampling), lambda: logits)


def _filter_top(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    top = jnp.max(logits, axis=-1, keepdims=True)
    # log(0) is minus infinity: min_p = 0 excludes nothing.
    logits = jnp.where(logits >= top + jnp.log(sampling.min_p)[:, None], logits, -jnp.inf)
    # The k likeliest are counted in floats, which is exact as long as a vocabulary has less than 2**24.
    k = jnp.asarray(sampling.top_k)
    k = jnp.where((k > 0) & (k < logits.shape[1]), k.astype(jnp.float32), jnp.inf)
    logits = _likeliest(logits, jnp.ones_like(logits), k)
    weights, p = jnp.exp(logits - top), jnp.asarray(sampling.top_p)
    return _likeliest(logits, weights, jnp.where(p < 1, p * jnp.sum(weights, axis=-1), jnp.inf))


def cut_off(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """transformers' typical_p (Meister et al. 2022), epsilon_cutoff and eta_cutoff (Hewitt et al. 2022)."""
    typical, epsilon, eta = (jnp.asarray(sampling.cutoffs)[:, i] for i in range(3))
    wanted = jnp.any((typical < 1) | (epsilon > 0) | (eta > 0))
    return lax.cond(wanted, lambda: _cut_off(logits, typical, epsilon, eta), lambda: logits)


def _cut_off(logits: jax.Array, typical: jax.Array, epsilon: jax.Array, eta: jax.Array) -> jax.Array:
    def values_and_entropy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jax.nn.log_softmax(logits, axis=-1)
        return values, -jnp.sum(jnp.where(jnp.isneginf(values), 0, jnp.exp(values) * values), axis=-1)

    # The tokens whose surprise is nearest to the expected one, as many as have a share of `typical`.
    values, entropy = values_and_entropy(logits)
    nearness = _ordered(-jnp.abs(values + entropy[:, None]))
    threshold = _threshold(nearness, jnp.exp(values), jnp.where(typical < 1, typical, jnp.inf))
    logits = jnp.where(nearness >= threshold[:, None], logits, -jnp.inf)

    def above(logits: jax.Array, least: jax.Array, values: jax.Array) -> jax.Array:
        kept = (jnp.exp(values) >= least[:, None]) | (logits == jnp.max(logits, axis=-1, keepdims=True))
        return jnp.where(kept, logits, -jnp.inf)

    logits = above(logits, epsilon, jax.nn.log_softmax(logits, axis=-1))
    values, entropy = values_and_entropy(logits)
    return above(logits, jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-entropy)), values)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order (minus infinity lowest, -0 and 0 equal, no NaN)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits, bits | jnp.uint32(0x80000000))


def _likeliest(logits: jax.Array, values: jax.Array, least: jax.Array) -> jax.Array:
    """The logits of the fewest likeliest tokens whose values f32[R, V] come to `least`, f32[R], and of their ties."""
    ordered = _ordered(logits)
    return jnp.where(ordered >= _threshold(ordered, values, least)[:, None], logits, -jnp.inf)


def _threshold(ordered: jax.Array, values: jax.Array, least: jax.Array) -> jax.Array:
    """The highest t, u32[R], such that the values of what is t or more in `ordered` come to `least`; 0 where that is
    infinite. Found bit by bit: exact, without sorting the vocabulary."""

    def next_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | jnp.uint32(0x80000000) >> i.astype(jnp.uint32)
        total = jnp.sum(jnp.where(ordered >= higher[:, None], values, 0), axis=-1)
        return jnp.where(total >= least, higher, threshold)

    bits = jnp.where(jnp.any(least < jnp.inf), jnp.int32(32), jnp.int32(0))
    return lax.fori_loop(jnp.int32(0), bits, next_bit, jnp.zeros(ordered.shape[0], jnp.uint32))
