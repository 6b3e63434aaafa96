"""MiniMax-M2 and M2.1 (MiniMax, 2025): norms of queries and keys are over all heads, half of whose dimensions turn; a
router of sigmoids with a bias for the choice."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import decoder_config
from jaxinfer.models.mixtral import NAMES as EXPERTS
from jaxinfer.models.moe import MoeConfig, experts_apart, moe_config, routing_of
from jaxinfer.models.olmoe import OlmoeForCausalLM
from jaxinfer.models.registry import Architecture

# What checkpoints call it.
NAMES = {".mlp.gate.e_score_correction_bias": ".block_sparse_moe.e_score_correction_bias", **EXPERTS}


def parse(fields: ConfigReader) -> MoeConfig:
    """`rotary_dim` says how many of a head's dimensions turn, where `partial_rotary_factor` does not."""
    fields = fields.with_defaults(rope_theta=5e6, head_dim=128)
    if fields.data.get("rotary_dim") is not None:
        turning, size = fields.integer("rotary_dim"), fields.integer("head_dim")
        if turning > size or turning % 2:
            raise fields.error("rotary_dim", f"it must be an even number, at most {fields.named('head_dim')}")
        fields = fields.with_absent(partial_rotary_factor=turning / size)
    base = decoder_config(fields, default_kv_heads=8, default_partial=1.0, qk_norm=True)
    return moe_config(
        base,
        routing=routing_of(fields, ("num_local_experts", 256), 8, scores="sigmoid", bias=True, normalized=True),
        expert_size=base.intermediate_size,
        sparse=(True,) * base.num_layers,
    )


ARCHITECTURE = Architecture(parse, OlmoeForCausalLM, experts_apart(NAMES))
