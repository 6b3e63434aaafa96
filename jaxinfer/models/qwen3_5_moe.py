"""The text model of Qwen3.5 and 3.6 with experts (Qwen, 2026): Qwen3-Next's layers, all of them with experts."""

from __future__ import annotations

from typing import Any

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.moe import MoeConfig, experts_apart, moe_config, routing_of
from jaxinfer.models.qwen2_vl import of_text
from jaxinfer.models.qwen3_5 import one_by_one, text_weights
from jaxinfer.models.qwen3_next import Qwen3NextForCausalLM, hybrid_config, mixed_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.weights import ParamMapping

DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "intermediate_size": 512,  # which no layer has
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}


def parse(fields: ConfigReader) -> MoeConfig:
    """Shares always add up to one."""
    fields.refuse("norm_topk_prob", True)
    base = hybrid_config(of_text(fields, DEFAULTS))
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 256), 8, normalized=True),
        expert_size=fields.integer("moe_intermediate_size", 512),
        sparse=(True,) * base.num_layers,
        shared_size=fields.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are stacked, or one by one."""
    return text_weights(mixed_weights(experts_apart(), one_by_one)(config))


ARCHITECTURE = Architecture(parse, Qwen3NextForCausalLM, weights)
