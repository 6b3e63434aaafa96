"""Gemma 4 12B, its text model (Google, 2026): Gemma 4 without experts, and without inputs of single layers."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.gemma4 import Gemma4ForCausalLM, weights
from jaxinfer.models.gemma4_config import Gemma4Config
from jaxinfer.models.gemma4_config import parse as parse_gemma4
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> Gemma4Config:
    """It has other defaults."""
    fields.refuse("hidden_size_per_layer_input", 0)
    fields.refuse("enable_moe_block", False)
    defaults = {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
    return parse_gemma4(fields.with_defaults(**defaults))


ARCHITECTURE = Architecture(parse, Gemma4ForCausalLM, weights, per_layer=True)
