"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder (arXiv:2505.09388): Qwen3's attention, and experts, none shared."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, sliding_window, windows_of
from jaxinfer.models.decoder import decoder_config, num_layers
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, moe_config, routing_of, sparse_layers
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections; all layers slide, if `use_sliding_window`."""
    fields.refuse("layer_types")
    layers = num_layers(fields)
    window = sliding_window(fields) if fields.boolean("use_sliding_window", False) else None
    bias = fields.boolean("attention_bias", False)
    base = decoder_config(
        fields,
        windows=windows_of(fields, layers, window),
        default_kv_heads=4,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 128), 8, normalized=fields.boolean("norm_topk_prob", False)),
        expert_size=fields.integer("moe_intermediate_size", 768),
        sparse=sparse_layers(fields, layers),
    )


ARCHITECTURE = Architecture(parse, MoeForCausalLM, experts_apart())
