"""Forward: tokens of prompts and of decoding sequences, through all layers but the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.attention import ForwardBatch
from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.slots import DecodeState
from jaxinfer.sharding import ROWS


class Forward(Program[EngineShapes]):
    """Decoding rows, one token each (taken from their slots), then chunks of prompts: up to `size` tokens of as many
    rows as there are slots.

    On a mesh every array of rows, tokens, slots or pages is several shards' one after the other, with indices that
    count from the shard's own beginning.
    """

    kind = "forward"
    changes = ("cache", "slots", "hidden")

    @property
    def inputs(self) -> tuple[object, ...]:
        ints, rows = self.shapes.ints, self.shapes.max_rows
        token, row, tables = ints(self.size), ints(rows), self.shapes.tables(rows)
        batch = ForwardBatch(token, token, token, ints(rows + 1), row, tables, ints(3), slots=row)
        return (batch, row) if self.adapted else (batch,)

    @property
    def result(self) -> None:
        return None

    def function(self) -> Function:
        mesh, kind = self.shapes.mesh, self.shapes.devices[0].device_kind
        layers = self.shapes.layer_map

        def forward(
            params: Params, state: State, read: State, batch: ForwardBatch, adapters: jax.Array | None = None
        ) -> tuple[None, State]:
            slots = state.slots
            slot = jnp.asarray(batch.slots)
            decoding = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) < batch.distribution[0]
            tokens = jnp.where(decoding, slots.token[slot[batch.segment_ids]], batch.tokens)
            # A decoding row that has stopped in a call whose tokens the host has not seen yet: it must write nothing.
            decodes = jnp.arange(slot.shape[0], dtype=jnp.int32) < batch.distribution[0]
            kv_lens = jnp.where(decodes & ~slots.alive[slot], 0, batch.kv_lens)
            static: Any = {"mesh": mesh, "device_kind": kind, "layers": layers}
            batch = dataclasses.replace(batch, tokens=tokens, kv_lens=kv_lens, **static)
            of_tokens = None if adapters is None else adapters[batch.segment_ids]
            hidden, cache = self.bind(params, read, of_tokens).hidden(batch, state.cache)
            assert cache is not None
            slots = _begin(slots, jnp.where(decodes, slots.alive.shape[0], slot))
            return None, State(cache, slots, lax.dynamic_update_slice_in_dim(state.hidden, hidden, 0, 0))

        return self.over_rows(forward, (PartitionSpec(ROWS),), PartitionSpec())


def _begin(slots: DecodeState, slot: jax.Array) -> DecodeState:
    """Sequences whose prompts are computed are alive, whatever the slots' last ones were."""
    return dataclasses.replace(slots, alive=slots.alive.at[slot].set(True, mode="drop"))
