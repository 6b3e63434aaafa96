"""Granite 3.x, dense (IBM, 2024): Llama's layer with four multipliers."""

from __future__ import annotations

from dataclasses import replace

import jax

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


class GraniteLayer(DecoderLayer):
    """What blocks add is scaled."""

    def __init__(self, config: DecoderConfig, layer: int, **options: object):
        super().__init__(config, layer, **options)  # type: ignore[arg-type]
        self.scale = config.residual_scale

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), angles, cache, batch)
        x = x + attended * self.scale
        return x + self.feed_forward(self.post_attention_layernorm(x), batch) * self.scale, cache


class GraniteForCausalLM(DecoderForCausalLM):
    """Granite with its head."""

    layer = GraniteLayer


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_multiplier` is the scale of scores; logits are divided by `logits_scaling`."""
    return replace(
        parse_llama(fields),
        scale=fields.number("attention_multiplier", 1.0),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


ARCHITECTURE = Architecture(parse, GraniteForCausalLM, weights)
