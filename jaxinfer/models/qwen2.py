"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's shape with biases on q, k, v and optional sliding windows."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, sliding_window, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def sliding_windows(fields: ConfigReader) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window`; `layer_types` overrides which."""
    layers = num_layers(fields)
    window = sliding_window(fields) if fields.boolean("use_sliding_window", False) else None
    return windows_of(fields, layers, window, first=fields.integer("max_window_layers", 28, minimum=0))


def parse(fields: ConfigReader) -> DecoderConfig:
    """The biases are part of the architecture, not a field."""
    return decoder_config(fields, windows=sliding_windows(fields), default_kv_heads=32, qkv_bias=True)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
