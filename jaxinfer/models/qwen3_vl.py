"""The text model of Qwen3-VL, dense (arXiv:2511.21631): Qwen3's, without windows and with other defaults.

Positions of images are woven into the frequencies (`mrope_interleaved`), which changes nothing of text: see qwen2_vl.
"""

from __future__ import annotations

from typing import Any

from jaxinfer.models.config import SLIDING, ConfigReader, layer_types_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.qwen2_vl import of_text
from jaxinfer.models.registry import Architecture

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}


def parse(
    fields: ConfigReader, defaults: dict[str, Any] = DEFAULTS, default_head_dim: int | None = 128
) -> DecoderConfig:
    """`attention_bias` covers all four projections."""
    fields = of_text(fields, defaults)
    fields.refuse("use_sliding_window", False)
    if SLIDING in layer_types_of(fields, num_layers(fields)):
        raise fields.error("layer_types", "all layers of this model see everything")
    bias = fields.boolean("attention_bias", False)
    return decoder_config(fields, default_head_dim=default_head_dim, qkv_bias=bias, out_bias=bias, qk_norm=True)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
