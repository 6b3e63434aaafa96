"""The text model of Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): Qwen2's, with other defaults.

A token of an image has three positions, and each frequency turns by one of them (`mrope_section`). Those of text are
equal, so of text alone this is the rotary embedding that all have.
"""

from __future__ import annotations

from typing import Any

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.qwen2 import sliding_windows
from jaxinfer.models.registry import Architecture

DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1000000.0,
}


def of_text(fields: ConfigReader, defaults: dict[str, Any]) -> ConfigReader:
    """With defaults for what is absent, and without what says how images' positions turn."""
    fields = fields.with_absent(**defaults)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(part := fields.data.get(name), dict):
            part = {key: value for key, value in part.items() if key not in ("mrope_section", "mrope_interleaved")}
            part = {k: "default" if k in ("type", "rope_type") and v == "mrope" else v for k, v in part.items()}
            fields = fields.with_values(**{name: part})
    return fields


def parse(fields: ConfigReader) -> DecoderConfig:
    """The biases are part of the architecture, and heads have no size of their own."""
    fields = of_text(fields, DEFAULTS)
    fields.refuse("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
    return decoder_config(fields, windows=sliding_windows(fields), qkv_bias=True)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
