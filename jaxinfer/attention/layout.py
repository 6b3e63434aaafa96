"""How the cache of a model's layers is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.backends import choose, in_words
from jaxinfer.cache import KV_DTYPES, Cache
from jaxinfer.sharding import KV, axis_size, devices_of


def attention_case(
    num_kv_heads: int,
    head_dim: int,
    queries: int,
    dtype: DTypeLike,
    place: jax.Device | Mesh,
    kv_cache_dtype: str = "auto",
) -> AttentionCase:
    """What a backend is asked about. dtype: of activations; kv_cache_dtype: see LoadOptions."""
    compute = jnp.dtype(dtype)
    kept = KV_DTYPES.get(kv_cache_dtype, compute)
    parts = axis_size(place, (KV,))
    return AttentionCase(num_kv_heads, head_dim, queries, parts, compute, kept, devices_of(place)[0])


@dataclass(frozen=True)
class CacheLayout:
    """What attends to the caches of all layers, which are alike, and keeps them. attention: the option."""

    num_layers: int
    case: AttentionCase
    backend: AttentionBackend
    attention: str

    @classmethod
    def of(
        cls, num_layers: int, case: AttentionCase, attention: str = "auto", kv_cache_dtype: str = "auto"
    ) -> CacheLayout:
        """What suits the case: see `choose`, which raises ValueError."""
        return cls(num_layers, case, choose(case, attention, kv_cache_dtype), attention)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.case.kept

    @property
    def kept_heads(self) -> tuple[int, int]:
        """Key/value heads of all parts together and their size, both with padding."""
        return self.backend.kept_heads(self.case)

    @property
    def bytes_per_token(self) -> int:
        """Of cache on each device that one token of context takes in all layers together."""
        one = jax.tree.leaves(self.backend.init_cache(self.case, 1, 1))
        return self.num_layers * sum(math.prod(x.shape) * x.dtype.itemsize for x in one) // self.case.parts

    @property
    def spec(self) -> PartitionSpec:
        """How the arrays are split over a mesh."""
        return self.backend.partition_spec

    @property
    def backends(self) -> list[str]:
        """Names of what attends."""
        return [self.backend.name]

    @property
    def in_words(self) -> str:
        """What attends, and where that is plain XLA, why."""
        return in_words(self.backend, self.case, self.attention)

    def shapes(self, num_pages: int, page_size: int) -> Cache:
        """The pool as abstract arrays (`jax.ShapeDtypeStruct`), over all devices that split the heads."""
        return (self.backend.init_cache(self.case, num_pages, page_size),) * self.num_layers
