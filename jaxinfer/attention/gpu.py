"""Attention on NVIDIA GPUs by a kernel of our own (`gpu_kernel.py`): where it can be used, and how pages are kept."""

from __future__ import annotations

from typing import cast

import jax
from jax.sharding import PartitionSpec

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import HeadMajorPages, LayerCache
from jaxinfer.sharding import KV, ROWS, compute_capability

AMPERE = 8.0  # the compute capability that Triton in JAX begins with
HEADS = (16, 32, 64, 128, 256)  # Triton's arrays are powers of two


class GPUAttention(AttentionBackend):
    """Pages as plain XLA has them, in their own dtype; asked for by name, as nobody has seen it run."""

    name = "a Triton kernel"
    platform = "gpu"
    asked = frozenset({"pallas"})
    partition_spec = PartitionSpec(ROWS, KV)

    def supports(self, case: AttentionCase) -> str | None:
        device, capability = case.device, compute_capability(case.device)
        if capability is None or capability < AMPERE:
            here = device.platform if capability is None else f"a GPU of {capability}"
            return (
                f"kernels are for TPUs and for NVIDIA GPUs of compute capability {AMPERE} and more, and this is {here}"
            )
        if case.sinks:
            return "the kernel for GPUs knows no attention sinks, which the model has"
        if case.dtype.itemsize != 2:
            return f"the kernel for GPUs is for bfloat16 and float16, and dtype is {case.dtype}"
        if case.head_dim not in HEADS:
            sizes = ", ".join(map(str, HEADS))
            return f"the kernel for GPUs is for head sizes {sizes}, and the model has {case.head_dim}"
        return None

    def refusal(self, case: AttentionCase) -> str | None:
        return "on GPUs only attention='xla' reads such a cache" if case.kept != case.dtype else None

    def init_cache(self, case: AttentionCase, num_pages: int, page_size: int) -> HeadMajorPages:
        pool = jax.ShapeDtypeStruct((num_pages, case.num_kv_heads, page_size, case.head_dim), case.kept)
        return HeadMajorPages(pool, pool)  # type: ignore[arg-type]

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pools: LayerCache, batch: ForwardBatch, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        from jaxinfer.attention.gpu_kernel import attend_in_place  # imports Pallas, which takes its time

        return attend_in_place(q, k, v, cast(HeadMajorPages, pools), batch, spec)


GPU = GPUAttention()
