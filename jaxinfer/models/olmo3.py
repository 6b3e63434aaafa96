"""Olmo 3 (Allen AI, 2025): OLMo 2 with sliding windows on three layers of four, whose rotary embedding is not
stretched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxinfer.models import olmo2
from jaxinfer.models.config import FULL, SLIDING, ConfigReader, check_typed, periodic_windows, rope_of
from jaxinfer.models.decoder import DecoderConfig
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

THETA = 5e5


def rope_settings(fields: ConfigReader) -> dict[str, dict[str, Any]]:
    """Of each layer type, by `rope_parameters`; `rope_scaling` and `rope_theta` are of full layers."""
    given: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = fields.data.get(name)
        if part is not None and not isinstance(part, dict):
            raise fields.error(name, "it must be an object or null")
        given[name] = part or {}
    parameters, scaling = given["rope_parameters"], given["rope_scaling"]
    if any(parameters.get(kind) is not None and not isinstance(parameters[kind], dict) for kind in (FULL, SLIDING)):
        raise fields.error("rope_parameters", f"{FULL} and {SLIDING} must be objects or null")
    if unknown := sorted(set(parameters) - {FULL, SLIDING}):
        raise fields.error("rope_parameters", f"{unknown[0]!r:.100} must be said of {FULL} or of {SLIDING}")
    full, sliding = (dict(parameters.get(kind) or {}) for kind in (FULL, SLIDING))
    theta = fields.number("rope_theta", THETA, minimum=1.0)
    if theta != THETA and "rope_theta" not in sliding:  # versions of transformers differ
        raise fields.error("rope_theta", f"it is of {FULL} alone; rope_parameters must have one for {SLIDING}")
    return {FULL: {"rope_theta": theta} | full | scaling, SLIDING: {"rope_theta": THETA} | sliding}


def parse(fields: ConfigReader) -> DecoderConfig:
    """Layers that slide, and those that do not, have a rotary embedding each."""
    settings = rope_settings(fields)
    shared = {name: value for name, value in fields.data.items() if name not in ("rope_parameters", "rope_scaling")}
    config = olmo2.parse(ConfigReader(shared, fields.where))
    windows = periodic_windows(fields, config.num_layers, 4)
    ropes, contexts = {}, {}
    for kind, parameters in settings.items():
        check_typed(fields, parameters)
        own = {"max_position_embeddings": shared.get("max_position_embeddings"), "rope_parameters": parameters}
        ropes[kind], contexts[kind] = rope_of(ConfigReader(own, fields.where), config.head_dim)
    return replace(
        config,
        windows=windows,
        ropes=tuple(ropes[SLIDING if window else FULL] for window in windows),
        max_context=contexts[FULL if None in windows else SLIDING],
    )


ARCHITECTURE = Architecture(parse, olmo2.Olmo2ForCausalLM, weights)
