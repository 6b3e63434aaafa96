"""Attention on CPUs that reads pages in place, by the native kernels. Pages are as plain XLA has them."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.xla import Pages, XLAAttention, write_split
from jaxinfer.cache import LayerCache
from jaxinfer.kernels import cpu


class CPUAttention(XLAAttention):
    """Writes as plain XLA does, and reads by a kernel."""

    name = "a CPU kernel"
    platform = "cpu"

    def supports(self, case: AttentionCase) -> str | None:
        if case.device.platform != "cpu":
            return f"it is for CPUs, and this is {case.device.platform}"
        return cpu.attention_problem(case.dtype.name, case.head_dim, case.queries, case.kept.name)

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
        pools = write_split(k, v, cast(Pages, pools), batch, spec)
        used = jnp.arange(batch.kv_lens.shape[0], dtype=jnp.int32) < batch.distribution[1]
        kv_lens = jnp.where(used, batch.kv_lens, 0)
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
        how = spec.scale, spec.window, spec.soft_cap
        out = cpu.attend(grouped, pools, batch.cu_q_lens, kv_lens, batch.pages, *how, sinks)
        return out.reshape(q.shape), pools


CPU = CPUAttention()
