"""Phi-3 (arXiv:2404.14219) and Phi-4: Llama's layer with fused projections, partial rotary embeddings, and a window."""

from __future__ import annotations

import re
from functools import partial

from jaxinfer.models.config import ConfigReader, ModelConfig, rope_parameters
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping

CONTEXT = 4096


def parse(fields: ConfigReader) -> DecoderConfig:
    """All layers slide, where `sliding_window` is set."""
    fields = rope_fields(fields.with_defaults(max_position_embeddings=CONTEXT))
    window = None if fields.data.get("sliding_window") is None else fields.integer("sliding_window")
    return decoder_config(
        fields,
        windows=(window,) * num_layers(fields),
        norm_eps=("rms_norm_eps", 1e-5),
        default_partial=1.0,
    )


def rope_fields(fields: ConfigReader) -> ConfigReader:
    """With the rotary embeddings as other families say it: here "su" and "yarn" are old names of longrope, and the
    original context is a field beside them."""
    rope = rope_parameters(fields)
    kind = rope.choice("rope_type", "default", ("default", "longrope", "su", "yarn"))
    own = {
        "rope_type": "default" if kind == "default" else "longrope",
        "original_max_position_embeddings": fields.integer("original_max_position_embeddings", CONTEXT),
    }
    return ConfigReader({**fields.data, "rope_parameters": {**rope.data, **own}, "rope_scaling": None}, fields.where)


def gate_up(name: str, width: int) -> Source:
    """Fused, of two times `width` rows: first the gate."""
    if fused := re.fullmatch(r"(.*\.mlp)\.(gate|up)_proj\.weight", name):
        parent, which = fused.groups()
        return Part(Tensor(f"{parent}.gate_up_proj.weight"), width * (which == "up"), 2 * width)
    return Tensor(name)


def source(name: str, config: DecoderConfig) -> Source:
    """Queries, keys and values are fused, too."""
    if fused := re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.weight", name):
        parent, which = fused.groups()
        queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
        start = {"q": 0, "k": queries, "v": queries + keys}[which]
        return Part(Tensor(f"{parent}.qkv_proj.weight"), start, queries + 2 * keys)
    return gate_up(name, config.intermediate_size)


def weights(config: ModelConfig) -> ParamMapping:
    """Two tensors are of several weights."""
    assert isinstance(config, DecoderConfig)
    return ParamMapping(partial(source, config=config), ignored=IGNORED)


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights)
