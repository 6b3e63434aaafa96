"""What changes logits before one is chosen: masks, biases, penalties, stop ids that come too early, forced tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.params import MAX_BIAS
from jaxinfer.sampling.slots import DecodeState, copies


def process(
    logits: jax.Array,
    sampling: SamplingArrays,
    length: jax.Array,
    slots: DecodeState,
    slot: jax.Array,
    parts: int = 1,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """All of them, one after the other, if a row asks for one: nearly all is element by element, so that it becomes one
    pass, and one thing to compile. Arguments as for `Sampler`."""
    asked = jnp.asarray(sampling.masked) | jnp.asarray(sampling.penalized) | is_early(sampling, length)
    asked |= _decays(sampling, length) | jnp.any(_forced(sampling, length), axis=-1) | (jnp.asarray(sampling.table) > 0)

    def processed() -> jax.Array:
        result = _mask(logits, sampling, length, slots, slot, parts, allowed)
        stop_ids = jnp.asarray(sampling.stop_ids)  # -1 for none, which no token is
        tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)
        stop = functools.reduce(jnp.logical_or, (tokens == stop_ids[:, i, None] for i in range(stop_ids.shape[1])))
        result = jnp.where(stop & is_early(sampling, length)[:, None], -jnp.inf, result)
        result = _penalize(result, sampling, slots, slot)
        result = jnp.where(stop & _decays(sampling, length)[:, None], _grown(result, sampling, length), result)
        return _force(result, tokens, sampling, length)

    return processed() if allowed is not None else lax.cond(jnp.any(asked), processed, lambda: logits)


def is_early(sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether a row has not yet `min_tokens` tokens, bool[R]."""
    return length - sampling.prompt_length < sampling.min_tokens


def _decays(sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether a row's stop ids have begun to gain, bool[R]."""
    start, factor = jnp.asarray(sampling.decay)[:, 0], jnp.asarray(sampling.decay)[:, 1]
    return (length.astype(jnp.float32) > start) & (factor != 1)


def _forced(sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Which of a row's forced tokens, if any, comes now, bool[R, 2]."""
    return length[:, None] == jnp.asarray(sampling.forced)[:, :, 0]


def _mask(
    logits: jax.Array,
    sampling: SamplingArrays,
    length: jax.Array,
    slots: DecodeState,
    slot: jax.Array,
    parts: int,
    now: jax.Array | None,
) -> jax.Array:
    """Minus infinity for tokens that are not allowed; biases added. now: `allowed` of `process`."""
    rows, vocab = logits.shape
    masked, tabled = jnp.asarray(sampling.masked)[:, None], (jnp.asarray(sampling.table) > 0)[:, None]
    every = jnp.uint32(0xFFFFFFFF)
    own = jnp.where(masked, slots.allowed[slot, (length != sampling.begin).astype(jnp.int32)], every)
    words = own & jnp.where(tabled, slots.tables.allowed(slots.place[slot]), every)
    allowed = _bits(words if now is None else words & now, vocab, parts)
    ids = jnp.where(masked, slots.bias_ids[slot], vocab)
    index = jnp.arange(rows, dtype=jnp.int32)[:, None]
    biased = logits.at[index, ids].add(slots.bias[slot], mode="drop")
    return jnp.where(allowed, biased, -jnp.inf)


def _bits(words: jax.Array, vocab: int, parts: int) -> jax.Array:
    """u32[R, V/32] as bool[R, V]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    allowed = bits.reshape(words.shape[0], -1)[:, :vocab] != 0
    if parts > 1:
        # Or XLA would, where a device's part begins within a word, have devices exchange bits, those of all shards
        # of rows in one step: it would wait for ever for a shard of which no row has masks.
        allowed = lax.with_sharding_constraint(allowed, PartitionSpec())
    return allowed


def _penalize(logits: jax.Array, sampling: SamplingArrays, slots: DecodeState, slot: jax.Array) -> jax.Array:
    """Presence, frequency and repetition penalties."""
    presence, frequency, repetition = (jnp.asarray(sampling.penalties)[:, i, None] for i in range(3))
    count = copies(slots.in_output, slot)
    seen = (count > 0) | slots.in_prompt[slot]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    penalized = jnp.where(seen, scaled, logits) - frequency * count - presence * (count > 0).astype(jnp.float32)
    return jnp.where(jnp.asarray(sampling.penalized)[:, None], penalized, logits)


def _grown(logits: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """What stop ids have when a text gets long: transformers' ExponentialDecayLengthPenalty."""
    start, factor = jnp.asarray(sampling.decay)[:, 0], jnp.asarray(sampling.decay)[:, 1]
    growth = jnp.minimum(factor ** (length.astype(jnp.float32) - start), MAX_BIAS) - 1
    gain = jnp.minimum(jnp.abs(logits) * growth[:, None], MAX_BIAS)
    return jnp.where(jnp.isneginf(logits), logits, logits + gain)


def _force(logits: jax.Array, tokens: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Minus infinity for all but the token that must come now."""
    now, ids = _forced(sampling, length), jnp.asarray(sampling.forced)[:, :, 1]
    only = tokens == jnp.where(now[:, 1], ids[:, 1], ids[:, 0])[:, None]
    return jnp.where(jnp.any(now, axis=-1)[:, None], jnp.where(only, jnp.float32(0), -jnp.inf), logits)
