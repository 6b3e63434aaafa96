"""OLMo 2 (arXiv:2501.00656): norms come after attention and MLP, and there is one over all heads of queries, and of
keys."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles, SelfAttention
from jaxinfer.layers.norm import HeadsRMSNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import (
    DecoderConfig,
    DecoderForCausalLM,
    DecoderLayer,
    decoder_config,
    self_attention,
    wide_rms_norm,
)
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


class PostNormLayer(DecoderLayer):
    """Attention, then MLP, each with a norm of what it adds to the hidden states.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`; the hidden states, which feed the others, are not normed.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = type(self)
        self.self_attn = make.make_attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make.make_norm(config, dtype)
        self.mlp = make.make_mlp(config, dtype=dtype, rngs=rngs)
        self.post_feedforward_layernorm = make.make_norm(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(x, angles, cache, batch)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(x)), cache


def attention(
    config: DecoderConfig, layer: int, *, wide: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> SelfAttention:
    """A layer's; norms of queries and keys are over all heads. wide: see RMSNorm."""

    def norm(heads: int) -> HeadsRMSNorm:
        axes = ("heads" if heads == config.num_heads else "kv_heads",)
        return HeadsRMSNorm(heads * config.head_dim, eps=config.norm_eps, dtype=dtype, axes=axes, wide=wide)

    return self_attention(config, layer, qk_norm=norm, dtype=dtype, rngs=rngs)


class Olmo2Layer(PostNormLayer):
    """Its norms multiply before they round."""

    make_norm = staticmethod(wide_rms_norm)
    make_attention = staticmethod(attention)


class Olmo2ForCausalLM(DecoderForCausalLM):
    """OLMo 2 with its head."""

    layer = Olmo2Layer
    norm = staticmethod(wide_rms_norm)


def parse(fields: ConfigReader) -> DecoderConfig:
    """`attention_bias` covers all four projections."""
    bias = fields.boolean("attention_bias", False)
    return decoder_config(fields, norm_eps=("rms_norm_eps", 1e-5), qkv_bias=bias, out_bias=bias, qk_norm=True)


ARCHITECTURE = Architecture(parse, Olmo2ForCausalLM, weights)
