"""Qwen3, dense (arXiv:2505.09388): Qwen2's shape with norms on queries and keys and an explicit head size."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.qwen2 import sliding_windows
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers all four projections; `head_dim` is 128 where absent."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(
        fields,
        windows=sliding_windows(fields),
        default_kv_heads=32,
        default_head_dim=128,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
