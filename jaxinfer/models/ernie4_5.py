"""ERNIE 4.5, dense (Baidu, 2025): Llama's layer, whose heads' dimensions turn in pairs."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> DecoderConfig:
    """`use_bias` covers all projections."""
    bias = fields.boolean("use_bias", False)
    return decoder_config(
        fields.with_defaults(max_position_embeddings=131072, rope_theta=500000.0),
        default_kv_heads=2,
        default_head_dim=128,
        default_tied=True,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        interleaved=True,
    )


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
