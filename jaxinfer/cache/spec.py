"""What layers keep of each sequence: declared by the module that owns a cache, as its attribute `cache_spec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.cache.pages import KV_DTYPES, LayerCache
from jaxinfer.sharding import ROWS, TENSOR


class KVCacheSpec(ABC):
    """Frozen, and equal where layers keep the same: those form groups, each with a page table, or slots, of its own.

    paged: it keeps pages of tokens; else one slot a sequence.
    window: how many tokens a query sees, its own the last of them, so that pages with older ones can be used again;
        None: all.
    chunk: a query sees those of its own chunk of so many, and older chunks' pages can be used again; None: all.
    sinks: its heads have one, see `attend`; backends ask.
    owner: it is nothing of the layer's own: it reads what the layer of this number, before it, has written in the same
        step; None: it is.
    """

    paged: ClassVar[bool] = True
    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    owner: int | None = None

    @property
    def partition_spec(self) -> PartitionSpec | tuple[PartitionSpec, ...]:
        """How a mesh splits the arrays, one for all or a tree of them; pages and slots come first, and are split over
        ROWS."""
        return PartitionSpec(ROWS)

    @property
    def heads(self) -> tuple[int, int, int] | None:
        """Key/value heads, their size, and query heads that have one of them, where an AttentionBackend attends to them
        and lays the arrays out; None: the layer itself writes and reads those of `init_cache`."""
        return None

    def kept(self, dtype: np.dtype[Any], weight_dtype: np.dtype[Any], kv_cache_dtype: str) -> np.dtype[Any]:
        """The dtype that it is kept in. dtype: of activations; kv_cache_dtype: see EngineConfig. Raises ValueError."""
        if kv_cache_dtype not in ("auto", dtype.name) and self.paged:
            raise ValueError(
                f"kv_cache_dtype is {kv_cache_dtype!r}: what this model keeps can't be in it; leave it out"
            )
        return dtype

    @abstractmethod
    def init_cache(self, dtype: np.dtype[Any], count: int, page_size: int) -> LayerCache:
        """One layer's arrays, abstractly: `count` pages of `page_size` tokens each, or `count` slots."""


@dataclass(frozen=True)
class FullAttentionSpec(KVCacheSpec):
    """Keys and values of all tokens.

    num_kv_heads, head_dim: of K heads, each of that size.
    queries: query heads that have one of them; backends ask.
    """

    num_kv_heads: int
    head_dim: int
    queries: int = field(default=1, compare=False, kw_only=True)
    sinks: bool = field(default=False, kw_only=True)

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.head_dim, self.queries

    def kept(self, dtype: np.dtype[Any], weight_dtype: np.dtype[Any], kv_cache_dtype: str) -> np.dtype[Any]:
        return KV_DTYPES.get(kv_cache_dtype, weight_dtype)

    def init_cache(self, dtype: np.dtype[Any], count: int, page_size: int) -> LayerCache:
        raise NotImplementedError("the backend that attends lays it out")


@dataclass(frozen=True)
class SlidingWindowSpec(FullAttentionSpec):
    """The same of the last tokens.

    window: so many of them.
    """

    window: int


@dataclass(frozen=True)
class ChunkedSpec(FullAttentionSpec):
    """The same of the tokens of a sequence's last chunk.

    chunk: so many at most.
    """

    chunk: int


@dataclass(frozen=True)
class SharedSpec(KVCacheSpec):
    """What another layer keeps.

    owner: which one.
    """

    owner: int

    def init_cache(self, dtype: np.dtype[Any], count: int, page_size: int) -> LayerCache:
        raise NotImplementedError("its owner has it")


def attention_spec(
    num_kv_heads: int, head_dim: int, window: int | None, queries: int, chunk: int | None = None, sinks: bool = False
) -> FullAttentionSpec:
    """That of an attention layer, which sees all without window and chunk."""
    if chunk is not None:
        return ChunkedSpec(num_kv_heads, head_dim, chunk, queries=queries, sinks=sinks)
    if window is None:
        return FullAttentionSpec(num_kv_heads, head_dim, queries=queries, sinks=sinks)
    return SlidingWindowSpec(num_kv_heads, head_dim, window, queries=queries, sinks=sinks)


@dataclass(frozen=True)
class LatentSpec(KVCacheSpec):
    """One vector a token, of which keys and values of all heads are made: multi-head latent attention (DeepSeek-V2,
    arXiv:2405.04434). Not split over heads, as each needs all of it.

    width: the vector's features.
    """

    width: int

    def init_cache(self, dtype: np.dtype[Any], count: int, page_size: int) -> LayerCache:
        return cast(jax.Array, jax.ShapeDtypeStruct((count, page_size, self.width), dtype))


def write_latents(pool: jax.Array, new: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """The pool `[pages, page_size, width]` with a vector `new [T, width]` of each token. page, offset: where, see
    `ForwardBatch.slot_mapping`."""
    return pool.at[page, offset].set(new.astype(pool.dtype))


def gather_latents(pool: jax.Array, pages: jax.Array) -> jax.Array:
    """Each row's vectors in order, `[R, P * page_size, width]`; beyond its length is what others left."""
    latents = pool.at[pages].get(mode="promise_in_bounds")
    return latents.reshape(pages.shape[0], -1, pool.shape[-1])


@dataclass(frozen=True)
class RecurrentSpec(KVCacheSpec):
    """A state a sequence.

    paged: False: it has slots.
    shapes: of the state's arrays.
    dtypes: of each; None: that of activations.
    splits: of each, which of its axes `tensor` splits; None: no axis, and no array where nothing is said.
    """

    paged: ClassVar[bool] = False
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str | None, ...] | None = None
    splits: tuple[int | None, ...] | None = None

    @property
    def partition_spec(self) -> tuple[PartitionSpec, ...]:
        axes = self.splits or (None,) * len(self.shapes)
        return tuple(PartitionSpec(ROWS, *((None,) * axis + (TENSOR,) if axis is not None else ())) for axis in axes)

    def init_cache(self, dtype: np.dtype[Any], count: int, page_size: int) -> LayerCache:
        dtypes = self.dtypes or (None,) * len(self.shapes)
        return tuple(
            cast(jax.Array, jax.ShapeDtypeStruct((count, *shape), dtype if kind is None else jnp.dtype(kind)))
            for shape, kind in zip(self.shapes, dtypes, strict=True)
        )


def read_state(states: LayerCache, slots: jax.Array, begins: jax.Array) -> LayerCache:
    """The rows' states `[R, ...]`; zeros where a sequence begins, whatever the slot's last one left."""

    def read(state: jax.Array) -> jax.Array:
        return jnp.where(begins.reshape(-1, *[1] * (state.ndim - 1)), jnp.zeros((), state.dtype), state[slots])

    return jax.tree.map(read, states)


def write_state(states: LayerCache, slots: jax.Array, new: LayerCache, live: jax.Array) -> LayerCache:
    """The states with those of the rows; rows that are not live write into the last slot, which is nobody's."""

    def write(state: jax.Array, rows: jax.Array) -> jax.Array:
        return state.at[jnp.where(live, slots, state.shape[0] - 1)].set(rows.astype(state.dtype))

    return jax.tree.map(write, states, new)
