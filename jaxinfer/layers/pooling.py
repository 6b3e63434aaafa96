"""One vector of the hidden states of a row's tokens. Definitions are those of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.attention import ForwardBatch

NEGATIVE = -1e9  # of what takes no part in a maximum


@dataclass(frozen=True)
class Tokens:
    """What a pooling gets: no row sees another's tokens, nor padding.

    x: f32[T, D], hidden states.
    counted: f32[T], 1 of tokens that take part, 0 of others.
    first: i32[R], the first that does, by its number in the stream.
    batch: they are of.
    """

    x: jax.Array
    counted: jax.Array
    first: jax.Array
    batch: ForwardBatch

    def sums(self, values: jax.Array) -> jax.Array:
        """Of each row, `[R, ...]`, one token after the other, so that they don't depend on other rows."""
        return jax.ops.segment_sum(values, self.batch.segment_ids, self.batch.kv_lens.shape[0])

    def at(self, index: jax.Array) -> jax.Array:
        """The hidden states `[R, D]` of tokens, by their numbers in the stream."""
        return self.x[jnp.clip(index, 0, self.x.shape[0] - 1)]


def _mean(tokens: Tokens, weights: jax.Array, root: bool = False) -> jax.Array:
    """Weighted. root: divided by the square root of the sum of weights, not by that."""
    weights = weights * tokens.counted
    total = jnp.maximum(tokens.sums(weights), 1e-9)
    return tokens.sums(tokens.x * weights[:, None]) / (jnp.sqrt(total) if root else total)[:, None]


def _last(tokens: Tokens) -> jax.Array:
    return tokens.at(tokens.batch.cu_q_lens[1:] - 1)


def _max(tokens: Tokens) -> jax.Array:
    values = jnp.where(tokens.counted[:, None] > 0, tokens.x, NEGATIVE)
    most = jax.ops.segment_max(values, tokens.batch.segment_ids, tokens.batch.kv_lens.shape[0])
    return jnp.maximum(most, NEGATIVE)  # of unused rows it would be infinite


# In the order in which several are put together.
POOLINGS: dict[str, Callable[[Tokens], jax.Array]] = {
    "cls": lambda tokens: tokens.at(tokens.first),
    "max": _max,
    "mean": lambda tokens: _mean(tokens, jnp.ones_like(tokens.counted)),
    "mean_sqrt_len_tokens": lambda tokens: _mean(tokens, jnp.ones_like(tokens.counted), root=True),
    "weightedmean": lambda tokens: _mean(tokens, (tokens.batch.positions + 1).astype(jnp.float32)),
    "lasttoken": _last,
}


def pool(x: jax.Array, batch: ForwardBatch, kinds: tuple[str, ...], skip: jax.Array | None = None) -> jax.Array:
    """Vectors float32 `[R, D * kinds]` of hidden states `[T, D]`; of unused rows they are finite, and mean nothing.

    kinds: names in POOLINGS, in their order.
    skip: i32[R], how many tokens of each row, its first ones (a prompt's), take no part; None: all do.
    """
    counted, first = batch.live, batch.cu_q_lens[:-1]
    if skip is not None:
        counted &= batch.positions >= skip[batch.segment_ids]
        first = first + jnp.where(skip < batch.kv_lens, skip, 0)
    tokens = Tokens(x.astype(jnp.float32), counted.astype(jnp.float32), first, batch)
    return jnp.concatenate([POOLINGS[kind](tokens) for kind in kinds], axis=-1)
