"""Logits to tokens: a pure function of logits, parameters and positions.

Order as in vLLM: allowed tokens, biases, stop ids that come too early, penalties, temperature, min_p, top_k, top_p,
draw. What no row asks for is skipped at run time: a greedy batch costs an argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.params import MAX_LOGPROBS
from jaxinfer.sampling.slots import Slots

BLOCK = 2**23  # bytes of logits that sampling works on at a time, on each device


class Logprobs(NamedTuple):
    """Of each row: the sampled token's log-probability f32[R] and rank i32[R] (1 is the likeliest), and the
    likeliest tokens, ids i32[R, k] and values f32[R, k]. Zeros where no row asked."""

    sampled: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top: jax.Array


def draw(
    logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slots: Slots, slot: jax.Array, parts: int = 1
) -> tuple[jax.Array, Logprobs]:
    """`sample`, and `logprobs` of what it gives, a block of rows at a time: together they need several times the memory
    of the logits that they work on, and those of 256 rows and a vocabulary of 128,000 are 125 MiB. parts: over how many
    devices the vocabulary is split."""
    rows, vocab = logits.shape
    block = max(BLOCK * parts // (4 * vocab), 1)

    def some(logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slot: jax.Array) -> Any:
        tokens = sample(logits, sampling, length, slots, slot)
        return tokens, logprobs(logits, tokens, sampling)

    given = logits, sampling, length, slot
    if rows <= block:
        return some(*given)

    def each() -> Any:
        nothing = jnp.zeros(rows, jnp.int32), no_logprobs(rows, vocab)
        return in_blocks(some, given, nothing, block, jnp.int32(-(-rows // block)))

    asked = (sampling.temperature > 0) | sampling.masked | sampling.penalized | sampling.wants_logprobs
    asked |= _early(sampling, length)
    return lax.cond(
        jnp.any(asked), each, lambda: (jnp.argmax(logits, axis=-1).astype(jnp.int32), no_logprobs(rows, vocab))
    )


def in_blocks(call: Callable[..., Any], given: Any, out: Any, block: int, blocks: jax.Array) -> Any:
    """`out`, with what `call` makes of the first `blocks` blocks of rows of what is given: `block` rows at a time."""
    size = jax.tree.leaves(out)[0].shape[0]

    def one(i: jax.Array, out: Any) -> Any:
        start = jnp.minimum(i * block, size - block)  # the last one may overlap the one before
        found = call(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), given))
        return jax.tree.map(lambda all_, some: lax.dynamic_update_slice_in_dim(all_, some, start, 0), out, found)

    return lax.fori_loop(jnp.int32(0), blocks, one, out)


def sample(logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slots: Slots, slot: jax.Array) -> jax.Array:
    """The next token of each row, i32[R].

    logits f32[R, V]; slot i32[R], each row's own; length i32[R] is the number of tokens before the sampled one: with
    the row's seed it decides the draw, so that the same request gives the same text in any company.
    """
    logits = _mask(logits, sampling, slots, slot)
    logits = _mask_stop_ids(logits, sampling, length)
    logits = _penalize(logits, sampling, slots, slot)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        temperature = jnp.where(sampling.temperature > 0, sampling.temperature, jnp.float32(1))
        kept = _filter(logits / temperature[:, None], sampling)
        # Gumbel-max: argmax of logits plus Gumbel noise is a draw from their softmax.
        keys = jax.vmap(jax.random.fold_in)(
            jax.random.wrap_key_data(jnp.asarray(sampling.seed), impl="threefry2x32"), length
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def no_logprobs(rows: int, vocab: int) -> Logprobs:
    """Zeros, where nobody asks."""
    zeros, likeliest = jnp.zeros(rows, jnp.float32), jnp.zeros((rows, min(MAX_LOGPROBS, vocab)), jnp.float32)
    return Logprobs(zeros, zeros.astype(jnp.int32), likeliest.astype(jnp.int32), likeliest)


def token_logprobs(logits: jax.Array, tokens: jax.Array, likeliest: jax.Array | bool = True) -> Logprobs:
    """Log-probabilities of the model itself: no masks, temperature or filters. The likeliest tokens are looked for
    only if they are wanted, bool[]."""
    values = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(values, tokens[:, None], axis=-1)
    none = no_logprobs(*logits.shape)

    def find() -> tuple[jax.Array, jax.Array]:
        top, ids = lax.top_k(values, none.top.shape[1])
        return ids.astype(jnp.int32), top

    ids, top = lax.cond(likeliest, find, lambda: (none.top_ids, none.top))
    rank = jnp.sum(values > chosen, axis=-1, dtype=jnp.int32) + 1
    return Logprobs(chosen[:, 0], rank, ids, top)


def logprobs(logits: jax.Array, tokens: jax.Array, sampling: SamplingArrays) -> Logprobs:
    """`token_logprobs`, computed only if a row wants them for what it samples."""
    wanted = jnp.any(sampling.wants_logprobs)
    return lax.cond(wanted, lambda: token_logprobs(logits, tokens), lambda: no_logprobs(*logits.shape))


def stops(tokens: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether each row's token ends it, bool[R]; length as for `sample`."""
    # A stop id that comes too early (masked, but so was everything else) does not count on the host either.
    return jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1) & ~_early(sampling, length)


def _early(sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether a row has not yet `min_tokens` tokens, bool[R]."""
    return length - sampling.prompt_length < sampling.min_tokens


def _mask(logits: jax.Array, sampling: SamplingArrays, slots: Slots, slot: jax.Array) -> jax.Array:
    """Minus infinity for tokens that are not allowed; biases added."""

    def mask() -> jax.Array:
        rows, vocab = logits.shape
        masked = jnp.asarray(sampling.masked)
        words = slots.allowed[slot]
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
        allowed = bits.reshape(rows, -1)[:, :vocab] != 0
        ids = jnp.where(masked[:, None], slots.bias_ids[slot], vocab)
        index = jnp.arange(rows, dtype=jnp.int32)[:, None]
        biased = logits.at[index, ids].add(slots.bias[slot], mode="drop")
        return jnp.where(allowed | ~masked[:, None], biased, -jnp.inf)

    return lax.cond(jnp.any(sampling.masked), mask, lambda: logits)


def _penalize(logits: jax.Array, sampling: SamplingArrays, slots: Slots, slot: jax.Array) -> jax.Array:
    """Presence, frequency and repetition penalties."""

    def penalize() -> jax.Array:
        presence, frequency, repetition = (jnp.asarray(sampling.penalties)[:, i, None] for i in range(3))
        count = slots.in_output[slot].astype(jnp.float32)
        seen = (count > 0) | slots.in_prompt[slot]
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        penalized = jnp.where(seen, scaled, logits) - frequency * count - presence * (count > 0).astype(jnp.float32)
        return jnp.where(jnp.asarray(sampling.penalized)[:, None], penalized, logits)

    return lax.cond(jnp.any(sampling.penalized), penalize, lambda: logits)


def _mask_stop_ids(logits: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """No stop id before `min_tokens` tokens."""
    early = _early(sampling, length)

    def mask() -> jax.Array:
        vocab = logits.shape[1]
        ids = jnp.where(early[:, None] & (sampling.stop_ids >= 0), sampling.stop_ids, vocab)
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        return logits.at[rows, ids].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(early), mask, lambda: logits)


def _filter(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """Minus infinity for what min_p, top_k and top_p exclude."""
    wanted = jnp.any((sampling.min_p > 0) | (sampling.top_k > 0) | (sampling.top_p < 1))
    return lax.cond(wanted, lambda: _filtered(logits, sampling), lambda: logits)


def _filtered(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    top = jnp.max(logits, axis=-1, keepdims=True)
    # log(0) is minus infinity: min_p = 0 excludes nothing.
    logits = jnp.where(logits >= top + jnp.log(sampling.min_p)[:, None], logits, -jnp.inf)

    vocab = logits.shape[1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    threshold = _threshold(logits, k >= vocab, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= k)
    logits = jnp.where(_ordered(logits) >= threshold[:, None], logits, -jnp.inf)

    weights = jnp.exp(logits - top)
    mass = sampling.top_p * jnp.sum(weights, axis=-1)
    threshold = _threshold(
        logits, jnp.asarray(sampling.top_p >= 1), lambda kept: jnp.sum(jnp.where(kept, weights, 0), axis=-1) >= mass
    )
    return jnp.where(_ordered(logits) >= threshold[:, None], logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 as uint32 in the same order (minus infinity lowest, -0 and 0 equal, no NaN)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits, bits | jnp.uint32(0x80000000))


def _threshold(logits: jax.Array, everything: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The highest uint32 t, in the order of `_ordered`, such that the logits of at least t are enough, u32[R].

    A bisection over the 32 bits of a float: exact, without sorting the vocabulary. Rows where `everything` is set
    get 0. `enough(kept bool[R, V]) -> bool[R]` must hold for the lowest t and be monotone.
    """
    ordered = _ordered(logits)

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state  # enough at low; not at high
        middle = low + (high - low) // 2
        fine = enough(ordered >= middle[:, None])
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    low = jnp.zeros(logits.shape[0], jnp.uint32)
    high = jnp.where(everything, jnp.uint32(1), jnp.max(ordered, axis=-1) + jnp.uint32(1))
    low, _ = lax.while_loop(lambda s: jnp.any(s[1] - s[0] > 1), halve, (low, high))
    return low
