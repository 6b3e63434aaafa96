"""What can attend to keys and values in pages: implementations that keep them as suits them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import LayerCache


@dataclass(frozen=True)
class AttentionCase:
    """What a backend is to be for.

    num_kv_heads: of all devices together.
    head_dim: of queries, keys and values.
    queries: query heads that have one key/value head.
    parts: over how many devices the key/value heads are split.
    dtype: of activations.
    kept: the cache's dtype.
    device: one of them.
    sinks: heads have one, see `attend`.
    """

    num_kv_heads: int
    head_dim: int
    queries: int
    parts: int
    dtype: np.dtype[Any]
    kept: np.dtype[Any]
    device: jax.Device
    sinks: bool = False


class AttentionBackend(ABC):
    """Keeps and reads keys and values of layers that are alike: which one is chosen once, when an engine is configured
    (`backends.py`), never at a call.

    name: in words.
    platform: of the devices that it is for; None: of all.
    asked: the values of option `attention` with which it may be taken.
    partition_spec: of the pool's arrays over a mesh.
    """

    name: ClassVar[str]
    platform: ClassVar[str | None] = None
    asked: ClassVar[frozenset[str]]
    partition_spec: ClassVar[PartitionSpec]

    @abstractmethod
    def supports(self, case: AttentionCase) -> str | None:
        """Why it can't be used for that, or None."""

    def refusal(self, case: AttentionCase) -> str | None:
        """Why a quantized cache that was asked for is not to be had, though this is what attends; or None."""
        return None

    def kept_heads(self, case: AttentionCase) -> tuple[int, int]:
        """How many key/value heads the cache has, of all devices together, and of what size: both with padding."""
        return case.num_kv_heads, case.head_dim

    @abstractmethod
    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> LayerCache:
        """One layer's pool as abstract arrays (`jax.ShapeDtypeStruct`), over all devices that split the heads."""

    @abstractmethod
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pools: LayerCache, batch: ForwardBatch, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """See `attend`. What supports cases with sinks takes them, too, as `sinks`."""
