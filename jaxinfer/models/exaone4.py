"""EXAONE 4.0 (arXiv:2507.11407): norms come after attention and MLP; layers without a window, where others have one,
have no positions."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.config import ConfigReader, periodic_windows
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.llama import weights
from jaxinfer.models.olmo2 import PostNormLayer
from jaxinfer.models.registry import Architecture


class Exaone4ForCausalLM(DecoderForCausalLM):
    """EXAONE 4.0 with its head."""

    layer = PostNormLayer


def sliding_windows(fields: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """All layers but each `sliding_window_pattern`-th slide; `layer_types` overrides which."""
    data = fields.data
    if data.get("layer_types") is not None:
        return periodic_windows(fields, layers, 1)
    if "sliding_window" in data and data["sliding_window"] is None:
        return (None,) * layers
    if isinstance(data.get("sliding_window_pattern", 4), str | None):
        raise fields.error("sliding_window_pattern", "without layer_types it must be an integer")
    return periodic_windows(fields, layers, fields.integer("sliding_window_pattern", 4))


def parse(fields: ConfigReader) -> DecoderConfig:
    """Norms of queries and keys are head by head. All layers turn them, or, with `sliding_window`, those that slide."""
    config = decoder_config(fields, norm_eps=("rms_norm_eps", 1e-5), default_kv_heads=32, qk_norm=True)
    windows = sliding_windows(fields, config.num_layers)
    everywhere = "sliding_window" in fields.data and fields.data["sliding_window"] is None
    ropes = tuple(
        rope if everywhere or window is not None else None for rope, window in zip(config.ropes, windows, strict=True)
    )
    return replace(config, windows=windows, ropes=ropes)


ARCHITECTURE = Architecture(parse, Exaone4ForCausalLM, weights)
