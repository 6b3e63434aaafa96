"""Attention on TPUs by tokamax's ragged paged attention kernel (Pallas), which also writes keys and values.

Where tokamax is installed; elsewhere it is JAX's (`tpu.py`), and what was checked is the same: that it compiles, and
what it is called with, by its own reference.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.tpu import LANES, TPUAttention
from jaxinfer.cache import FusedPages, LayerCache
from jaxinfer.sharding import tpu_generation

LEAST = 0, 0, 17  # the first version of tokamax that has it so


class FusedAttention(TPUAttention):
    """Pages are the same bytes."""

    name = "tokamax's ragged paged attention kernel"
    asked = frozenset({"auto", "pallas", "tokamax"})

    def supports(self, case: AttentionCase) -> str | None:
        if (problem := super().supports(case)) is not None:
            return problem
        if case.head_dim > LANES:
            return f"it is not tried with heads of more than {LANES}, and these have {case.head_dim}"
        if not case.kept == case.dtype == jnp.bfloat16:
            return f"it is for a cache in bfloat16, and this is kept as {case.kept} of {case.dtype}"
        if (tpu_generation(case.device.device_kind) or 0) < 5:
            return f"it is for v5 and later, and this is {case.device.device_kind}"
        if self.kept_heads(case)[0] != case.num_kv_heads:
            return f"it pads no heads, and {case.num_kv_heads // case.parts} on each device would have to be"
        if tokamax_version() is None:
            return "it is not installed: pip install '.[tokamax]' (Python 3.12)"
        return None

    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> FusedPages:
        heads, width = self.kept_heads(case)
        return FusedPages(jax.ShapeDtypeStruct((num_pages, page_size, heads, 2, width), case.kept))  # type: ignore[arg-type]

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pools: LayerCache, batch: ForwardBatch, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        return attend_fused(q, k, v, cast(FusedPages, pools), batch, spec)


FUSED = FusedAttention()


def tokamax_version() -> str | None:
    """None where it isn't installed, or is too old."""
    try:
        release = version("tokamax")
    except PackageNotFoundError:
        return None
    return release if tuple(map(int, re.findall(r"\d+", release)[:3])) >= LEAST else None


def attend_fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: FusedPages,
    batch: ForwardBatch,
    spec: AttentionSpec,
    kernel: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[jax.Array, FusedPages]:
    """See `attend`; padding tokens give zeros. kernel: tokamax's, or one that does the same."""
    used = batch.kv_lens > 0
    # It always writes: of a layer that doesn't, what is there already.
    # It writes for every row that it is told of: those that have stopped write where nobody reads, page 0.
    lengths = jnp.maximum(batch.kv_lens, jnp.diff(batch.cu_q_lens))
    pages = jnp.where(used[:, None], batch.pages, 0)
    decoding, _, count = batch.distribution
    out, kv = (kernel or _kernel)(
        q,
        k.astype(cache.kv.dtype),
        v.astype(cache.kv.dtype),
        cache.kv,
        lengths,
        pages.reshape(-1),
        batch.cu_q_lens,
        jnp.stack([decoding, decoding, count]),  # the rest are rows of any number of tokens
        sm_scale=spec.scale,
        sliding_window=spec.window,
        soft_cap=spec.soft_cap,
    )
    live = (jnp.arange(q.shape[0], dtype=jnp.int32) < batch.cu_q_lens[-1]) & used[batch.segment_ids]
    return jnp.where(live[:, None, None], out, jnp.zeros((), q.dtype)), FusedPages(kv)


def _kernel(*args: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    import tokamax

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # a warning for each layer, that nobody has tuned it for just these shapes
    try:
        with tokamax.config.cross_compile(True):  # or it asks the devices that are here
            return tokamax.ops.ragged_paged_attention(*args, implementation="mosaic_tpu", **options)
    finally:
        log.setLevel(level)
