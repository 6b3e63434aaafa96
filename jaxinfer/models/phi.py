"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644): attention and an MLP side by side, behind one layer norm."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config, self_attention
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping

# What checkpoints call it.
NAMES = {
    "self_attn.o_proj": "self_attn.dense",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "model.norm": "model.final_layernorm",
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


def layer_norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)


class PhiLayer(nnx.Module):
    """A parallel block.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def head_norm(heads: int) -> LayerNorm:
            return LayerNorm(config.head_dim, eps=config.norm_eps, dtype=dtype, axes=(None,))

        norm = head_norm if config.qk_norm else None
        self.input_layernorm = layer_norm(config, dtype)
        self.self_attn = self_attention(config, layer, qk_norm=norm, dtype=dtype, rngs=rngs)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn(normed, angles, cache, batch)
        return x + attended + self.mlp(normed), cache


class PhiForCausalLM(DecoderForCausalLM):
    """Phi with its head."""

    layer = PhiLayer
    norm = staticmethod(layer_norm)


def source(name: str) -> Source:
    """Under the checkpoints' names."""
    for ours, theirs in NAMES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return Tensor(name)


def weights(config: ModelConfig) -> ParamMapping:
    """Some names are others."""
    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, PhiForCausalLM, weights)
