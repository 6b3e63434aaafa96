"""The decoder that Llama, Mistral and Qwen share: pre-norm, rotary grouped-query attention, gated MLP.

Module attributes carry Hugging Face's names, so the path of a weight is its name in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import SelfAttention
from jaxinfer.layers.linear import Embedding, Linear, head_logits
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.causal import CausalLM, SmoothingPairs
from jaxinfer.models.config import MAX_LAYERS, ConfigReader, ModelConfig, rope_of

# Old checkpoints carry the rotary frequencies; they follow from config.json.
IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Everything that shapes a decoder of this family.

    intermediate_size: the width of MLPs.
    activation: of MLPs, a name in ACTIVATIONS.
    norm_eps: of RMS norms.
    rope: the rotary embedding.
    windows: of each layer, how many tokens a query sees; None: all.
    qkv_bias, out_bias, mlp_bias: which projections have one.
    qk_norm: queries and keys are normed, head by head.
    """

    intermediate_size: int
    activation: str
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool


def decoder_config(
    fields: ConfigReader,
    *,
    windows: tuple[int | None, ...] | None = None,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderConfig:
    """Reads the fields that all architectures of the family share."""
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default_kv_heads or heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"it must divide num_attention_heads, {heads}")
    if fields.data.get("head_dim") is None and default_head_dim is None and hidden % heads:
        raise fields.error("hidden_size", f"without head_dim it must be a multiple of num_attention_heads, {heads}")
    head_dim = fields.integer("head_dim", default_head_dim or hidden // heads)
    layers = num_layers(fields)
    rope, context = rope_of(fields, head_dim)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=context,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        intermediate_size=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=windows if windows is not None else (None,) * layers,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def num_layers(fields: ConfigReader) -> int:
    """The number of layers, within reason."""
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the hidden states.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        spec = AttentionSpec(scale=config.head_dim**-0.5, window=config.windows[layer])
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn = SelfAttention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            spec=spec,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), cos_sin, cache, batch)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.rope = config.rope


class DecoderForCausalLM(CausalLM):
    """A decoder with its output head."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype, rngs=rngs
            )
        self.tied = config.tie_word_embeddings

    def embed(self, batch: ForwardBatch) -> jax.Array:
        return self.model.embed_tokens(batch.tokens, batch.mesh)

    def blocks(self) -> Sequence[DecoderLayer]:
        return list(self.model.layers)

    def runner(self, batch: ForwardBatch) -> RunLayer[DecoderLayer]:
        cos_sin = self.model.rope.cos_sin(batch.positions)
        return lambda layer, x, cache, view: layer(x, cos_sin, cache, view)

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        return head_logits(self.model.norm(x), self.model.embed_tokens if self.tied else self.lm_head, mesh)
