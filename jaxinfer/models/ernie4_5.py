"""ERNIE 4.5, dense (Baidu, 2025): Llama's layer, whose heads' dimensions turn in pairs."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader, kv_heads: int = 2, head_dim: int | None = 128) -> DecoderConfig:
    """`use_bias` covers all projections. kv_heads, head_dim: where the fields are absent, see `decoder_config`."""
    bias = fields.boolean("use_bias", False)
    return decoder_config(
        fields.with_defaults(max_position_embeddings=131072, rope_theta=500000.0),
        default_kv_heads=kv_heads,
        default_head_dim=head_dim,
        default_tied=True,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        interleaved=True,
    )


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
