"""Qwen1.5-MoE and Qwen2-57B-A14B (arXiv:2407.10671): Qwen2's attention; experts, and an MLP that all tokens take, times
a gate."""

from __future__ import annotations

from jaxinfer.models.config import FULL, SLIDING, ConfigReader, layer_types_of, typed_windows
from jaxinfer.models.decoder import decoder_config, num_layers
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, moe_config, routing_of, sparse_layers
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> MoeConfig:
    """Of the first `max_window_layers` layers every other one slides, if `use_sliding_window`."""
    layers = num_layers(fields)
    most = fields.integer("max_window_layers", 28, minimum=0)
    windows: tuple[int | None, ...] = (None,) * layers
    if fields.boolean("use_sliding_window", False):
        windows = typed_windows(fields, layer_types_of(fields, layers, lambda i: i % 2 == 1 or i >= most))
    elif SLIDING in layer_types_of(fields, layers):
        raise fields.error("layer_types", f"without use_sliding_window there is only {FULL}")
    base = decoder_config(fields, windows=windows, default_kv_heads=16, qkv_bias=fields.boolean("qkv_bias", True))
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 60), 4, normalized=fields.boolean("norm_topk_prob", False)),
        expert_size=fields.integer("moe_intermediate_size", 1408),
        sparse=sparse_layers(fields, layers),
        shared_size=fields.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )


ARCHITECTURE = Architecture(parse, MoeForCausalLM, experts_apart())
