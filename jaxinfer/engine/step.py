"""What runs on the device: pure functions of parameters, cache, batch and sampling arrays.

Defined once and lowered by all who need them, with real or abstract arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.attention import Batch
from jaxinfer.cache import Cache
from jaxinfer.models.model import Model, Params
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.sample import Logprobs, logprobs, sample, stops


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """Rows about to decode: tokens i32[R] to feed, their positions i32[R], limit i32[R] (most tokens to sample in
    this call, 0 for an unused row), pages i32[R, P]."""

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    limit: jax.Array | np.ndarray
    pages: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """tokens i32[S, R]; count i32[R], how many of the S are real; logprobs with the same leading axes."""

    tokens: jax.Array
    count: jax.Array
    logprobs: Logprobs


Step = Callable[[Params, Cache, Batch, SamplingArrays], tuple[Sampled, Cache]]
Decode = Callable[[Params, Cache, DecodeRows, SamplingArrays, Any], tuple[Sampled, Cache]]


def make_step(model: Model) -> Step:
    """One mixed call: prompt chunks and decoding rows; one token is sampled at each of `batch.logits_at`."""

    def step(params: Params, cache: Cache, batch: Batch, sampling: SamplingArrays) -> tuple[Sampled, Cache]:
        logits, new_cache = model.bind(params)(batch, cache)
        assert new_cache is not None
        length = batch.positions[batch.logits_at] + 1
        tokens = sample(logits, sampling, length)
        info = logprobs(logits, tokens, sampling)
        sampled = Sampled(tokens[None], jnp.ones_like(tokens), jax.tree.map(lambda x: x[None], info))
        return sampled, new_cache

    return step


def make_decode(model: Model, max_steps: int) -> Decode:
    """Up to `max_steps` tokens a row in one call; `steps`, i32[], says how many this time.

    A row ends at one of its stop ids or at its limit; the call ends when all rows have.
    """

    def decode(
        params: Params, cache: Cache, rows: DecodeRows, sampling: SamplingArrays, steps: jax.Array
    ) -> tuple[Sampled, Cache]:
        module = model.bind(params)
        size = rows.tokens.shape[0]
        index = jnp.arange(size, dtype=jnp.int32)
        # Lists, not arrays, would break under strict promotion; all carried values are int32 but the cache.
        start = (jnp.int32(0), jnp.asarray(rows.tokens), jnp.asarray(rows.limit) > 0, jnp.zeros(size, jnp.int32))

        def advance(
            module: Any, i: jax.Array, tokens: jax.Array, active: jax.Array, cache: Cache
        ) -> tuple[jax.Array, Logprobs, Cache]:
            positions = jnp.asarray(rows.positions) + i
            batch = Batch(
                tokens=tokens,
                positions=positions,
                row=index,
                q_start=jnp.arange(size + 1, dtype=jnp.int32),
                kv_len=jnp.where(active, positions + 1, 0),
                pages=jnp.asarray(rows.pages),
                rows=jnp.full(3, size, jnp.int32),
                logits_at=index,
                decode_only=True,
            )
            logits, cache = module(batch, cache)
            new = sample(logits, sampling, positions + 1)
            return new, logprobs(logits, new, sampling), cache

        shapes = jax.eval_shape(functools.partial(advance, module), *start[:3], cache)
        out = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), (shapes[0], shapes[1]))

        def going(state: Any) -> jax.Array:
            i, _, active, *_ = state
            return (i < steps) & jnp.any(active)

        def body(state: Any) -> Any:
            i, tokens, active, count, cache, out = state
            new, info, cache = advance(module, i, tokens, active, cache)
            out = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0), out, (new, info))
            count = count + active.astype(jnp.int32)
            active = active & ~stops(new, sampling) & (i + 1 < rows.limit)
            return i + 1, new, active, count, cache, out

        *_, count, cache, (tokens, info) = lax.while_loop(going, body, (*start, cache, out))
        return Sampled(tokens, count, info), cache

    return decode
