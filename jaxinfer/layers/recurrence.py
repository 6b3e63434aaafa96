"""Recurrences over the flat stream: each row goes on from the state in its slot, and rows never mix.

Decoding rows take one step together, prompts are cut into chunks, which a list has one after the other: work is in
proportion to the tokens that there are, whatever the sizes of the batch's arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.kernels.cpu import Recurred, Rows
from jaxinfer.sharding import TENSOR, axis_size, on_tensor

CHUNK = 64  # tokens of a prompt at a time
STEP_ROWS = 16  # decoding rows at a time beside chunks, where there may be few of them
Inputs = tuple[jax.Array, ...]  # of each token


class Mixer(Protocol):
    """What a layer may have in place of attention."""

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]`, and what it keeps after this step."""


class MixerConfig(Protocol):
    """What shapes one."""

    def heads_of(self, features: int) -> int:
        """How many heads a mesh can split."""

    def module(self, features: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> Mixer:
        """Of so many features; eps: of norms."""


class Cell(Protocol):
    """A recurrence, a pytree of parameters `[heads, ...]`. Where a mesh has a `tensor` axis, it runs on each device's
    own part of the heads.

    state: the shape of a row's state, heads first.
    """

    @property
    def state(self) -> tuple[int, ...]: ...

    def step(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """A token of each of R rows: what comes out, `[R, heads, ...]`, and the states after it, `[R, *state]`."""

    def chunk(self, state: jax.Array, inputs: Inputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same of `count` tokens of one row; what else is among the inputs is not its own, and may be anything."""

    def run(self, inputs: Inputs, states: jax.Array, rows: Rows, reference: Callable[[], Recurred]) -> Recurred:
        """All rows of the stream: by a kernel where there is one, else as `reference` does."""


def recur(
    cell: Cell, inputs: Inputs, states: jax.Array | None, batch: ForwardBatch
) -> tuple[jax.Array, jax.Array | None]:
    """What comes out of each token, float32 `[T, heads, ...]`, and the states `[slots, *state]` after them.

    inputs: each `[T, heads, ...]`; of fewer heads than `tensor` has devices, or not of a multiple of them, some are
    there several times. states: None: rows are whole sequences, and nothing is kept of them.
    """
    held = jnp.zeros((batch.kv_lens.shape[0] + 1, *cell.state), jnp.float32) if states is None else states
    slots = row_slots(batch, held.shape[0], states is None)
    call: Any = _run
    batch_alone = dataclasses.replace(batch, mesh=None)
    if batch.mesh is not None:
        devices = axis_size(batch.mesh, TENSOR)
        inputs = tuple(jnp.repeat(x, math.lcm(x.shape[1], devices) // x.shape[1], axis=1) for x in inputs)
        heads = PartitionSpec(None, TENSOR)
        call = on_tensor(call, (PartitionSpec(TENSOR), heads, heads, PartitionSpec(), PartitionSpec()), (heads, heads))
    out, held = call(cell, inputs, held, slots, batch_alone)
    return out, None if states is None else held


def row_slots(batch: ForwardBatch, count: int, alone: bool = False) -> jax.Array:
    """Each row's slot, i32[R], of so many; the last, which is nobody's, of rows that are not live. alone: there is no
    cache, and each row has its own."""
    own = jnp.arange(batch.kv_lens.shape[0], dtype=jnp.int32) if alone else batch.slots
    return jnp.where(batch.kv_lens > 0, jnp.asarray(own), count - 1)


def begins(batch: ForwardBatch) -> jax.Array:
    """bool[R], which rows' sequences begin in this batch: whatever is in their slots, their states are zeros."""
    return batch.kv_lens == jnp.diff(batch.cu_q_lens)


def _run(cell: Cell, inputs: Inputs, states: jax.Array, slots: jax.Array, batch: ForwardBatch) -> Recurred:
    by_xla = partial(_recur, cell, inputs, states, slots, batch)
    return cell.run(inputs, states, Rows(batch.cu_q_lens, batch.kv_lens, slots), by_xla)


def _recur(cell: Cell, inputs: Inputs, states: jax.Array, slots: jax.Array, batch: ForwardBatch) -> Recurred:
    fresh = begins(batch)
    if batch.decode_only:
        out, after = cell.step(_where_not(fresh, states[slots]), inputs)
        return out, states.at[slots].set(after)
    tokens, rows, nobody = inputs[0].shape[0], slots.shape[0], states.shape[0] - 1
    more = max(CHUNK, STEP_ROWS)
    padded = tuple(jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))) for x in inputs)
    like, _ = jax.eval_shape(cell.step, states[:1], tuple(x[:1] for x in inputs))
    decoding = batch.distribution[0]

    def cut(start: jax.Array, size: int) -> Inputs:
        return tuple(lax.dynamic_slice_in_dim(x, start, size) for x in padded)

    def steps(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, states = carry
        row = i * STEP_ROWS + jnp.arange(STEP_ROWS, dtype=jnp.int32)
        own = jnp.minimum(row, rows - 1)
        slot = jnp.where(row < decoding, slots[own], nobody)
        made, after = cell.step(_where_not(fresh[own], states[slot]), cut(i * STEP_ROWS, STEP_ROWS))
        return lax.dynamic_update_slice_in_dim(out, made, i * STEP_ROWS, 0), states.at[slot].set(after)

    lengths = jnp.where(jnp.arange(rows, dtype=jnp.int32) < decoding, 0, jnp.diff(batch.cu_q_lens))
    chunks = (lengths + CHUNK - 1) // CHUNK
    ends = jnp.cumsum(chunks)

    def chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, states = carry
        row = jnp.minimum(jnp.sum(i >= ends, dtype=jnp.int32), rows - 1)
        skip = (i - (ends - chunks)[row]) * CHUNK
        start, slot = batch.cu_q_lens[row] + skip, slots[row]
        before = _where_not((fresh[row] & (skip == 0))[None], states[slot][None])[0]
        made, after = cell.chunk(before, cut(start, CHUNK), jnp.minimum(lengths[row] - skip, CHUNK))
        # What is made of others' tokens is written over when theirs come, which is later.
        return lax.dynamic_update_slice_in_dim(out, made, start, 0), states.at[slot].set(after)

    carry = jnp.zeros((tokens + more, *like.shape[1:]), jnp.float32), states
    carry = lax.fori_loop(0, (decoding + STEP_ROWS - 1) // STEP_ROWS, steps, carry)
    out, states = lax.fori_loop(0, ends[-1], chunk, carry)
    return out[:tokens], states


def _where_not(fresh: jax.Array, states: jax.Array) -> jax.Array:
    """The states of rows `[R, ...]`, zeros of those that are fresh."""
    return jnp.where(fresh.reshape(-1, *(1,) * (states.ndim - 1)), jnp.zeros((), states.dtype), states)
