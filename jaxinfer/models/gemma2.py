"""Gemma 2 (Google, arXiv:2408.00118): Gemma with a norm behind each block too, soft caps, and windows in half of the
layers."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.models.config import ConfigReader, layer_types_of, typed_windows
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, num_layers, rms_norm
from jaxinfer.models.gemma import GemmaLayer, gemma_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}


class Gemma2Layer(GemmaLayer):
    """Attention, then MLP, each between two norms and added to the hidden states."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.pre_feedforward_layernorm = rms_norm(config, dtype)
        self.post_feedforward_layernorm = rms_norm(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), angles, cache, batch)
        x = x + self.post_attention_layernorm(attended)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out), cache


class Gemma2ForCausalLM(DecoderForCausalLM):
    """Gemma 2 with its head."""

    layer = Gemma2Layer


def gemma2_config(fields: ConfigReader, layer_types: tuple[str, ...], **more: Any) -> DecoderConfig:
    """What Gemma 3 has in common with it. more: see `decoder_config`."""
    return gemma_config(
        fields,
        activation_field="hidden_activation",
        windows=typed_windows(fields, layer_types),
        scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        **more,
    )


def cap(fields: ConfigReader, name: str, default: float | None) -> float | None:
    """`null` means none, whatever the default."""
    if name not in fields.data:
        return default
    return None if fields.data[name] is None else fields.number(name)


def parse(fields: ConfigReader) -> DecoderConfig:
    """Layers slide by turns, from the first one on."""
    fields.refuse("use_bidirectional_attention", False)
    fields = fields.with_defaults(**DEFAULTS)
    return gemma2_config(
        fields,
        layer_types_of(fields, num_layers(fields), lambda i: i % 2 == 1),
        soft_cap=cap(fields, "attn_logit_softcapping", 50.0),
        logit_soft_cap=cap(fields, "final_logit_softcapping", 30.0),
    )


ARCHITECTURE = Architecture(parse, Gemma2ForCausalLM, weights)
