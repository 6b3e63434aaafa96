"""OPT (Zhang et al., arXiv:2205.01068): learned positions, layer norms before blocks or, in one model, after them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.linear import Embedding, Linear, head_logits
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, num_layers, plain_mlp, self_attention
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

OFFSET = 2  # the first positions of the table are nobody's
NAMES = {
    ".self_attn.o_proj.": ".self_attn.out_proj.",
    ".mlp.up_proj.": ".fc1.",
    ".mlp.down_proj.": ".fc2.",
    "model.norm.": "model.final_layer_norm.",
}
FEEDS: SmoothingPairs = (("self_attn.v_proj", ("self_attn.o_proj",)),)


@dataclass(frozen=True)
class OPTConfig(DecoderConfig):
    """OPT's own fields.

    embed_size: the width of embeddings, which a projection brings to hidden_size and back where they differ.
    norm_first: blocks have their norm before, not after them.
    final_norm: there is one after all layers.
    norm_affine: norms have weights and biases.
    """

    embed_size: int = 0
    norm_first: bool = True
    final_norm: bool = True
    norm_affine: bool = True

    @property
    def output_size(self) -> int:
        return self.embed_size


def parse(fields: ConfigReader) -> OPTConfig:
    """`_remove_final_layer_norm` is set where a model was tuned without that norm."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise fields.error("hidden_size", f"it must be a multiple of {fields.named('num_attention_heads')}")
    layers = num_layers(fields)
    bias, norm_first = fields.boolean("enable_bias", True), fields.boolean("do_layer_norm_before", True)
    return OPTConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_context=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        intermediate_size=fields.integer("ffn_dim"),
        activation=fields.choice("activation_function", "relu", tuple(ACTIVATIONS)),
        norm_eps=1e-5,
        ropes=(None,) * layers,
        windows=(None,) * layers,
        scale=(hidden // heads) ** -0.5,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        embed_size=fields.integer("word_embed_proj_dim", hidden),
        norm_first=norm_first,
        final_norm=norm_first and not fields.boolean("_remove_final_layer_norm", False),
        norm_affine=fields.boolean("layer_norm_elementwise_affine", True),
    )


def norm(config: OPTConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states."""
    affine = config.norm_affine
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, scale=affine, bias=affine)


class OPTLayer(nnx.Module):
    """Attention, then MLP, added to the hidden states, with a norm before or after each.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`; norms don't, as some are after, and some have no weights.
    """

    SMOOTHING_PAIRS = FEEDS

    def __init__(self, config: OPTConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.self_attn = self_attention(config, layer, dtype=dtype, rngs=rngs)
        self.self_attn_layer_norm = norm(config, dtype)
        self.mlp = plain_mlp(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm(config, dtype)
        self.norm_first = config.norm_first

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        if self.norm_first:
            attended, cache = self.self_attn(self.self_attn_layer_norm(x), angles, cache, batch)
            x = x + attended
            return x + self.mlp(self.final_layer_norm(x)), cache
        attended, cache = self.self_attn(x, angles, cache, batch)
        x = self.self_attn_layer_norm(x + attended)
        return self.final_layer_norm(x + self.mlp(x)), cache


class NormFirstOPTLayer(OPTLayer):
    """One whose norms feed its linears, with weights."""

    SMOOTHING_PAIRS = (
        ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *FEEDS,
        ("final_layer_norm", ("mlp.up_proj",)),
    )


class OPTDecoder(nnx.Module):
    """Embeddings, layers, final norm, and projections from and to another width."""

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, width = config.hidden_size, config.embed_size
        layer = NormFirstOPTLayer if config.norm_first and config.norm_affine else OPTLayer
        positions = config.max_context + OFFSET
        self.embed_tokens = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.embed_positions = Embedding(positions, hidden, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = norm(config, dtype) if config.final_norm else None

        def projection(features: int, out: int) -> Linear | None:
            """On every device all of it: it is small, and outside of layers nothing is gathered."""
            return None if out == features else Linear(features, out, axes=(None, None), dtype=dtype, rngs=rngs)

        self.project_in, self.project_out = projection(width, hidden), projection(hidden, width)


class OPTForCausalLM(DecoderForCausalLM):
    """OPT with its (normally tied) output head."""

    model: OPTDecoder  # type: ignore[assignment]

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.model = OPTDecoder(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            size = config.embed_size, config.vocab_size
            self.lm_head = Linear(*size, axes=("vocab", "embed"), dtype=dtype, rngs=rngs)
        self.config = config

    def embed(self, batch: ForwardBatch) -> jax.Array:
        model = self.model
        x = model.embed_tokens(batch.tokens, batch.mesh)
        x = x if model.project_in is None else model.project_in(x)
        return x + model.embed_positions(batch.positions + OFFSET, batch.mesh)

    def finish(self, x: jax.Array) -> jax.Array:
        model = self.model
        x = x if model.norm is None else model.norm(x)
        return x if model.project_out is None else model.project_out(x)

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head_logits(self.finish(x), head, mesh)


def source(name: str) -> Source:
    """OPT's names are others."""
    return Tensor(re.sub(r"^model\.", "model.decoder.", spelled(name, NAMES)))


def weights(config: ModelConfig) -> ParamMapping:
    """Old checkpoints carry a version."""
    return ParamMapping(source, ignored=(r"decoder\.version",), embedding="model.decoder.embed_tokens.weight")


ARCHITECTURE = Architecture(parse, OPTForCausalLM, weights)
