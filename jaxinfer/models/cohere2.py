"""Command R7B and Command A (arXiv:2504.00698): Command R's layer with sliding windows; those without have no
positions."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.cohere import CohereForCausalLM, parse_shared
from jaxinfer.models.config import ConfigReader, periodic_windows
from jaxinfer.models.decoder import DecoderConfig
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> DecoderConfig:
    """All layers but each `sliding_window_pattern`-th slide; `layer_types` overrides which."""
    config = parse_shared(fields)
    windows = periodic_windows(fields, config.num_layers, fields.integer("sliding_window_pattern", 4))
    ropes = tuple(rope if window is not None else None for rope, window in zip(config.ropes, windows, strict=True))
    return replace(config, windows=windows, ropes=ropes)


ARCHITECTURE = Architecture(parse, CohereForCausalLM, weights)
