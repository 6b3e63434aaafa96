"""Score: the hidden states of a forward to log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.logits import logits_of, logprobs, most
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.logprobs import Logprobs, no_logprobs, token_logprobs
from jaxinfer.sampling.sampler import in_blocks
from jaxinfer.sharding import FSDP, ROWS, axis_size

BLOCK = 128  # tokens: their logits are 65 MB for a vocabulary of 128,000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """Given tokens whose log-probabilities are wanted.

    tokens: i32[T].
    after: i32[T], where among the hidden states the token before each one is.
    count: i32[1], how many of the T are wanted, the first ones.
    likeliest: bool[1], whether the likeliest tokens are wanted too.
    """

    tokens: jax.Array | np.ndarray
    after: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    likeliest: jax.Array | np.ndarray


class Score(Program[EngineShapes]):
    """Logprobs `[size]` of up to `size` tokens, after a forward."""

    kind = "score"
    reads = ("hidden",)

    @property
    def weights(self) -> Collection[str]:
        return self.shapes.model.head

    @property
    def inputs(self) -> tuple[object, ...]:
        token = self.shapes.ints(self.size)
        likeliest = self.shapes.like(np.zeros(self.shapes.shards, bool))
        scored = Scored(token, token, self.shapes.ints(1), likeliest)
        return (scored, token) if self.adapted else (scored,)

    @property
    def result(self) -> Logprobs:
        return logprobs()

    def function(self) -> Function:
        model, mesh, vocab = self.shapes.model, self.shapes.mesh, self.shapes.model.config.vocab_size
        block = min(max(BLOCK // axis_size(mesh, (FSDP,)), 1), self.size)  # `head_logits` has those of all shards

        def score(
            params: Params, _: State, read: State, scored: Scored, adapters: jax.Array | None = None
        ) -> tuple[Logprobs, State]:
            """A block at a time, as many as are wanted: there are never more logits than those of a block."""
            hidden = read.hidden

            def some(after: jax.Array, tokens: jax.Array, *own: jax.Array) -> Logprobs:
                logits = logits_of(self.bind(params, read, own[0] if own else None), model, mesh)
                return token_logprobs(logits(hidden[after]), tokens, jnp.asarray(scored.likeliest)[0])

            blocks = most((jnp.asarray(scored.count)[0] + (block - 1)) // block, mesh)
            wanted: tuple[jax.Array, ...] = jnp.asarray(scored.after), jnp.asarray(scored.tokens)
            wanted = wanted if adapters is None else (*wanted, adapters)
            result: Logprobs = in_blocks(some, wanted, no_logprobs(self.size, vocab), block, blocks)
            return result, State()

        return self.over_rows(score, (PartitionSpec(ROWS),), PartitionSpec(ROWS))
