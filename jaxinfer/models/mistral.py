"""Mistral (Jiang et al., arXiv:2310.06825): Llama's shape, with one sliding window for all layers."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, sliding_window, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> DecoderConfig:
    """All layers slide, where there is a window."""
    fields.refuse("layer_types")
    windows = windows_of(fields, num_layers(fields), sliding_window(fields))
    return decoder_config(fields, windows=windows, default_kv_heads=8)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
