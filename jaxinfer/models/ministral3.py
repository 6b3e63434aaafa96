"""The text model of Ministral 3 (Mistral AI, 2025): Mistral, whose queries grow with their position.

That is Llama 4's attention temperature, in all layers.
"""

from __future__ import annotations

from typing import Any

from jaxinfer.layers.temperature import Temperature
from jaxinfer.models.config import ConfigReader, rope_of, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def parse(reader: ConfigReader) -> DecoderConfig:
    """One window is for all layers, whatever `layer_types` says; `rope_parameters` are ROPE where there are none."""
    reader.refuse("layer_types")
    reader = reader.with_absent(**DEFAULTS)
    if reader.data.get("rope_parameters") is None and reader.data.get("rope_scaling") is None:
        theta = {"rope_theta": reader.data["rope_theta"]} if reader.data.get("rope_theta") else {}
        reader = reader.with_values(rope_parameters=ROPE | theta)
    data = reader.data
    layers = num_layers(reader)
    window = None if data["sliding_window"] is None else reader.integer("sliding_window")
    head_dim = reader.integer("head_dim", reader.integer("hidden_size") // reader.integer("num_attention_heads"))
    rope, context = rope_of(reader, head_dim)
    windows = windows_of(reader, layers, window)
    said = data.get("rope_parameters") or data.get("rope_scaling") or {}
    scaling = ConfigReader(said, f"{reader.where}: rope_parameters")
    temperature = Temperature(
        scaling.number("llama_4_scaling_beta", 0.0, above=False),
        scaling.integer("original_max_position_embeddings", reader.integer("max_position_embeddings")),
    )
    return decoder_config(
        reader, ropes=(rope,) * layers, max_context=context, windows=windows, temperatures=(temperature,) * layers
    )


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
