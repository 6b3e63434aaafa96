"""Qwen3-Next-80B-A3B (Qwen, 2025): in three of four layers a gated delta net, in the others gated attention of which a
quarter of each head turns; experts, and one that all tokens take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.delta_net import DeltaNetConfig, GatedDeltaNet
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import LINEAR, ConfigReader, ModelConfig, layer_types_of
from jaxinfer.models.decoder import DecoderConfig, DecoderLayer, decoder_config, num_layers
from jaxinfer.models.moe import (
    MoeConfig,
    MoeForCausalLM,
    SparseLayer,
    experts_apart,
    moe_config,
    routing_of,
    sparse_layers,
    sparse_or_dense,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Concat, Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping
from jaxinfer.models.wrapped import MTP


class DeltaNetLayer(DecoderLayer):
    """A gated delta net, then an MLP, each behind a norm and added to the hidden states."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", tuple(f"linear_attn.{name}_proj" for name in "qkvzba")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make, mixer = type(self), cast(DeltaNetConfig, config.mixers[layer])
        self.input_layernorm = make.make_norm(config, dtype)
        self.linear_attn = GatedDeltaNet(config.hidden_size, mixer, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make.make_norm(config, dtype)
        self.mlp = make.make_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.linear_attn(self.input_layernorm(x), cache, batch)
        x = x + mixed
        return x + self.feed_forward(self.post_attention_layernorm(x), batch), cache


class SparseDeltaNetLayer(DeltaNetLayer, SparseLayer):
    """The same with experts."""

    SMOOTHING_PAIRS: SmoothingPairs = DeltaNetLayer.SMOOTHING_PAIRS[:1]
    make_mlp, feed_forward = SparseLayer.make_mlp, SparseLayer.feed_forward


def layer(config: MoeConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """One of the four kinds."""
    if config.mixers[index] is None:
        return sparse_or_dense(config, index, dtype=dtype, rngs=rngs)
    return (SparseDeltaNetLayer if config.sparse[index] else DeltaNetLayer)(config, index, dtype=dtype, rngs=rngs)


class Qwen3NextForCausalLM(MoeForCausalLM):
    """Qwen3-Next with its head."""

    layer = staticmethod(layer)


def hybrid_config(fields: ConfigReader, **more: Any) -> DecoderConfig:
    """Of a decoder with gated delta nets: those layers that `layer_types` names, or else all but each
    `full_attention_interval`-th. more: see `decoder_config`."""
    layers, every = num_layers(fields), fields.integer("full_attention_interval", 4)
    types = layer_types_of(fields, layers, lambda i: (i + 1) % every == 0, LINEAR)
    keys, values = fields.integer("linear_num_key_heads", 16), fields.integer("linear_num_value_heads", 32)
    if values % keys:
        raise fields.error("linear_num_value_heads", f"linear_num_key_heads, {keys}, must divide it")
    bias = fields.boolean("attention_bias", False)
    base = decoder_config(
        fields,
        default_head_dim=256,
        default_partial=0.25,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        attention_gate=True,
        norm_offset=1.0,
        **more,
    )
    delta_net = DeltaNetConfig(
        key_heads=keys,
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_heads=values,
        value_dim=fields.integer("linear_value_head_dim", 128),
        width=fields.integer("linear_conv_kernel_dim", 4, minimum=2),
        activation=base.activation,
    )
    return replace(base, mixers=tuple(delta_net if kind == LINEAR else None for kind in types))


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections."""
    base = hybrid_config(fields, default_kv_heads=2)
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 512), 10, normalized=fields.boolean("norm_topk_prob", True)),
        expert_size=fields.integer("moe_intermediate_size", 512),
        sparse=sparse_layers(fields, base.num_layers),
        shared_size=fields.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def by_key_head(config: DeltaNetConfig, tensors: str, which: str) -> Source:
    """A projection of a delta net, of which each head of keys has its part. tensors: what their names begin with."""
    group = config.value_heads // config.key_heads
    keys, values = config.key_dim, group * config.value_dim
    sizes = {"q": keys, "k": keys, "v": values, "z": values} if which in "qkvz" else {"b": group, "a": group}
    size, each = sizes[which], sum(sizes.values())
    start = sum(list(sizes.values())[: list(sizes).index(which)])
    whole = Tensor(f"{tensors}in_proj_{''.join(sizes)}.weight")
    parts = (Part(whole, start + i * each, each * config.key_heads) for i in range(config.key_heads))
    return Concat(tuple(parts), (size,) * config.key_heads)


def mixed_weights(
    experts: Callable[[ModelConfig], ParamMapping], projection: Callable[[DeltaNetConfig, str, str], Source]
) -> Callable[[ModelConfig], ParamMapping]:
    """With what delta nets are projected by. experts: where all else is."""

    def weights(config: ModelConfig) -> ParamMapping:
        mapping = experts(config)
        delta_net = next((m for m in cast(DecoderConfig, config).mixers if m is not None), None)

        def source(name: str) -> Source:
            match = PROJECTION.fullmatch(name)
            return projection(delta_net, match[1], match[2]) if match and delta_net else mapping.source(name)

        return replace(mapping, source=source, beside=(*mapping.beside, MTP))

    return weights


PROJECTION = re.compile(r"(.*\.linear_attn\.)([qkvzba])_proj\.weight")
ARCHITECTURE = Architecture(parse, Qwen3NextForCausalLM, mixed_weights(experts_apart(), by_key_head))
