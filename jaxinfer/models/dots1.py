"""dots.llm1 (arXiv:2506.05767): Qwen3's attention; DeepSeek-V3's router, and an MLP that all tokens take."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, sliding_window, windows_of
from jaxinfer.models.decoder import decoder_config, num_layers
from jaxinfer.models.glm4_moe import NAMES, with_experts
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections. Layers from `max_window_layers` on slide."""
    fields = fields.with_defaults(first_k_dense_replace=0)
    first = fields.integer("max_window_layers", 62, minimum=0)
    bias = fields.boolean("attention_bias", False)
    base = decoder_config(
        fields,
        windows=windows_of(fields, num_layers(fields), sliding_window(fields), first=first),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    return with_experts(fields, base)


ARCHITECTURE = Architecture(parse, MoeForCausalLM, experts_apart(NAMES))
