"""Mixtral (Jiang et al., arXiv:2401.04088): Mistral's layer, of whose eight experts each token takes two."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, windows_of
from jaxinfer.models.decoder import decoder_config, num_layers
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, moe_config, routing_of
from jaxinfer.models.registry import Architecture

NAMES = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


def parse(fields: ConfigReader) -> MoeConfig:
    """`sliding_window` is null in most; `router_jitter_noise` is for training."""
    fields = fields.with_defaults(rope_theta=1e6)
    fields.refuse("layer_types")
    layers = num_layers(fields)
    window = None if fields.data.get("sliding_window") is None else fields.integer("sliding_window")
    base = decoder_config(
        fields,
        windows=windows_of(fields, layers, window),
        default_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
    )
    return moe_config(
        base,
        routing=routing_of(fields, ("num_local_experts", 8), 2, normalized=True),
        expert_size=base.intermediate_size,
        sparse=(True,) * layers,
    )


ARCHITECTURE = Architecture(parse, MoeForCausalLM, experts_apart(NAMES))
