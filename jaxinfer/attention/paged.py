"""Attention on TPUs by a kernel of our own (`paged_kernel.py`): where it can be used, and how pages are kept."""

from __future__ import annotations

from typing import cast

import jax
from jax.sharding import PartitionSpec

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.tpu import LANES, SUBLANES, elsewhere, tile_rows
from jaxinfer.cache import SCALE, LayerCache, QuantizedRowPages, RowPages
from jaxinfer.sharding import KV, ROWS


class PagedAttention(AttentionBackend):
    """Heads of any size and number, of which none is padded; caches in 8 bits with a scale for each token and head."""

    name = "jaxinfer's ragged paged attention kernel"
    platform = "tpu"
    asked = frozenset({"auto", "pallas", "paged"})
    partition_spec = PartitionSpec(ROWS, KV)

    def supports(self, case: AttentionCase) -> str | None:
        return elsewhere(case)

    def refusal(self, case: AttentionCase) -> str | None:
        if case.kept == case.dtype or case.kept.itemsize == 1:
            return None
        return f"the kernel for TPUs reads a cache in {case.dtype}, int8 or fp8; take one of these, or attention='xla'"

    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> LayerCache:
        if page_size < SUBLANES or page_size & (page_size - 1):
            raise ValueError(
                f"page_size is {page_size}: the kernel for TPUs takes powers of 2 from {SUBLANES} on; leave it out"
            )
        heads = case.num_kv_heads // case.parts
        shape = num_pages, columns(heads, case.head_dim) * case.parts, page_size, LANES
        kv = jax.ShapeDtypeStruct(shape, case.kept)
        if case.kept == case.dtype:
            return RowPages(kv)  # type: ignore[arg-type]
        scales = jax.ShapeDtypeStruct((num_pages, scale_rows(heads, page_size) * case.parts, LANES), SCALE)
        return QuantizedRowPages(kv, scales)  # type: ignore[arg-type]

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pools: LayerCache,
        batch: ForwardBatch,
        spec: AttentionSpec,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        from jaxinfer.attention.paged_kernel import Pages, attend_rows_in_place  # imports Pallas, which takes its time

        return attend_rows_in_place(q, k, v, cast(Pages, pools), batch, spec, sinks)


PAGED = PagedAttention()


def columns(kv_heads: int, head_dim: int) -> int:
    """Of a token's row, LANES each."""
    return -(-2 * kv_heads * head_dim // LANES)


def scale_rows(kv_heads: int, page_size: int) -> int:
    """Rows of LANES scales that a page has: what fills tiles of two rows at least. Of one the compiler makes a copy of
    the pool in each call."""
    return max(tile_rows(-(-2 * kv_heads * page_size // LANES)), 2)
