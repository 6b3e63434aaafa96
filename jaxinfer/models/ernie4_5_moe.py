"""ERNIE 4.5 with experts (Baidu, 2025): ERNIE's attention; a bias for the choice, and an MLP that all tokens take."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.layers.router import Routing
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.ernie4_5 import parse as parse_dense
from jaxinfer.models.glm4_moe import NAMES
from jaxinfer.models.moe import MAX_EXPERTS, MoeConfig, MoeForCausalLM, experts_apart, moe_config
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Row, Source, Tensor
from jaxinfer.models.weights import ParamMapping


def parse(fields: ConfigReader) -> MoeConfig:
    """`use_bias` covers all projections, also the head, but not those of experts. Of the layers from
    `moe_layer_start_index` to `moe_layer_end_index` each `moe_layer_interval`-th has experts."""
    bias = fields.boolean("use_bias", False)
    base = replace(parse_dense(fields, kv_heads=4, head_dim=None), head_bias=bias)
    if bias and base.tie_word_embeddings:
        raise fields.error("use_bias", "a head that is the embedding (tie_word_embeddings) has no bias here")
    first, last = fields.integer("moe_layer_start_index", 1, minimum=0), fields.integer("moe_layer_end_index", -1, -1)
    every = fields.integer("moe_layer_interval", 1)
    last = base.num_layers - 1 if last == -1 else last
    experts = fields.integer("moe_num_experts", 64, maximum=MAX_EXPERTS)
    chosen = fields.integer("moe_k", 6)
    if chosen > experts:
        raise fields.error("moe_k", f"it must be at most {fields.named('moe_num_experts')}")
    size = fields.integer("moe_intermediate_size", 1536)
    least = fields.number("moe_norm_min", 1e-12)
    return moe_config(
        base,
        routing=Routing(experts, chosen, bias=True, normalized=True, least_sum=least),
        expert_size=size,
        sparse=tuple((i + 1) % every == 0 and first <= i <= last for i in range(base.num_layers)),
        shared_size=size * fields.integer("moe_num_shared_experts", 2, minimum=0),
    )


def weights(config: ModelConfig) -> ParamMapping:
    """The bias is a matrix of one row. Layers that predict more than the next token are called mtp."""
    mapping = experts_apart(NAMES)(config)

    def source(name: str) -> Source:
        if name.endswith(".mlp.gate.e_score_correction_bias"):
            return Row(Tensor(name.replace(".gate.", ".moe_statics.")))
        return mapping.source(name)

    return replace(mapping, source=source, ignored=(*mapping.ignored, r"mtp_.*"))


ARCHITECTURE = Architecture(parse, MoeForCausalLM, weights)
