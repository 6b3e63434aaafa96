"""OLMo (arXiv:2402.00838): Llama's layer with layer norms that have no weights, and bounds on queries, keys, values."""

from __future__ import annotations

from dataclasses import replace

from jax.typing import DTypeLike

from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def bare_norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, scale=False, bias=False)


class OlmoLayer(DecoderLayer):
    """Norms have nothing to smooth with, nor have values that are cut off."""

    SMOOTHING_PAIRS: SmoothingPairs = (("mlp.up_proj", ("mlp.down_proj",)),)
    make_norm = staticmethod(bare_norm)


class OlmoForCausalLM(DecoderForCausalLM):
    """OLMo with its head."""

    layer = OlmoLayer
    norm = staticmethod(bare_norm)


def parse(fields: ConfigReader) -> DecoderConfig:
    """The norms' epsilon is no field."""
    bias = fields.boolean("attention_bias", False)
    clip = None if fields.data.get("clip_qkv") is None else fields.number("clip_qkv")
    return replace(decoder_config(fields, qkv_bias=bias, out_bias=bias, qkv_clip=clip), norm_eps=1e-5)


ARCHITECTURE = Architecture(parse, OlmoForCausalLM, weights)
