"""How the caches of a model's layers are kept on a device or a mesh: groups of layers, backends, arrays, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.backends import choose, in_words
from jaxinfer.attention.batch import LayerMap
from jaxinfer.cache import Cache, CacheGroup, KVCacheSpec, LayerCache, Pool, group_layers
from jaxinfer.sharding import KV, ROWS, axis_size, devices_of

PAGE = 128  # tokens of one, where bytes of a token are to be counted
TYPICAL = 4096  # tokens of a sequence, or fewer where the longest is shorter: for such ones pools run out together


@dataclass(frozen=True)
class LayerLayout:
    """How one layer's cache is kept.

    spec: what it keeps of a sequence.
    dtype: of what is kept.
    placement: the device that has it, or the mesh.
    backend, case: what attends, and what it is to be for; None where the layer itself does.
    attention: the option.
    """

    spec: KVCacheSpec
    dtype: np.dtype[Any]
    placement: jax.Device | Mesh
    backend: AttentionBackend | None
    case: AttentionCase | None
    attention: str

    @classmethod
    def of(
        cls,
        spec: KVCacheSpec,
        dtype: DTypeLike,
        placement: jax.Device | Mesh,
        attention: str = "auto",
        kv_cache_dtype: str = "auto",
        weight_dtype: DTypeLike | None = None,
    ) -> LayerLayout:
        """What suits the spec there. dtype: of activations; weight_dtype: None is `dtype`. Raises ValueError: see
        `choose`.

        Heads that a mesh can't split evenly are kept several times, with fewer queries each: `attend` repeats them."""
        compute, heads = jnp.dtype(dtype), spec.heads
        kept = spec.kept(compute, compute if weight_dtype is None else jnp.dtype(weight_dtype), kv_cache_dtype)
        if heads is None:
            return cls(spec, kept, placement, None, None, attention)
        (num_kv_heads, head_dim, queries), parts = heads, axis_size(placement, (KV,))
        times = math.lcm(num_kv_heads, parts) // num_kv_heads
        split = num_kv_heads * times, head_dim, max(queries // times, 1)
        case = AttentionCase(*split, parts, compute, kept, devices_of(placement)[0], spec.sinks)
        return cls(spec, kept, placement, choose(case, attention, kv_cache_dtype), case, attention)

    @property
    def kept_heads(self) -> tuple[int, int]:
        """Key/value heads of all parts together and their size, both with padding; none where no backend attends."""
        return self.backend.kept_heads(self.case) if self.backend and self.case else (0, 0)

    @property
    def name(self) -> str:
        """What attends, or else what is kept."""
        return self.backend.name if self.backend else type(self.spec).__name__

    @property
    def in_words(self) -> str:
        """What attends, and where that is plain XLA, why."""
        return in_words(self.backend, self.case, self.attention) if self.backend and self.case else self.name

    @property
    def geometry(self) -> Any:
        """Equal where the same arrays can serve."""
        leaves, tree = jax.tree.flatten(self.arrays(2, 16))
        return tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves), self.backend

    def arrays(self, count: int, page_size: int) -> LayerCache:
        """One layer's, abstractly: so many pages, or slots, of each shard of rows."""
        count *= axis_size(self.placement, ROWS)
        specs = self.spec.partition_spec
        if self.backend is None or self.case is None:
            tree = self.spec.init_cache(self.dtype, count, page_size)
        else:
            tree, specs = self.backend.init_cache(self.case, count, page_size), self.backend.partition_spec

        def split(spec: PartitionSpec, arrays: Any) -> Any:
            mesh = self.placement if isinstance(self.placement, Mesh) else None
            held = SingleDeviceSharding(self.placement) if mesh is None else NamedSharding(mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held), arrays)

        return jax.tree.map(split, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))

    @property
    def bytes_per_token(self) -> int:
        """On each device."""
        return self.nbytes(PAGE) // PAGE

    def nbytes(self, page_size: int) -> int:
        """Of a page, or a slot, on each device."""
        arrays = jax.tree.leaves(self.arrays(1, page_size))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


@dataclass(frozen=True)
class CacheLayout:
    """How the caches of all layers are kept.

    layers: of each; None of those that keep nothing.
    groups: of layers that share a page table, or slots.
    pools: of pages that groups share.
    shared: layers that keep nothing of their own, and of each, which one's cache it reads.

    Sizes that methods take: page_size, tokens a page; reach, the most tokens of a sequence that a call writes; rows,
    sequences that run at once on a shard of rows, and others whose states are kept; num_pages of the first pool, page 0
    among them, from which those of others follow (`counts`).
    """

    layers: tuple[LayerLayout | None, ...]
    groups: tuple[CacheGroup, ...]
    pools: tuple[Pool, ...]
    shared: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls, layers: Sequence[LayerLayout | None], max_context: int, shared: tuple[tuple[int, int], ...] = ()
    ) -> CacheLayout:
        """Of these layers; a window or chunk as wide as the longest context is none. Raises ValueError where nothing is
        kept."""
        if not any(layers):
            raise ValueError(
                "no layer of the model keeps anything of a sequence, and jaxinfer generates with models that do: "
                "its config.json must have a layer of attention or with a state"
            )

        def narrow(width: int | None) -> int | None:
            return width if (width or max_context) < max_context else None

        kinds = [
            (layer.geometry, (narrow(layer.spec.window), narrow(layer.spec.chunk)), layer.spec.paged) if layer else None
            for layer in layers
        ]
        return cls(tuple(layers), *group_layers(kinds), shared)

    def of_group(self, group: CacheGroup) -> LayerLayout:
        """How its layers are kept."""
        layer = self.layers[group.layers[0]]
        assert layer is not None
        return layer

    @property
    def paged(self) -> bool:
        """Whether all groups have pages, and none has slots."""
        return all(group.pool is not None for group in self.groups)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what the first group keeps."""
        return self.of_group(self.groups[0]).dtype

    @property
    def names(self) -> list[str]:
        """What attends to each group."""
        return [self.of_group(group).name for group in self.groups]

    @property
    def in_words(self) -> str:
        """What attends, and where that is plain XLA, why."""
        return "; ".join(dict.fromkeys(self.of_group(group).in_words for group in self.groups))

    @property
    def chunk(self) -> int:
        """What pages have to divide: of the chunks of all groups the greatest common divisor; 0: there are none."""
        return math.gcd(*(group.chunk or 0 for group in self.groups))

    @property
    def bytes_per_token(self) -> int:
        """Of cache on each device that one token takes in all layers that see it."""
        return sum(
            len(group.layers) * self.of_group(group).bytes_per_token for group in self.groups if group.pool is not None
        )

    def layer_map(self, page_size: int) -> LayerMap:
        """For batches."""
        places: list[tuple[int, int] | None] = [None] * len(self.layers)
        for i, group in enumerate(self.groups):
            for layer, array in zip(group.layers, group.arrays, strict=True):
                places[layer] = array, i
        for layer, owner in self.shared:
            places[layer] = places[owner]
        return LayerMap(tuple(places), tuple(self.of_group(group).backend for group in self.groups), page_size)

    def readers(self, group: CacheGroup) -> int:
        """How many layers read what a group keeps."""
        return len(group.layers) + sum(owner in group.layers for _, owner in self.shared)

    def page_bytes(self, page_size: int) -> tuple[int, ...]:
        """Of a page of each pool on each device."""
        return tuple(pool.size * layer.nbytes(page_size) for pool in self.pools if (layer := self.layers[pool.layer]))

    @property
    def slot_bytes(self) -> int:
        """Of what a sequence keeps beside pages, on each device."""
        return sum(len(group.layers) * self.of_group(group).nbytes(1) for group in self.groups if group.pool is None)

    def needed(self, tokens: int, page_size: int, reach: int) -> tuple[int, ...]:
        """Most pages of each pool that a sequence of so many tokens holds at once."""
        most = [(group.pool, group.most_pages(tokens, page_size, reach)) for group in self.groups]
        return tuple(sum(pages for pool, pages in most if pool == i) for i in range(len(self.pools)))

    def counts(self, num_pages: int, page_size: int, reach: int, longest: int) -> tuple[int, ...]:
        """Pages of each pool: divided so that sequences of TYPICAL length use all of them up at once, and each has room
        for one of `longest` tokens."""
        if len(self.pools) <= 1:
            return (num_pages,) * len(self.pools)
        first, *_ = typical = self.needed(min(TYPICAL, longest), page_size, reach)
        least = self.needed(longest, page_size, reach)
        return tuple(
            max(math.ceil(Fraction((num_pages - 1) * pages, first)), minimum) + 1 if i else num_pages
            for i, (pages, minimum) in enumerate(zip(typical, least, strict=True))
        )

    def nbytes(self, num_pages: int, page_size: int, reach: int, longest: int, rows: int) -> int:
        """On each device."""
        counts = self.counts(num_pages, page_size, reach, longest)
        pages = sum(n * each for n, each in zip(counts, self.page_bytes(page_size), strict=True))
        return pages + self.slot_bytes * (rows + 1)

    def least(self, tokens: int, page_size: int, reach: int, rows: int) -> int:
        """Bytes on each device with which one sequence of so many tokens can run."""
        needed = self.needed(tokens, page_size, reach)
        pages = sum((n + 1) * each for n, each in zip(needed, self.page_bytes(page_size), strict=True))
        return pages + self.slot_bytes * (rows + 1)

    def arrays(self, counts: Sequence[int], page_size: int, rows: int) -> Cache:
        """All arrays, abstractly: so many pages of each pool, and slots for `rows` sequences and nobody."""
        caches: list[LayerCache] = []
        for count, pool in zip(counts, self.pools, strict=True):
            if layer := self.layers[pool.layer]:
                caches += [layer.arrays(count, page_size)] * pool.size
        for group in self.groups:
            if group.pool is None:
                caches += [self.of_group(group).arrays(rows + 1, page_size)] * len(group.layers)
        return tuple(caches)

    def capacity(self, counts: Sequence[int], context: int, page_size: int, steps: int) -> int:
        """Tokens of context that there is room for, in sequences that decode and have so many each."""
        pages = -(-context // page_size)
        needed = self.needed(context, page_size, steps)
        return min((count - 1) * pages * page_size // most for count, most in zip(counts, needed, strict=True))
