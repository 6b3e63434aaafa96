"""GLM-4.5, GLM-4.6, GLM-4.7 (arXiv:2508.06471): partial rotary embeddings; DeepSeek-V3's router (arXiv:2412.19437) and
an MLP that all tokens take, behind some dense layers."""

from __future__ import annotations

from jaxinfer.models.config import MAX_LAYERS, ConfigReader
from jaxinfer.models.decoder import DecoderConfig, decoder_config
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, grouped_routing, moe_config
from jaxinfer.models.registry import Architecture

NAMES = {".shared_expert.": ".shared_experts."}


def with_experts(fields: ConfigReader, base: DecoderConfig) -> MoeConfig:
    """The layers from `first_k_dense_replace` on have them; behind those are `num_nextn_predict_layers`, as checkpoints
    call it, that predict more tokens."""
    first = fields.integer("first_k_dense_replace", minimum=0)
    size = fields.integer("moe_intermediate_size", 1408)
    return moe_config(
        base,
        routing=grouped_routing(fields),
        expert_size=size,
        sparse=tuple(i >= first for i in range(base.num_layers)),
        shared_size=size * fields.integer("n_shared_experts"),
        mtp_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS),
    )


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` is of queries, keys and values. Layers that predict more than the next token are left aside."""
    fields = fields.with_defaults(
        first_k_dense_replace=1, n_shared_experts=1, n_routed_experts=128, norm_topk_prob=True, num_experts_per_tok=8
    )
    fields = fields.with_defaults(num_nextn_predict_layers=fields.integer("num_mtp_layers", 1, minimum=0))
    base = decoder_config(
        fields,
        default_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        default_partial=0.5,
        qkv_bias=fields.boolean("attention_bias", False),
        qk_norm=fields.boolean("use_qk_norm", False),
    )
    return with_experts(fields, base)


ARCHITECTURE = Architecture(parse, MoeForCausalLM, experts_apart(NAMES))
