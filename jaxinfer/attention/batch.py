"""The batch that a model sees: a flat stream of tokens, rows packed one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """Pages of a cache group.

    pages: i32[R, P].
    first: i32[R], which of its sequence's pages is in a row's first column; None where that is always the first.
    """

    pages: Any
    first: Any = None


@dataclass(frozen=True)
class LayerMap:
    """Which layer has which part of the cache.

    places: of each layer, which of the cache's arrays it has, or reads, and which group it is in; None: there is none.
    backends: what attends to each group.
    page_size: tokens a page.
    """

    places: tuple[tuple[int, int] | None, ...]
    backends: tuple[Attend | None, ...]
    page_size: int


class Attend(Protocol):
    """What a batch knows of an AttentionBackend."""

    @property
    def partition_spec(self) -> PartitionSpec:
        """Of the pools' arrays over a mesh."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pools: LayerCache, batch: ForwardBatch, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """Writes keys and values into a layer's pools and attends, on one device's part of the heads: see `attend`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardBatch:
    """One step's tokens. T tokens, R rows; decode rows first, padding last.

    tokens: i32[T], packed.
    positions: i32[T], position of each token in its own sequence.
    segment_ids: i32[T], the row of each token.
    cu_q_lens: i32[R+1]; row r owns tokens cu_q_lens[r]:cu_q_lens[r+1]; padding starts at cu_q_lens[R].
    kv_lens: i32[R], tokens of row r in the cache after this step has written its own; 0: the row is unused.
    tables: of each cache group its pages; None of those that have slots.
    distribution: i32[3], cumulative counts: decode rows, decode + prefill rows, all rows.
    slots: i32[R], each row's own, where there are groups that have them; of an unused row any. The last of the arrays'
        is nobody's, and the only one that such rows may write to: see `write_state`.
    token_types: i32[T], which part of a pair of texts each token is of, for models that tell them apart; None: the
        first.
    decode_only: static: every row has exactly one token (T == R), so nothing is compiled for prefill.
    mesh: static: what heads and weights are split over, if there is more than one device; the batch is then what one
        shard of its rows sees, inside of a shard_map over them.
    device_kind: static: what kind of device it is for (JAX's name of it): kernels are tuned for each.
    layers: static: which layer has which part of the cache, if there is one.
    backend: static: what attends, in a group's view.

    A layer's attention has a view of it: what its cache group sees. That is a batch with one table, whose positions and
    lengths count from where the table begins (masks go by differences, and rotary embeddings are not its concern).
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    tables: tuple[Table | None, ...]
    distribution: jax.Array
    slots: jax.Array | None = None
    token_types: jax.Array | None = None
    decode_only: bool = field(default=False, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    device_kind: str = field(default="", metadata={"static": True})
    layers: LayerMap | None = field(default=None, metadata={"static": True})
    backend: Attend | None = field(default=None, metadata={"static": True})

    @property
    def pages(self) -> jax.Array:
        """The page table i32[R, P] of a view."""
        (table,) = self.tables
        assert table is not None
        assert table.first is None
        return table.pages

    def views(self) -> list[ForwardBatch]:
        """What each cache group sees."""
        if self.layers is None:
            return []
        return [
            self._view(table, backend, self.layers.page_size)
            for table, backend in zip(self.tables, self.layers.backends, strict=True)
        ]

    def _view(self, table: Table | None, backend: Attend | None, page_size: int) -> ForwardBatch:
        if table is None:
            return self
        view = replace(self, tables=(Table(table.pages),), backend=backend)
        if table.first is None:
            return view
        begin = table.first * page_size
        kv_lens = jnp.where(self.kv_lens > 0, self.kv_lens - begin, 0)
        return replace(view, positions=self.positions - begin[self.segment_ids], kv_lens=kv_lens)

    @property
    def live(self) -> jax.Array:
        """bool[T], which tokens are of rows that still run: the rest is padding."""
        tokens = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        return (tokens < self.cu_q_lens[-1]) & (self.positions < self.kv_lens[self.segment_ids])

    def slot_mapping(self, page_size: int) -> tuple[jax.Array, jax.Array]:
        """Where each token's key and value go: page, i32[T], and place in it; page 0 for padding and finished rows."""
        pages = self.pages[self.segment_ids, self.positions // page_size]
        return jnp.where(self.live, pages, 0), self.positions % page_size

    @staticmethod
    def of_sequences(
        sequences: list[list[int]], length: int | None = None, token_types: list[list[int]] | None = None
    ) -> ForwardBatch:
        """Whole sequences packed one after the other, for a forward without a cache (training, scoring, tests).

        `length` pads the stream with unused tokens. token_types: of each sequence's tokens.
        """
        total = sum(len(s) for s in sequences)
        length = total if length is None else length
        if length < total:
            raise ValueError(f"length {length} is less than the {total} tokens of the sequences")
        pad = np.zeros(length - total, np.int32)
        ends = np.cumsum([0, *(len(s) for s in sequences)])
        count = len(sequences)

        def packed(lists: list[list[int]]) -> jax.Array:
            return jnp.asarray(np.concatenate([*(np.asarray(s, np.int32) for s in lists), pad]))

        return ForwardBatch(
            tokens=packed(sequences),
            token_types=None if token_types is None else packed(token_types),
            positions=jnp.asarray(np.concatenate([*(np.arange(len(s), dtype=np.int32) for s in sequences), pad])),
            segment_ids=jnp.asarray(
                np.concatenate([np.repeat(np.arange(count, dtype=np.int32), np.diff(ends)), pad + max(count - 1, 0)])
            ),
            cu_q_lens=jnp.asarray(ends.astype(np.int32)),
            kv_lens=jnp.asarray(np.diff(ends).astype(np.int32)),
            tables=(),
            distribution=jnp.asarray(np.array([0, count, count], np.int32)),
        )
