"""Filters: which tokens a row may draw. What is not kept becomes minus infinity."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.arrays import SamplingArrays


def filter_top(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """min_p, top_k and top_p; top_p is of the mass that the other two keep."""
    wanted = jnp.any((sampling.min_p > 0) | (sampling.top_k > 0) | (sampling.top_p < 1))
    return lax.cond(wanted, lambda: _filter_top(logits, sampling), lambda: logits)


def _filter_top(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    vocab = logits.shape[1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    # log(0) is minus infinity: min_p = 0 excludes nothing.
    logits = jnp.where(logits >= top + jnp.log(sampling.min_p)[:, None], logits, -jnp.inf)
    weights, ordered = jnp.exp(logits - top), _ordered(logits)
    # First the k likeliest, counted (exactly, as long as a vocabulary has less than 2**24), then of these the mass p:
    # two thresholds from one loop, as each would be compiled.
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab).astype(jnp.float32)
    p = jnp.asarray(sampling.top_p)

    def find(i: jax.Array, low: jax.Array) -> jax.Array:
        def measure(threshold: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(ordered >= threshold[:, None], jnp.where(i == 0, 1, weights), 0), axis=-1)

        least = jnp.where(i == 0, k, p * measure(low))
        everything = jnp.where(i == 0, k >= vocab, p >= 1)
        return _bisect(low, ordered, everything, lambda threshold: measure(threshold) >= least)

    threshold = lax.fori_loop(0, 2, find, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(ordered >= threshold[:, None], logits, -jnp.inf)


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
    weights = jnp.exp(values)

    def enough(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(nearness >= threshold[:, None], weights, 0), axis=-1) >= typical

    threshold = _bisect(jnp.zeros(logits.shape[0], jnp.uint32), nearness, typical >= 1, enough)
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


def _bisect(
    low: jax.Array, ordered: jax.Array, everything: jax.Array, enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The highest threshold from `low` on, u32[R], at which the logits of at least that are enough.

    A bisection over the 32 bits of a float: exact, without sorting the vocabulary. Rows where `everything` is set
    keep `low`. `enough(threshold u32[R]) -> bool[R]` must hold at `low` and be monotone; ordered: see `_ordered`.
    """

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state  # enough at low; not at high
        middle = low + (high - low) // 2
        fine = enough(middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    high = jnp.where(everything, low, jnp.max(ordered, axis=-1)) + jnp.uint32(1)
    low, _ = lax.while_loop(lambda s: jnp.any(s[1] - s[0] > 1), halve, (low, high))
    return low
