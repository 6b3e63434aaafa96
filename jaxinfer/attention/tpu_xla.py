"""Plain XLA on TPUs: where the kernels for them can't be used."""

from __future__ import annotations

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.tpu import LANES
from jaxinfer.attention.xla import XLAAttention


class XLAAttentionOnTPU(XLAAttention):
    """Head sizes are padded to 128, and each head is written by itself: of other shapes, and of all heads of a token at
    once, the compiler makes a copy of the pool in each call."""

    name = "plain XLA on TPUs"
    platform = "tpu"
    by_rows = True

    def supports(self, case: AttentionCase) -> str | None:
        return None if case.device.platform == "tpu" else f"it is for TPUs, and this is {case.device.platform}"

    def kept_heads(self, case: AttentionCase) -> tuple[int, int]:
        return case.num_kv_heads, -(-case.head_dim // LANES) * LANES


XLA_ON_TPU = XLAAttentionOnTPU()
