"""The text model of Qwen3-VL-30B-A3B and Qwen3-VL-235B-A22B (arXiv:2511.21631): Qwen3-VL's attention, and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.moe import (
    STACKED,
    MoeConfig,
    MoeForCausalLM,
    experts_apart,
    moe_config,
    packed,
    routing_of,
    sparse_layers,
)
from jaxinfer.models.qwen3_vl import parse as parse_dense
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import OneOf, Source
from jaxinfer.models.weights import ParamMapping

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}


def parse(fields: ConfigReader) -> MoeConfig:
    """Shares add up to one, whatever version of transformers has read `norm_topk_prob`."""
    fields.refuse("norm_topk_prob", True)
    base = parse_dense(fields, DEFAULTS, None)
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 60), 4, normalized=True),
        expert_size=fields.integer("moe_intermediate_size", 1408),
        sparse=sparse_layers(fields, base.num_layers),
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are stacked `[E, in, out]`, gates and ups in one tensor; `[E, out, in]` as transformers 5 writes them.
    Where in and out are equal nothing tells which it is, and transformers takes it for its own."""
    assert isinstance(config, MoeConfig)
    mapping, size, hidden = experts_apart()(config), config.expert_size, config.hidden_size

    def source(name: str) -> Source:
        usual = mapping.source(name)
        if (match := STACKED.fullmatch(name)) is None:
            return usual
        turned = packed(match[1], match[2], size, turned=True)
        is_square = hidden == (size if match[2] == "down_proj" else 2 * size)
        return OneOf((usual, turned) if is_square else (turned, usual))

    return replace(mapping, source=source)


ARCHITECTURE = Architecture(parse, MoeForCausalLM, weights)
