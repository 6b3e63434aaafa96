"""Plain XLA on TPUs: where the kernels for them can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.tpu import LANES
from jaxinfer.attention.xla import Pages, XLAAttention, attend_split, write_split
from jaxinfer.cache import LayerCache


class XLAAttentionOnTPU(XLAAttention):
    """Head sizes are padded to 128, and each head is written by itself: of other shapes, and of all heads of a token at
    once, the compiler makes a copy of the pool in each call."""

    name = "plain XLA on TPUs"
    platform = "tpu"
    # On v6e scatters of some sizes are for a part of the chip whose compiler overflows its stack (libtpu 0.0.42).
    compiler_options: ClassVar[Mapping[str, str]] = {"xla_tpu_enable_offloading_scatter_to_sparsecore": "false"}

    def supports(self, case: AttentionCase) -> str | None:
        return None if case.device.platform == "tpu" else f"it is for TPUs, and this is {case.device.platform}"

    def kept_heads(self, case: AttentionCase) -> tuple[int, int]:
        return case.num_kv_heads, -(-case.head_dim // LANES) * LANES

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
        head_dim, pages = q.shape[-1], cast(Pages, pools)
        more = (0, 0), (0, 0), (0, pages.k.shape[-1] - head_dim)
        q, k, v = (jnp.pad(x, more) for x in (q, k, v))
        pages = write_split(k, v, pages, batch, spec, by_rows=True)
        return attend_split(q, pages, batch, spec, sinks)[..., :head_dim], pages


XLA_ON_TPU = XLAAttentionOnTPU()
