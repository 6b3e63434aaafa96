"""Logits to tokens: a pure function of logits, parameters and positions.

Order as in vLLM: allowed tokens, biases, stop ids that come too early, penalties, temperature, min_p, top_k, top_p,
draw; what only transformers has comes after these, in its order. What no row asks for is skipped at run time: a greedy
batch costs an argmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels import cpu
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.filters import cut_off, filter_top
from jaxinfer.sampling.logprobs import Logprobs, logprobs, no_logprobs
from jaxinfer.sampling.noise import gumbel
from jaxinfer.sampling.processors import is_early, process
from jaxinfer.sampling.slots import DecodeState

BLOCK = 2**23  # bytes of logits that sampling works on at a time, on each device
NOT_FINITE, NONE_LEFT = -1, -2  # in place of a token: the likeliest logit is NaN or infinite; all are minus infinity


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token of each row.

    full: with all that parameters can ask for. Else with temperature, top_k, top_p and min_p alone, which compiles in a
        third of the time; `SamplingParams.is_plain` says for which rows that does.
    parts: over how many devices the vocabulary is split.

    Called with logits f32[R, V]; slots; slot i32[R], each row's own; length i32[R], the number of tokens before the
    sampled one: with the row's seed it decides the draw, so that the same request gives the same text in any company;
    and if it is full, perhaps allowed u32[R, V/32], a bit for each token that may come now, whatever else says so.
    Gives the tokens, i32[R], NOT_FINITE or NONE_LEFT among them, and if it is full their `Logprobs`.
    """

    full: bool = True
    parts: int = 1

    def __call__(
        self,
        logits: jax.Array,
        sampling: SamplingArrays,
        length: jax.Array,
        slots: DecodeState,
        slot: jax.Array,
        allowed: jax.Array | None = None,
    ) -> tuple[jax.Array, Logprobs | None]:
        """A block of rows at a time: together they need several times the memory of the logits that they work on, and
        those of 256 rows and a vocabulary of 128,000 are 125 MiB."""
        rows, vocab = logits.shape
        block = max(BLOCK * self.parts // (4 * vocab), 1)

        def some(
            logits: jax.Array, sampling: SamplingArrays, length: jax.Array, slot: jax.Array, allowed: jax.Array | None
        ) -> Any:
            tokens = self.tokens(logits, sampling, length, slots, slot, allowed)
            return tokens, logprobs(logits, tokens, sampling) if self.full else None

        inputs = logits, sampling, length, slot, allowed
        if rows <= block:
            return some(*inputs)

        def each() -> Any:
            return in_blocks(some, inputs, self.nothing(rows, vocab), block, jnp.int32(-(-rows // block)))

        if self.full:
            return each()
        greedy = ~jnp.any(sampling.temperature > 0)
        return lax.cond(greedy, lambda: (_sound(*_likeliest(logits)), None), each)

    def nothing(self, rows: int, vocab: int) -> tuple[jax.Array, Logprobs | None]:
        """Of a call's form, where nothing is sampled."""
        return jnp.zeros(rows, jnp.int32), no_logprobs(rows, vocab) if self.full else None

    def tokens(
        self,
        logits: jax.Array,
        sampling: SamplingArrays,
        length: jax.Array,
        slots: DecodeState,
        slot: jax.Array,
        allowed: jax.Array | None = None,
    ) -> jax.Array:
        """Those of all rows at once."""
        if self.full:
            logits = process(logits, sampling, length, slots, slot, self.parts, allowed)
        highest, greedy = _likeliest(logits)

        def draw() -> jax.Array:
            temperature = jnp.where(sampling.temperature > 0, sampling.temperature, jnp.float32(1))
            kept = filter_top(logits / temperature[:, None], sampling)
            if self.full:
                kept = cut_off(kept, sampling)
            # Gumbel-max: argmax of logits plus Gumbel noise is a draw from their softmax.
            noisy = kept + gumbel(jnp.asarray(sampling.seed), length, logits.shape[1])
            # Not jnp.argmax: on CPU that makes the noise one number after the other, in five times the time.
            is_highest = noisy == jnp.max(noisy, axis=-1, keepdims=True)
            tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)
            drawn = jnp.min(jnp.where(is_highest, tokens, logits.shape[1] - 1), axis=-1)
            return jnp.where(sampling.temperature > 0, drawn, greedy)

        return _sound(highest, lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy))


def in_blocks(call: Callable[..., Any], inputs: Any, out: Any, block: int, blocks: jax.Array) -> Any:
    """`out`, with what `call` makes of the first `blocks` blocks of rows of `inputs`: `block` rows at a time."""
    size = jax.tree.leaves(out)[0].shape[0]

    def body(i: jax.Array, out: Any) -> Any:
        start = jnp.minimum(i * block, size - block)  # the last one may overlap the one before
        result = call(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), inputs))
        return jax.tree.map(lambda all_, some: lax.dynamic_update_slice_in_dim(all_, some, start, 0), out, result)

    return lax.fori_loop(jnp.int32(0), blocks, body, out)


def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest logit of each row, f32[R], and where it is, i32[R]: the first one of several. NaN is the highest."""
    on_cpu = functools.partial(cpu.argmax, reference=_likeliest_in_two)
    return lax.platform_dependent(logits, cpu=on_cpu, default=_likeliest_in_one)


def _likeliest_in_two(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By reductions of numbers, which XLA:CPU makes vectors of: one of pairs takes three to seven times as long."""
    broken = jnp.isnan(logits)  # which its highest number would leave out
    some_broken = jnp.any(broken, axis=-1)
    highest = jnp.where(some_broken, jnp.float32(jnp.nan), jnp.max(logits, axis=-1))
    is_highest = jnp.where(some_broken[:, None], broken, logits == highest[:, None])
    tokens = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return highest, jnp.min(jnp.where(is_highest, tokens, logits.shape[1] - 1), axis=-1)


def _likeliest_in_one(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    def higher(left: Any, right: Any) -> Any:
        (a, i), (b, j) = left, right
        wins = (a > b) | (a != a)
        return jnp.where(wins, a, b), jnp.where(wins | ((a == b) & (i < j)), i, j)

    # jnp.argmax has the value too, and throws it away.
    start = jnp.float32(-jnp.inf), jnp.int32(0)
    highest, index = lax.reduce((logits, lax.broadcasted_iota(jnp.int32, logits.shape, 1)), start, higher, (1,))
    return highest, index


def _sound(highest: jax.Array, tokens: jax.Array) -> jax.Array:
    """The tokens, but where the row's highest logit says that there is none to be had."""
    tokens = jnp.where(jnp.isneginf(highest), jnp.int32(NONE_LEFT), tokens)
    return jnp.where(highest < jnp.inf, tokens, jnp.int32(NOT_FINITE))


def stops(tokens: jax.Array, sampling: SamplingArrays, length: jax.Array) -> jax.Array:
    """Whether each row's token, or that there is none, ends it, bool[R]; length as for `Sampler`."""
    # A stop id that comes too early, because it is forced, does not count on the host either.
    stop = jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1) & ~is_early(sampling, length)
    return stop | (tokens < 0)
