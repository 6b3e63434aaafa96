"""The text model of Qwen3.5 and 3.6, dense (Qwen, 2026): Qwen3-Next's layers, with an MLP for experts.

Positions of images are woven into the frequencies (`mrope_interleaved`), which changes nothing of text: see qwen2_vl.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxinfer.layers.delta_net import DeltaNetConfig
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM
from jaxinfer.models.hybrid import hybrid
from jaxinfer.models.llama import weights as llama_weights
from jaxinfer.models.qwen2_vl import of_text
from jaxinfer.models.qwen3_next import AttentionLayer, DeltaNetLayer, hybrid_config, mixed_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping
from jaxinfer.models.wrapped import VISUAL

DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}


class Qwen3_5ForCausalLM(DecoderForCausalLM):
    """Qwen3.5 with its head."""

    layer = staticmethod(hybrid(DeltaNetLayer, AttentionLayer))


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers all four projections."""
    return hybrid_config(of_text(fields, DEFAULTS))


def one_by_one(config: DeltaNetConfig, mixer: str, which: str) -> Source:
    """A projection of a delta net, of which queries', keys' and values' come after each other in one tensor."""
    if which in "zba":
        return Tensor(f"{mixer}in_proj_{which}.weight")
    keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim
    return Part(Tensor(f"{mixer}in_proj_qkv.weight"), "qkv".index(which) * keys, 2 * keys + values)


def text_weights(mapping: ParamMapping) -> ParamMapping:
    """Which may be in the checkpoint of a model that sees."""
    return replace(mapping, prefixes=("", "model.language_model."), beside=(*mapping.beside, *VISUAL))


def weights(config: ModelConfig) -> ParamMapping:
    """See `one_by_one`."""
    return text_weights(mixed_weights(llama_weights, one_by_one)(config))


ARCHITECTURE = Architecture(parse, Qwen3_5ForCausalLM, weights)
