"""Command R (Cohere, 2024): attention and MLP side by side behind one layer norm without biases, neighbouring
dimensions turn together, and logits are scaled."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, decoder_config, gated_mlp, self_attention
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


def layer_norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, bias=False)


class CohereLayer(nnx.Module):
    """Attention and MLP of the same normed hidden states, both added to them.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        (
            "input_layernorm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def qk_norm(heads: int) -> LayerNorm:
            """Head by head, with each head's own weights."""
            axes = ("heads" if heads == config.num_heads else "kv_heads", None)
            return LayerNorm((heads, config.head_dim), eps=config.norm_eps, dtype=dtype, axes=axes, bias=False)

        normed = qk_norm if config.qk_norm else None
        self.input_layernorm = layer_norm(config, dtype)
        self.self_attn = self_attention(config, layer, qk_norm=normed, dtype=dtype, rngs=rngs)
        self.mlp = gated_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn(normed, angles, cache, batch)
        return x + attended + self.mlp(normed), cache


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
