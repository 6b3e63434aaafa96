"""StarCoder2 (Lozhkov et al., arXiv:2402.19173): layer norms, an MLP without a gate, biases, and one sliding window."""

from __future__ import annotations

import re

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import (
    IGNORED,
    DecoderConfig,
    DecoderForCausalLM,
    UngatedLayer,
    decoder_config,
    layer_norm,
    num_layers,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping

DEFAULTS = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


class Starcoder2Layer(UngatedLayer):
    """Layer norms, and no gate."""

    make_norm = staticmethod(layer_norm)


class Starcoder2ForCausalLM(DecoderForCausalLM):
    """StarCoder2 with its head."""

    layer = Starcoder2Layer
    norm = staticmethod(layer_norm)


def parse(fields: ConfigReader) -> DecoderConfig:
    """`use_bias` covers all projections; `sliding_window` all layers."""
    fields = fields.with_defaults(**DEFAULTS)
    fields.refuse("layer_types")
    bias = fields.boolean("use_bias", True)
    window = None if fields.data.get("sliding_window") is None else fields.integer("sliding_window")
    return decoder_config(
        fields,
        norm_eps=("norm_epsilon", 1e-5),
        windows=(window,) * num_layers(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def source(name: str) -> Source:
    """MLPs have GPT-2's names."""
    if match := re.fullmatch(r"(.*\.mlp)\.(up|down)_proj\.(weight|bias)", name):
        parent, which, kind = match.groups()
        return Tensor(f"{parent}.{'c_fc' if which == 'up' else 'c_proj'}.{kind}")
    return Tensor(name)


def weights(config: ModelConfig) -> ParamMapping:
    """Names are the module's own but for MLPs."""
    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, Starcoder2ForCausalLM, weights)
