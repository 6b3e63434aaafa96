"""Decode: some tokens of each row, in a loop on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.attention import ForwardBatch, Table
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
from jaxinfer.sampling.slots import DecodeState
from jaxinfer.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """The rows of a decoding call.

    slot: i32[R], each row's own.
    samples: i32[R], most tokens to sample; 0 for an unused row.
    positions: i32[R], of the token that is fed first.
    tables: as in ForwardBatch.
    """

    slot: jax.Array | np.ndarray
    samples: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    tables: tuple[Table | None, ...]


def decode_batch(
    shapes: EngineShapes, rows: DecodeRows, positions: jax.Array, active: jax.Array, slots: DecodeState
) -> ForwardBatch:
    """The last token of each row, at these positions."""
    slot = jnp.asarray(rows.slot)
    size = slot.shape[0]
    return ForwardBatch(
        tokens=slots.token[slot],
        positions=positions,
        segment_ids=jnp.arange(size, dtype=jnp.int32),
        cu_q_lens=jnp.arange(size + 1, dtype=jnp.int32),
        kv_lens=jnp.where(active, positions + 1, 0),
        tables=rows.tables,
        distribution=jnp.full(3, size, jnp.int32),
        slots=slot,
        decode_only=True,
        mesh=shapes.mesh,
        device_kind=shapes.devices[0].device_kind,
        layers=shapes.layer_map,
    )


class Decode(Program[EngineShapes]):
    """Up to `max_steps` tokens of each of up to `size` rows; `steps`, i32[], says how many this time. A row ends at one
    of its stop ids or after `samples` tokens; the call ends when all rows have. All of them are plain
    (`SamplingParams.is_plain`)."""

    kind = "decode"
    full: ClassVar = False
    changes = ("cache", "slots")

    @property
    def inputs(self) -> tuple[object, ...]:
        shapes = self.shapes
        row, tables = shapes.ints(self.size), shapes.tables(self.size)
        inputs = DecodeRows(row, row, row, tables), sampling_arrays(shapes, self.size), shapes.like(np.int32(0))
        return (*inputs, row) if self.adapted else inputs

    @property
    def result(self) -> Sampled:
        return sampled(self.full)

    def function(self) -> Function:
        model, mesh, max_steps = self.shapes.model, self.shapes.mesh, self.shapes.max_steps
        sampler = sampler_of(model, mesh, self.full)

        def decode(
            params: Params,
            state: State,
            read: State,
            rows: DecodeRows,
            sampling: SamplingArrays,
            steps: jax.Array,
            adapters: jax.Array | None = None,
        ) -> tuple[Sampled, State]:
            module = self.bind(params, read, adapters)
            logits = logits_of(module, model, mesh)
            slot = jnp.asarray(rows.slot)
            size = slot.shape[0]

            def advance(i: jax.Array, active: jax.Array, state: State) -> tuple[jax.Array, Logprobs | None, State]:
                positions = jnp.asarray(rows.positions) + i
                batch = decode_batch(self.shapes, rows, positions, active, state.slots)
                hidden, cache = module.hidden(batch, state.cache)
                assert cache is not None
                tokens, info = sampler(logits(hidden), sampling, positions + 1, state.slots, slot)
                slots = take(state.slots, slot, tokens, active, sampling, positions + 1, sampler.full)
                return tokens, info, State(cache, slots)

            active = (jnp.asarray(rows.samples) > 0) & state.slots.alive[slot]
            tokens, info, _ = jax.eval_shape(functools.partial(advance, jnp.int32(0)), active, state)
            out = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), (tokens, info))

            def going(carry: Any) -> jax.Array:
                i, active, *_ = carry
                return (i < steps) & anywhere(jnp.any(active), mesh)

            def body(carry: Any) -> Any:
                i, active, count, before, out = carry
                tokens, info, after = advance(i, active, before)
                put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
                out = jax.tree.map(put, out, (tokens, info))
                count = count + active.astype(jnp.int32)
                active = active & after.slots.alive[slot] & (i + 1 < rows.samples)
                return i + 1, active, count, after, out

            start = (jnp.int32(0), active, jnp.zeros(size, jnp.int32), state, out)
            _, _, count, after, (all_tokens, all_info) = lax.while_loop(going, body, start)
            return Sampled(all_tokens, count, all_info), after

        input_specs = PartitionSpec(ROWS), PartitionSpec(ROWS), PartitionSpec()
        return self.over_rows(decode, input_specs, SAMPLED)


class FullDecode(Decode):
    """The same for rows of any parameters."""

    kind = "full_decode"
    full = True


class DecodeForward(Program[EngineShapes]):
    """One token of each of up to `size` rows through all layers but the head, before a sample that has to wait for
    something: what `Forward` is where there are chunks of prompts."""

    kind = "decode_forward"
    changes = ("cache", "hidden")
    reads = ("slots",)

    @property
    def inputs(self) -> tuple[object, ...]:
        shapes = self.shapes
        row, tables = shapes.ints(self.size), shapes.tables(self.size)
        rows = DecodeRows(row, row, row, tables)
        return (rows, row) if self.adapted else (rows,)

    @property
    def result(self) -> None:
        return None

    def function(self) -> Function:
        def forward(
            params: Params, state: State, read: State, rows: DecodeRows, adapters: jax.Array | None = None
        ) -> tuple[None, State]:
            active = (jnp.asarray(rows.samples) > 0) & read.slots.alive[jnp.asarray(rows.slot)]
            batch = decode_batch(self.shapes, rows, jnp.asarray(rows.positions), active, read.slots)
            hidden, cache = self.bind(params, read, adapters).hidden(batch, state.cache)
            assert cache is not None
            return None, State(cache, hidden=lax.dynamic_update_slice_in_dim(state.hidden, hidden, 0, 0))

        return self.over_rows(forward, (PartitionSpec(ROWS),), PartitionSpec())
