"""The batch that a model sees: a flat stream of tokens, rows packed one after the other."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.attention.backend import AttentionBackend


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Batch:
    """One step's tokens. T tokens, R rows, P pages a row; decode rows first, padding last.

    tokens     i32[T]      packed
    positions  i32[T]      position of each token in its own sequence
    row        i32[T]      the row of each token
    q_start    i32[R+1]    row r owns tokens q_start[r]:q_start[r+1]; padding starts at q_start[R]
    kv_len     i32[R]      tokens of row r in the cache after this step has written its own; 0: the row is unused
    pages      i32[R, P]   page table
    rows       i32[3]      cumulative counts: decode rows, decode + prefill rows, all rows
    decode_only            static: every row has exactly one token (T == R), so nothing is compiled for prefill
    mesh                   static: what heads and weights are split over, if there is more than one device; the batch is
                           then what one shard of its rows sees, inside of a shard_map over them
    device_kind            static: what kind of device it is for (JAX's name of it): kernels are tuned for each
    backend                static: what attends to the cache, if there is one
    """

    tokens: jax.Array
    positions: jax.Array
    row: jax.Array
    q_start: jax.Array
    kv_len: jax.Array
    pages: jax.Array
    rows: jax.Array
    decode_only: bool = field(default=False, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    device_kind: str = field(default="", metadata={"static": True})
    backend: AttentionBackend | None = field(default=None, metadata={"static": True})

    def places(self, page_size: int) -> tuple[jax.Array, jax.Array]:
        """Where each token's key and value go: page, i32[T], and place in it; page 0 for padding and finished rows."""
        tokens = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        live = (tokens < self.q_start[-1]) & (self.positions < self.kv_len[self.row])
        return jnp.where(live, self.pages[self.row, self.positions // page_size], 0), self.positions % page_size

    @staticmethod
    def of_sequences(sequences: list[list[int]], length: int | None = None) -> Batch:
        """Whole sequences packed one after the other, for a forward without a cache (training, scoring, tests).

        `length` pads the stream with unused tokens.
        """
        total = sum(len(s) for s in sequences)
        length = total if length is None else length
        if length < total:
            raise ValueError(f"length {length} is less than the {total} tokens of the sequences")
        pad = np.zeros(length - total, np.int32)
        ends = np.cumsum([0, *(len(s) for s in sequences)])
        count = len(sequences)
        return Batch(
            tokens=jnp.asarray(np.concatenate([*(np.asarray(s, np.int32) for s in sequences), pad])),
            positions=jnp.asarray(np.concatenate([*(np.arange(len(s), dtype=np.int32) for s in sequences), pad])),
            row=jnp.asarray(
                np.concatenate([np.repeat(np.arange(count, dtype=np.int32), np.diff(ends)), pad + max(count - 1, 0)])
            ),
            q_start=jnp.asarray(ends.astype(np.int32)),
            kv_len=jnp.asarray(np.diff(ends).astype(np.int32)),
            pages=jnp.zeros((count, 1), jnp.int32),
            rows=jnp.asarray(np.array([0, count, count], np.int32)),
        )
