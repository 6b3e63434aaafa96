"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644): attention and an MLP side by side, behind one layer norm."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.layers.attention import SelfAttention
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import (
    IGNORED,
    DecoderConfig,
    DecoderForCausalLM,
    ParallelLayer,
    decoder_config,
    layer_norm,
    plain_mlp,
    self_attention,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

# What checkpoints call it.
NAMES = {
    "self_attn.o_proj.": "self_attn.dense.",
    "self_attn.q_norm.": "self_attn.q_layernorm.",
    "self_attn.k_norm.": "self_attn.k_layernorm.",
    "mlp.up_proj.": "mlp.fc1.",
    "mlp.down_proj.": "mlp.fc2.",
    "model.norm.": "model.final_layernorm.",
}


def parse(fields: ConfigReader) -> DecoderConfig:
    """Everything has a bias. A tied head would have one, too, which is not supported."""
    fields.refuse("tie_word_embeddings", False)
    return decoder_config(
        fields,
        default_activation="gelu_new",
        norm_eps=("layer_norm_eps", 1e-5),
        default_partial=0.5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=fields.boolean("qk_layernorm", False),
    )


def attention(config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> SelfAttention:
    """A layer's; norms of queries and keys are layer norms."""

    def norm(_: int) -> LayerNorm:
        return LayerNorm(config.head_dim, eps=config.norm_eps, dtype=dtype, axes=(None,))

    return self_attention(config, layer, qk_norm=norm if config.qk_norm else None, dtype=dtype, rngs=rngs)


class PhiLayer(ParallelLayer):
    """Layer norms, and no gate."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
    )
    make_norm = staticmethod(layer_norm)
    make_attention = staticmethod(attention)
    make_mlp = staticmethod(plain_mlp)


class PhiForCausalLM(DecoderForCausalLM):
    """Phi with its head."""

    layer = PhiLayer
    norm = staticmethod(layer_norm)


def source(name: str) -> Source:
    """Under the checkpoints' names."""
    return Tensor(spelled(name, NAMES))


def weights(config: ModelConfig) -> ParamMapping:
    """Some names are others."""
    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, PhiForCausalLM, weights)
