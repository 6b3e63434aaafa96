"""Llama 2 and 3.x (Touvron et al., arXiv:2307.09288)."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.registry import Architecture
from jaxinfer.models.weights import ParamMapping


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers all four projections, as in transformers."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.boolean("mlp_bias", False))


def weights(config: ModelConfig) -> ParamMapping:
    """Names are the module's own."""
    return ParamMapping(ignored=IGNORED)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
