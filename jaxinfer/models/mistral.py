"""Mistral (Jiang et al., arXiv:2310.06825): Llama's shape, with one sliding window for all layers."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> DecoderConfig:
    """`sliding_window: null` means none; where the field is absent, transformers takes 4096."""
    fields.refuse("layer_types")
    absent = "sliding_window" not in fields.data
    window = None if not absent and fields.data["sliding_window"] is None else fields.integer("sliding_window", 4096)
    return decoder_config(fields, windows=windows_of(fields, num_layers(fields), window), default_kv_heads=8)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
