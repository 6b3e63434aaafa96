"""Gemma (Google, arXiv:2403.08295): Llama's layer, with norms whose weights are what is more than 1, GELU in its MLPs,
and embeddings scaled by the root of their width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

TANH_GELU = "gelu_pytorch_tanh"
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}


class GemmaLayer(DecoderLayer):
    """SMOOTHING_PAIRS: without the norms, as their outputs are no multiples of their weights."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )


class GemmaForCausalLM(DecoderForCausalLM):
    """Gemma with its head."""

    layer = GemmaLayer


def gemma_config(fields: ConfigReader, **more: Any) -> DecoderConfig:
    """What all generations have. more: see `decoder_config`."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(
        fields,
        default_activation=TANH_GELU,
        default_tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm_offset=1.0,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        **more,
    )


def parse(fields: ConfigReader) -> DecoderConfig:
    """`gelu` is what first releases called its approximation."""
    fields.refuse("use_bidirectional_attention", False)
    config = gemma_config(fields.with_defaults(**DEFAULTS))
    if config.activation == "gelu":
        config = replace(config, activation=TANH_GELU)
    fields.refuse("hidden_activation", config.activation)
    return config


ARCHITECTURE = Architecture(parse, GemmaForCausalLM, weights)
