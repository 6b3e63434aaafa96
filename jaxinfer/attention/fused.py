"""Attention on TPUs by tokamax's ragged paged attention kernel (Pallas), which also writes keys and values.

Where tokamax is installed; elsewhere it is JAX's (`tpu.py`), and what was checked is the same: that it compiles, and
what it is called with, by its own reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.attention.batch import Batch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import FusedPages


def attend_fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: FusedPages,
    batch: Batch,
    spec: AttentionSpec,
    kernel: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[jax.Array, FusedPages]:
    """See `attend`; padding tokens give zeros. kernel: tokamax's, or one that does the same."""
    used = batch.kv_len > 0
    # It writes for every row that it is told of: those that have stopped write where nobody reads, page 0.
    lengths = jnp.maximum(batch.kv_len, jnp.diff(batch.q_start))
    pages = jnp.where(used[:, None], batch.pages, 0)
    decoding, _, count = batch.rows
    out, kv = (kernel or _kernel)(
        q,
        k.astype(cache.kv.dtype),
        v.astype(cache.kv.dtype),
        cache.kv,
        lengths,
        pages.reshape(-1),
        batch.q_start,
        jnp.stack([decoding, decoding, count]),  # the rest are rows of any number of tokens
        sm_scale=spec.scale,
        sliding_window=spec.window,
    )
    live = (jnp.arange(q.shape[0], dtype=jnp.int32) < batch.q_start[-1]) & used[batch.row]
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
