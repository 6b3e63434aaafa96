"""Hunyuan, dense (Tencent, 2025): Llama's layer with norms on turned queries and keys."""

from __future__ import annotations

from functools import partial

from jaxinfer.models.config import ConfigReader, ModelConfig, rope_parameters
from jaxinfer.models.decoder import (
    IGNORED,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderLayer,
    decoder_config,
    self_attention,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

NAMES = {".q_norm.": ".query_layernorm.", ".k_norm.": ".key_layernorm."}


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers all four projections."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(
        rope_fields(fields), norm_eps=("rms_norm_eps", 1e-5), qkv_bias=bias, out_bias=bias, qk_norm=True
    )


def rope_fields(fields: ConfigReader) -> ConfigReader:
    """With the rotary embeddings as other families say it: here the kind "dynamic" with an `alpha` stretches the base
    once and for all, whatever the context."""
    rope = rope_parameters(fields)
    if rope.data["rope_type"] != "dynamic" or not rope.data.get("alpha"):
        return fields
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
    if head_dim < 4:
        raise fields.error("head_dim", "with rope_parameters.alpha it must be at least 4")
    theta = rope.number("rope_theta", 10000.0, minimum=1.0) * rope.number("alpha") ** (head_dim / (head_dim - 2))
    own = {"rope_type": "default", "rope_theta": theta}
    return ConfigReader({**fields.data, "rope_parameters": own, "rope_scaling": None}, fields.where)


class HunYuanLayer(DecoderLayer):
    """Queries and keys are normed after they are turned."""

    make_attention = staticmethod(partial(self_attention, norm_after_rope=True))


class HunYuanDenseV1ForCausalLM(DecoderForCausalLM):
    """Hunyuan with its head."""

    layer = HunYuanLayer


def source(name: str) -> Source:
    """Checkpoints say layernorm, of queries and keys."""
    return Tensor(spelled(name, NAMES))


def weights(config: ModelConfig) -> ParamMapping:
    """Two names are others."""
    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, HunYuanDenseV1ForCausalLM, weights)
