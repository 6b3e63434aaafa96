"""Hidden states to logits and tokens, as programs have them: over a mesh, in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.engine.programs.base import EngineShapes
from jaxinfer.models.model import AbstractModel
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.logprobs import Logprobs
from jaxinfer.sampling.sampler import Sampler, stops
from jaxinfer.sampling.slots import DecodeState, count
from jaxinfer.sharding import ROWS, TENSOR, axis_size

if TYPE_CHECKING:
    from jaxinfer.models.causal import CausalLM

LogitsOf = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What was sampled, up to S tokens a row.

    tokens: i32[S, R], as `sample` has them.
    count: i32[R], how many of the S are real.
    logprobs: with the same leading axes; None of a plain sampler.
    """

    tokens: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    logprobs: Logprobs | None


_BY_ROW: Any = PartitionSpec(None, ROWS)
SAMPLED: Any = Sampled(_BY_ROW, PartitionSpec(ROWS), _BY_ROW)  # type: ignore[arg-type] # how it is split over shards


def logits_of(module: CausalLM, model: AbstractModel, mesh: Mesh | None) -> LogitsOf:
    """Logits of the vocabulary, and no more of it. Each tensor device has its part of them, and sampling is done in
    parts; all have all of them where the vocabulary had to be padded."""
    vocab = model.config.vocab_size

    def logits(x: jax.Array) -> jax.Array:
        logits = module.logits(x, mesh)
        if mesh is not None:  # also where they are put together next, or XLA would gather the head's weights
            logits = lax.with_sharding_constraint(logits, PartitionSpec(None, TENSOR))
            if logits.shape[1] != vocab:
                logits = lax.with_sharding_constraint(logits, PartitionSpec())
        return logits[:, :vocab]

    return logits


def sampler_of(model: AbstractModel, mesh: Mesh | None, full: bool) -> Sampler:
    """For logits that are split over devices where the vocabulary can be: see `logits_of`."""
    parts = axis_size(mesh, TENSOR)
    return Sampler(full, 1 if model.config.vocab_size % parts else parts)


def anywhere(condition: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Whether it is so on any shard of rows: what has collectives in it must be run by all or by none."""
    return most(condition.astype(jnp.int32), mesh) > 0


def most(count: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The largest that it is on any shard of rows."""
    return count if axis_size(mesh, ROWS) == 1 else lax.pmax(count, ROWS)


def take(
    slots: DecodeState,
    slot: jax.Array,
    tokens: jax.Array,
    taken: jax.Array,
    sampling: SamplingArrays,
    length: jax.Array,
    full: bool,
) -> DecodeState:
    """The slots after rows of `length` tokens have sampled `tokens`, where `taken`; full: see Sampler."""
    nobody = slots.token.shape[0]
    at = jnp.where(taken, slot, nobody)
    alive = ~stops(tokens, sampling, length)
    tokens = jnp.maximum(tokens, 0)  # there may be none
    place = slots.place
    if full:
        own, table = place[slot], jnp.asarray(sampling.table)
        after = jnp.where(table > 0, slots.tables.after(own, tokens), own)
        alive &= ~((table > 0) & (slots.tables.end(after) >= table))
        place = place.at[at].set(after, mode="drop")
    return dataclasses.replace(
        slots,
        token=slots.token.at[at].set(tokens, mode="drop"),
        alive=slots.alive.at[at].set(alive, mode="drop"),
        in_output=count(slots.in_output, slot, tokens, taken & jnp.asarray(sampling.penalized))
        if full
        else slots.in_output,
        place=place,
    )


def sampling_arrays(shapes: EngineShapes, rows: int) -> SamplingArrays:
    """Abstractly."""
    return shapes.like(SamplingArrays.of_rows([], shapes.shards * rows))


def logprobs() -> Logprobs:
    """Their structure."""
    leaf: Any = np.int32(0)
    return Logprobs(leaf, leaf, leaf, leaf)


def sampled(full: bool) -> Sampled:
    """Its structure."""
    info = logprobs()
    return Sampled(info.rank, info.rank, info if full else None)
