"""GLM-4 9B (arXiv:2406.12793): Llama's layer with a fused gate, half of each head's dimensions turning in pairs."""

from __future__ import annotations

from functools import partial

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.phi3 import gate_up
from jaxinfer.models.registry import Architecture
from jaxinfer.models.weights import ParamMapping


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` is of queries, keys and values alone."""
    return decoder_config(
        fields.with_defaults(max_position_embeddings=131072),
        default_kv_heads=2,
        default_head_dim=128,
        norm_eps=("rms_norm_eps", 1.5625e-7),
        qkv_bias=fields.boolean("attention_bias", True),
        interleaved=True,
        default_partial=0.5,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """One tensor is of two weights."""
    assert isinstance(config, DecoderConfig)
    return ParamMapping(partial(gate_up, width=config.intermediate_size), ignored=IGNORED)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
