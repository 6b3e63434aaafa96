"""SmolLM3 (Hugging Face, 2025): Llama's shape, where every fourth layer has no rotary positions (NoPE,
arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.config import ConfigReader, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, num_layers
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def turning_layers(fields: ConfigReader) -> list[bool]:
    """Which layers have rotary positions: where `no_rope_layers`, in spite of its name, has a 1."""
    layers, listed = num_layers(fields), fields.data.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or any(turns not in (0, 1) for turns in listed):
        raise fields.error("no_rope_layers", f"it must list a 0 or a 1 for each layer (num_hidden_layers: {layers})")
    return [bool(turns) for turns in listed[:layers]]


def windows(fields: ConfigReader, turning: list[bool]) -> tuple[int | None, ...]:
    """Those without rotary positions slide, if any do; `layer_types` overrides which."""
    window = None
    if fields.boolean("use_sliding_window", False) and fields.data.get("sliding_window") is not None:
        window = fields.integer("sliding_window")
    if fields.data.get("layer_types") is not None:
        return windows_of(fields, len(turning), window)
    return tuple(None if turns else window for turns in turning)


def parse(fields: ConfigReader) -> DecoderConfig:
    """Llama's, and which layers turn and which slide. Where key/value heads are null, not absent, there are as many as
    query heads."""
    config = parse_llama(fields.with_absent(**DEFAULTS))
    turning = turning_layers(fields)
    ropes = tuple(rope if turns else None for rope, turns in zip(config.ropes, turning, strict=True))
    return replace(config, ropes=ropes, windows=windows(fields, turning))


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
