"""Sample: the hidden states of a forward to the next token of each row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.logits import (
    SAMPLED,
    Sampled,
    anywhere,
    logits_of,
    sampled,
    sampler_of,
    sampling_arrays,
    take,
)
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.logprobs import Logprobs
from jaxinfer.sampling.slots import mask_words
from jaxinfer.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleRows:
    """The rows that are sampled.

    slot: i32[R], each row's own.
    samples: i32[R], 1, or 0 where a chunk does not end its prompt.
    logits_indices: i32[R], where each row's last token is among the hidden states.
    length: i32[R], tokens before the one that is sampled.
    """

    slot: jax.Array | np.ndarray
    samples: jax.Array | np.ndarray
    logits_indices: jax.Array | np.ndarray
    length: jax.Array | np.ndarray


class Sample(Program[EngineShapes]):
    """A token of each of up to `size` rows, all of them plain (`SamplingParams.is_plain`), after a forward."""

    kind = "sample"
    full: ClassVar = False
    changes = ("slots",)
    reads = ("hidden",)

    @property
    def weights(self) -> Collection[str]:
        return self.shapes.model.head

    @property
    def inputs(self) -> tuple[object, ...]:
        row = self.shapes.ints(self.size)
        inputs = SampleRows(row, row, row, row), sampling_arrays(self.shapes, self.size)
        return (*inputs, *self.masks, row) if self.adapted else (*inputs, *self.masks)

    @property
    def masks(self) -> tuple[object, ...]:
        """What else there is of tokens that may come."""
        return ()

    @property
    def result(self) -> Sampled:
        return sampled(self.full)

    def function(self) -> Function:
        model, mesh = self.shapes.model, self.shapes.mesh
        sampler = sampler_of(model, mesh, self.full)

        def sample(
            params: Params, state: State, read: State, rows: SampleRows, sampling: SamplingArrays, *more: jax.Array
        ) -> tuple[Sampled, State]:
            (*masks, adapters) = more if self.adapted else (*more, None)
            logits = logits_of(self.bind(params, read, adapters), model, mesh)
            slots, hidden = state.slots, read.hidden
            slot, length = jnp.asarray(rows.slot), jnp.asarray(rows.length)
            # A row may have stopped in a call whose tokens the host has not seen yet.
            count = jnp.where(slots.alive[slot], jnp.asarray(rows.samples), 0)

            def chosen() -> tuple[jax.Array, Logprobs | None]:
                return sampler(logits(hidden[rows.logits_indices]), sampling, length, slots, slot, *masks)

            nothing = sampler.nothing(slot.shape[0], model.config.vocab_size)
            tokens, info = lax.cond(anywhere(jnp.any(count > 0), mesh), chosen, lambda: nothing)
            slots = take(slots, slot, tokens, count > 0, sampling, length, sampler.full)
            return Sampled(tokens[None], count, jax.tree.map(lambda x: x[None], info)), State(slots=slots)

        return self.over_rows(sample, (PartitionSpec(ROWS),) * (2 + len(self.masks)), SAMPLED)


class FullSample(Sample):
    """The same for rows of any parameters."""

    kind = "full_sample"
    full = True


class GuidedSample(FullSample):
    """The same with masks from the host, u32[R, V/32]: a bit for each token that may come. They are not needed before
    this is called, so the host makes them while the device is in the forward before it."""

    kind = "guided_sample"

    @property
    def masks(self) -> tuple[object, ...]:
        shapes = self.shapes
        return (
            shapes.like(np.zeros((shapes.shards * self.size, mask_words(shapes.model.config.vocab_size)), np.uint32)),
        )
