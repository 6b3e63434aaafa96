"""Ministral 8B (Mistral AI, 2024): Mistral, with windows on those layers that `layer_types` names."""

from __future__ import annotations

from typing import Any

from jaxinfer.models.config import ConfigReader, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def parse(fields: ConfigReader) -> DecoderConfig:
    """`sliding_window: null` means none. Without `layer_types` it is that of all layers."""
    fields = fields.with_absent(**DEFAULTS)
    window = None if fields.data["sliding_window"] is None else fields.integer("sliding_window")
    return decoder_config(fields, windows=windows_of(fields, num_layers(fields), window))


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
