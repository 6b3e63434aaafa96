"""Log-probabilities of tokens: the model's own, before masks, temperature and filters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.params import MAX_LOGPROBS


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
