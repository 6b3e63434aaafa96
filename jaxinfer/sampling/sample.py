"""Logits to tokens: a pure function of logits, parameters and positions.

Order as in vLLM: allowed tokens, biases, stop ids that come too early, penalties, temperature, min_p, top_k, top_p,
draw; what only transformers has comes after these, in its order. What no row asks for is skipped at run time: a greedy
batch costs an argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.params import MAX_BIAS, MAX_LOGPROBS
from jaxinfer.sampling.slots import DecodeState, copies

BLOCK = 2**23  # bytes of logits that sampling works on at a time, on each device
NOT_FINITE, NONE_LEFT = -1, -2  # in place of a token: the likeliest logit is NaN or infinite; all are minus infinity


class Logprobs(NamedTuple):
    """Of each row; zeros where no row asked.

    sampled: f32[R], the sampled token's log-probability.
    rank: i32[R], its rank; 1 is the likeliest.
    top_ids, top: i32[R, k] and f32[R, k], the likeliest tokens, and their log-probabilities.
    """

    sampled: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top: jax.Array


def draw(
    logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slots: DecodeState, slot: jax.Array, parts: int = 1
) -> tuple[jax.Array, Logprobs]:
    """`sample`, and `logprobs` of what it gives, a block of rows at a time: together they need several times the memory
    of the logits that they work on, and those of 256 rows and a vocabulary of 128,000 are 125 MiB. parts: over how many
    devices the vocabulary is split."""
    rows, vocab = logits.shape
    block = max(BLOCK * parts // (4 * vocab), 1)

    def some(logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slot: jax.Array) -> Any:
        tokens = sample(logits, sampling, length, slots, slot, parts)
        return tokens, logprobs(logits, tokens, sampling)

    inputs = logits, sampling, length, slot
    if rows <= block:
        return some(*inputs)

    def each() -> Any:
        nothing = jnp.zeros(rows, jnp.int32), no_logprobs(rows, vocab)
        return in_blocks(some, inputs, nothing, block, jnp.int32(-(-rows // block)))

    asked = (sampling.temperature > 0) | sampling.masked | sampling.penalized | sampling.wants_logprobs
    asked |= _early(sampling, length) | _decays(sampling, length) | jnp.any(_forced(sampling, length), axis=-1)
    return lax.cond(jnp.any(asked), each, lambda: (_sound(*_likeliest(logits)), no_logprobs(rows, vocab)))


def in_blocks(call: Callable[..., Any], inputs: Any, out: Any, block: int, blocks: jax.Array) -> Any:
    """`out`, with what `call` makes of the first `blocks` blocks of rows of `inputs`: `block` rows at a time."""
    size = jax.tree.leaves(out)[0].shape[0]

    def body(i: jax.Array, out: Any) -> Any:
        start = jnp.minimum(i * block, size - block)  # the last one may overlap the one before
        result = call(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), inputs))
        return jax.tree.map(lambda all_, some: lax.dynamic_update_slice_in_dim(all_, some, start, 0), out, result)

    return lax.fori_loop(jnp.int32(0), blocks, body, out)


def sample(
    logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slots: DecodeState, slot: jax.Array, parts: int = 1
) -> jax.Array:
    """The next token of each row, i32[R], or NOT_FINITE or NONE_LEFT.

    logits f32[R, V]; slot i32[R], each row's own; length i32[R] is the number of tokens before the sampled one: with
    the row's seed it decides the draw, so that the same request gives the same text in any company. parts: see `draw`.
    """
    logits = _mask(logits, sampling, length, slots, slot, parts)
    logits = _mask_stop_ids(logits, sampling, length)
    logits = _penalize(logits, sampling, slots, slot)
    logits = _force(_decay(logits, sampling, length), sampling, length)
    highest, greedy = _likeliest(logits)

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

    return _sound(highest, lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy))


def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest logit of each row, f32[R], and where it is, i32[R]: the first one of several. NaN is the highest."""

    def higher(left: Any, right: Any) -> Any:
        (a, i), (b, j) = left, right
        wins = (a > b) | (a != a)
        return jnp.where(wins, a, b), jnp.where(wins | ((a == b) & (i < j)), i, j)

    # This is jnp.argmax, which has the value too and throws it away.
    start = jnp.float32(-jnp.inf), jnp.int32(0)
    highest, index = lax.reduce((logits, lax.broadcasted_iota(jnp.int32, logits.shape, 1)), start, higher, (1,))
    return highest, index


def _sound(highest: jax.Array, tokens: jax.Array) -> jax.Array:
    """The tokens, but where the row's highest logit says that there is none to be had."""
    tokens = jnp.where(jnp.isneginf(highest), jnp.int32(NONE_LEFT), tokens)
    return jnp.where(highest < jnp.inf, tokens, jnp.int32(NOT_FINITE))


def no_logprobs(rows: int, vocab: int) -> Logprobs:
    """Zeros, where nobody asks."""
    zeros, likeliest = jnp.zeros(rows, jnp.float32), jnp.zeros((rows, min(MAX_LOGPROBS, vocab)), jnp.float32)
    return Logprobs(zeros, zeros.astype(jnp.int32), likeliest.astype(jnp.int32), likeliest)


def token_logprobs(logits: jax.Array, tokens: jax.Array, likeliest: jax.Array | bool = True) -> Logprobs:
    """Log-probabilities of the model itself: no masks, temperature or filters. NaN, all of a row's, where one of its
    logits is NaN or infinite. The likeliest tokens are looked for only if they are wanted, bool[]."""
    values = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(values, jnp.maximum(tokens, 0)[:, None], axis=-1)
    none = no_logprobs(*logits.shape)

    def find() -> tuple[jax.Array, jax.Array]:
        top, ids = lax.top_k(values, none.top.shape[1])
        return ids.astype(jnp.int32), top

    ids, top = lax.cond(likeliest, find, lambda: (none.top_ids, none.top))
    rank = jnp.sum(~(values <= chosen), axis=-1, dtype=jnp.int32) + 1  # of NaN it is the last
    return Logprobs(chosen[:, 0], rank, ids, top)


def logprobs(logits: jax.Array, tokens: jax.Array, sampling: SamplingArrays) -> Logprobs:
    """`token_logprobs`, computed only if a row wants them for what it samples."""
    wanted = jnp.any(sampling.wants_logprobs)
    return lax.cond(wanted, lambda: token_logprobs(logits, tokens), lambda: no_logprobs(*logits.shape))


def stops(tokens: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether each row's token, or that there is none, ends it, bool[R]; length as for `sample`."""
    # A stop id that comes too early, because it is forced, does not count on the host either.
    stop = jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1) & ~_early(sampling, length)
    return stop | (tokens < 0)


def _early(sampling: SamplingArrays, length: jax.Array) -> jax.Array:
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
    logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slots: DecodeState, slot: jax.Array, parts: int = 1
) -> jax.Array:
    """Minus infinity for tokens that are not allowed; biases added."""

    def mask() -> jax.Array:
        rows, vocab = logits.shape
        masked = jnp.asarray(sampling.masked)
        words = slots.allowed[slot, (length != sampling.begin).astype(jnp.int32)]
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
        allowed = bits.reshape(rows, -1)[:, :vocab] != 0
        if parts > 1:
            # Or XLA would, where a device's part begins within a word, have devices exchange bits, those of all shards
            # of rows in one step: it would wait for ever for a shard of which no row has masks.
            allowed = lax.with_sharding_constraint(allowed, PartitionSpec())
        ids = jnp.where(masked[:, None], slots.bias_ids[slot], vocab)
        index = jnp.arange(rows, dtype=jnp.int32)[:, None]
        biased = logits.at[index, ids].add(slots.bias[slot], mode="drop")
        return jnp.where(allowed | ~masked[:, None], biased, -jnp.inf)

    return lax.cond(jnp.any(sampling.masked), mask, lambda: logits)


def _penalize(logits: jax.Array, sampling: SamplingArrays, slots: DecodeState, slot: jax.Array) -> jax.Array:
    """Presence, frequency and repetition penalties."""

    def penalize() -> jax.Array:
        presence, frequency, repetition = (jnp.asarray(sampling.penalties)[:, i, None] for i in range(3))
        count = copies(slots.in_output, slot)
        seen = (count > 0) | slots.in_prompt[slot]
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        penalized = jnp.where(seen, scaled, logits) - frequency * count - presence * (count > 0).astype(jnp.float32)
        return jnp.where(jnp.asarray(sampling.penalized)[:, None], penalized, logits)

    return lax.cond(jnp.any(sampling.penalized), penalize, lambda: logits)


def _mask_stop_ids(logits: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """No stop id before `min_tokens` tokens."""
    early = _early(sampling, length)

    def mask() -> jax.Array:
        return logits.at[_stop_ids(logits, sampling, early)].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(early), mask, lambda: logits)


def _stop_ids(logits: jax.Array, sampling: SamplingArrays, which: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in the logits the stop ids of some rows are, bool[R]; for all that is none, beyond the vocabulary."""
    ids = jnp.where(which[:, None] & (sampling.stop_ids >= 0), sampling.stop_ids, logits.shape[1])
    return jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None], ids


def _decay(logits: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """What stop ids gain when a text gets long: transformers' ExponentialDecayLengthPenalty."""
    wanted = _decays(sampling, length)

    def decay() -> jax.Array:
        start, factor = jnp.asarray(sampling.decay)[:, 0], jnp.asarray(sampling.decay)[:, 1]
        grown = jnp.minimum(factor ** (length.astype(jnp.float32) - start), MAX_BIAS) - 1
        at = _stop_ids(logits, sampling, wanted)
        stop = logits.at[at].get(mode="fill", fill_value=-jnp.inf)
        gain = jnp.where(jnp.isneginf(stop), 0.0, jnp.minimum(jnp.abs(stop) * grown[:, None], MAX_BIAS))
        return logits.at[at].add(gain, mode="drop")

    return lax.cond(jnp.any(wanted), decay, lambda: logits)


def _force(logits: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Minus infinity for all but the token that must come now."""
    now = _forced(sampling, length)

    def force() -> jax.Array:
        tokens = jnp.asarray(sampling.forced)[:, :, 1]
        token = jnp.where(now[:, 1], tokens[:, 1], tokens[:, 0])
        only = jnp.arange(logits.shape[1], dtype=jnp.int32) == token[:, None]
        return jnp.where(jnp.any(now, axis=-1)[:, None], jnp.where(only, jnp.float32(0), -jnp.inf), logits)

    return lax.cond(jnp.any(now), force, lambda: logits)


def _filter(logits: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """Minus infinity for what min_p, top_k, top_p and the cutoffs exclude."""
    wanted = jnp.any((sampling.min_p > 0) | (sampling.top_k > 0) | (sampling.top_p < 1))
    logits = lax.cond(wanted, lambda: _filtered(logits, sampling), lambda: logits)
    typical, *epsilons = (jnp.asarray(sampling.cutoffs)[:, i] for i in range(3))
    wanted = jnp.any((typical < 1) | (epsilons[0] > 0) | (epsilons[1] > 0))
    return lax.cond(wanted, lambda: _cut_off(logits, typical, *epsilons), lambda: logits)


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


def _cut_off(logits: jax.Array, typical: jax.Array, epsilon: jax.Array, eta: jax.Array) -> jax.Array:
    """transformers' typical_p (Meister et al. 2022), epsilon_cutoff and eta_cutoff (Hewitt et al. 2022), f32[R]."""

    def values_and_entropy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jax.nn.log_softmax(logits, axis=-1)
        return values, -jnp.sum(jnp.where(jnp.isneginf(values), 0, jnp.exp(values) * values), axis=-1)

    # The tokens whose surprise is nearest to the expected one, as many as have a share of `typical`.
    values, entropy = values_and_entropy(logits)
    nearness = -jnp.abs(values + entropy[:, None])
    weights = jnp.exp(values)
    threshold = _threshold(
        nearness, typical >= 1, lambda kept: jnp.sum(jnp.where(kept, weights, 0), axis=-1) >= typical
    )
    logits = jnp.where(_ordered(nearness) >= threshold[:, None], logits, -jnp.inf)

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
