"""The text model of Ministral 3 (Mistral AI, 2025): Mistral, whose queries grow with their position.

They are multiplied by `1 + beta * log(1 + floor(position / original context))`, so that attention over more tokens is
as sharp: Llama 4's attention temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.config import ConfigReader, rope_of, windows_of
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer, decoder_config, num_layers
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


@dataclass(frozen=True)
class QueryRope(Rope):
    """A rotary embedding that also scales.

    beta: see above; every: the original context.
    """

    beta: float = 0.0
    every: int = 1

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = 1.0 + self.beta * jnp.log1p((positions // self.every).astype(jnp.float32))
        cos, sin = super().cos_sin(positions)
        return cos * scale[:, None], sin * scale[:, None]


@dataclass(frozen=True)
class Ministral3Config(DecoderConfig):
    """query_rope: the rotary embedding of queries; `ropes` are those of keys."""

    query_rope: QueryRope | None = None


class Ministral3Layer(DecoderLayer):
    """Queries have a rotary embedding of their own."""

    def __init__(self, config: Ministral3Config, layer: int, **options: Any):
        super().__init__(config, layer, **options)
        self.self_attn.query_rope = config.query_rope


class Ministral3ForCausalLM(DecoderForCausalLM):
    """Ministral 3 with its head."""

    layer = Ministral3Layer
    config: Ministral3Config

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        ropes = {*self.config.ropes, self.config.query_rope}
        angles = {rope: rope.cos_sin(batch.positions) for rope in ropes if rope is not None}
        return lambda layer, x, cache, view: layer(x, angles, cache, view)


def parse(reader: ConfigReader) -> Ministral3Config:
    """One window is for all layers, whatever `layer_types` says; `rope_parameters` are ROPE where there are none."""
    reader.refuse("layer_types")
    data = {**DEFAULTS, **reader.data}
    if data.get("rope_parameters") is None and data.get("rope_scaling") is None:
        data["rope_parameters"] = ROPE | ({"rope_theta": data["rope_theta"]} if data.get("rope_theta") else {})
    reader = ConfigReader(data, reader.where)
    layers = num_layers(reader)
    window = None if data["sliding_window"] is None else reader.integer("sliding_window")
    head_dim = reader.integer("head_dim", reader.integer("hidden_size") // reader.integer("num_attention_heads"))
    rope, context = rope_of(reader, head_dim)
    windows = windows_of(reader, layers, window)
    config = decoder_config(reader, ropes=(rope,) * layers, max_context=context, windows=windows)
    said = data.get("rope_parameters") or data["rope_scaling"]
    scaling = ConfigReader(said, f"{reader.where}: rope_parameters")
    query = QueryRope(
        **_fields(rope),
        beta=scaling.number("llama_4_scaling_beta", 0.0, above=False),
        every=scaling.integer("original_max_position_embeddings", reader.integer("max_position_embeddings")),
    )
    return Ministral3Config(**_fields(config), query_rope=query)


def _fields(of: Any) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in fields(of)}


ARCHITECTURE = Architecture(parse, Ministral3ForCausalLM, weights)
