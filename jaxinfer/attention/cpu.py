"""Attention on CPUs that reads pages in place, by the native kernels. Pages are as plain XLA has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.xla import Pages, XLAAttention
from jaxinfer.kernels.cpu import attention


class CPUAttention(XLAAttention):
    """Writes as plain XLA does, and reads by a kernel."""

    name = "a CPU kernel"
    platform = "cpu"

    def supports(self, case: AttentionCase) -> str | None:
        if case.device.platform != "cpu":
            return f"it is for CPUs, and this is {case.device.platform}"
        return attention.attention_problem(case.dtype.name, case.head_dim, case.queries, case.kept.name)

    def read(
        self, q: jax.Array, pools: Pages, batch: ForwardBatch, spec: AttentionSpec, sinks: jax.Array | None
    ) -> jax.Array:
        used = jnp.arange(batch.kv_lens.shape[0], dtype=jnp.int32) < batch.distribution[1]
        kv_lens = jnp.where(used, batch.kv_lens, 0)
        how = spec.scale, spec.window, spec.soft_cap, sinks
        return attention.attend(q, pools, batch.cu_q_lens, kv_lens, batch.pages, *how)


CPU = CPUAttention()
