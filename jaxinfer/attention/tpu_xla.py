"""Plain XLA on TPUs: where the kernels for them can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from jaxinfer.attention.backend import AttentionCase
from jaxinfer.attention.tpu import LANES
from jaxinfer.attention.xla import XLAAttention


class XLAAttentionOnTPU(XLAAttention):
    """Head sizes are padded to 128, and each head is written by itself: of other shapes, and of all heads of a token at
    once, the compiler makes a copy of the pool in each call."""

    name = "plain XLA on TPUs"
    platform = "tpu"
    by_rows = True
    # On v6e scatters of some sizes are for a part of the chip whose compiler overflows its stack (libtpu 0.0.42).
    compiler_options: ClassVar[Mapping[str, str]] = {"xla_tpu_enable_offloading_scatter_to_sparsecore": "false"}

    def supports(self, case: AttentionCase) -> str | None:
        return None if case.device.platform == "tpu" else f"it is for TPUs, and this is {case.device.platform}"

    def kept_heads(self, case: AttentionCase) -> tuple[int, int]:
        return case.num_kv_heads, -(-case.head_dim // LANES) * LANES


XLA_ON_TPU = XLAAttentionOnTPU()
