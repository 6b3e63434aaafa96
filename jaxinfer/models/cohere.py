"""Command R (Cohere, 2024): attention and MLP side by side behind one layer norm without biases, neighbouring
dimensions turn together, and logits are scaled."""

from __future__ import annotations

from jax.typing import DTypeLike

from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import (
    DecoderConfig,
    DecoderForCausalLM,
    ParallelLayer,
    decoder_config,
    head_norm_attention,
)
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def layer_norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, bias=False)


class CohereLayer(ParallelLayer):
    """Its norms have no biases, and those of queries and keys each head's own weights."""

    make_norm = staticmethod(layer_norm)
    make_attention = staticmethod(head_norm_attention)


class CohereForCausalLM(DecoderForCausalLM):
    """Command R with its (normally tied) head."""

    layer = CohereLayer
    norm = staticmethod(layer_norm)


def parse_shared(fields: ConfigReader, qk_norm: bool = False) -> DecoderConfig:
    """What Cohere's families have in common. `attention_bias` covers all four projections."""
    fields = fields.with_defaults(max_position_embeddings=8192)
    bias = fields.boolean("attention_bias", False)
    return decoder_config(
        fields,
        norm_eps=("layer_norm_eps", 1e-5),
        default_tied=True,
        interleaved=True,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=qk_norm,
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def parse(fields: ConfigReader) -> DecoderConfig:
    """Where nothing is said of theta, it is 500000."""
    return parse_shared(fields.with_defaults(rope_theta=5e5), qk_norm=fields.boolean("use_qk_norm", False))


ARCHITECTURE = Architecture(parse, CohereForCausalLM, weights)
