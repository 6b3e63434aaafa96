"""Seed-OSS (ByteDance, 2025): Llama's shape with biases on q, k, v and an explicit head size."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
}


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers q, k and v; `attention_out_bias` the projection after. A head size or key/value heads
    that are null are not the default, but what follows from the heads."""
    config = parse_llama(fields.with_absent(**DEFAULTS))
    return replace(config, out_bias=fields.boolean("attention_out_bias", False))


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
