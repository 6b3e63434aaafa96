"""Qwen3-Next-80B-A3B (Qwen, 2025): in three of four layers a gated delta net, in the others gated attention of which a
quarter of each head turns; experts, and one that all tokens take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from jaxinfer.layers.delta_net import DeltaNetConfig
from jaxinfer.models.config import LINEAR, ConfigReader, ModelConfig, layer_types_of
from jaxinfer.models.decoder import DecoderConfig, DecoderLayer, decoder_config, num_layers
from jaxinfer.models.hybrid import MixerLayer, SparseMixerLayer, sparse_hybrid
from jaxinfer.models.moe import (
    MoeConfig,
    MoeForCausalLM,
    SparseLayer,
    experts_apart,
    moe_config,
    routing_of,
    sparse_layers,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Concat, Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping
from jaxinfer.models.wrapped import MTP


class AttentionLayer(DecoderLayer):
    """Attention, then an MLP. SMOOTHING_PAIRS: without the norms, whose outputs are no multiples of their weights."""

    SMOOTHING_PAIRS = DecoderLayer.SMOOTHING_PAIRS[1::2]


class SparseAttentionLayer(SparseLayer):
    """The same with experts."""

    SMOOTHING_PAIRS = AttentionLayer.SMOOTHING_PAIRS[:1]


class DeltaNetLayer(MixerLayer):
    """A gated delta net, then an MLP."""

    SMOOTHING_PAIRS = AttentionLayer.SMOOTHING_PAIRS[1:]


class SparseDeltaNetLayer(SparseMixerLayer):
    """The same with experts."""

    SMOOTHING_PAIRS = ()


class Qwen3NextForCausalLM(MoeForCausalLM):
    """Qwen3-Next with its head."""

    layer = staticmethod(sparse_hybrid(DeltaNetLayer, SparseDeltaNetLayer, AttentionLayer, SparseAttentionLayer))


def hybrid_config(fields: ConfigReader, **more: Any) -> DecoderConfig:
    """Of a decoder with gated delta nets: those layers that `layer_types` names, or else all but each
    `full_attention_interval`-th. more: see `decoder_config`."""
    layers, every = num_layers(fields), fields.integer("full_attention_interval", 4)
    types = layer_types_of(fields, layers, lambda i: (i + 1) % every == 0, LINEAR)
    keys, values = fields.integer("linear_num_key_heads", 16), fields.integer("linear_num_value_heads", 32)
    if values % keys:
        raise fields.error("linear_num_value_heads", f"{fields.named('linear_num_key_heads')}, must divide it")
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


def by_key_head(config: DeltaNetConfig, mixer: str, which: str) -> Source:
    """A projection of a delta net, of which each head of keys has its part. mixer: what names of tensors begin with."""
    group = config.value_heads // config.key_heads
    keys, values = config.key_dim, group * config.value_dim
    sizes = {"q": keys, "k": keys, "v": values, "z": values} if which in "qkvz" else {"b": group, "a": group}
    size, each = sizes[which], sum(sizes.values())
    start = sum(list(sizes.values())[: list(sizes).index(which)])
    whole = Tensor(f"{mixer}in_proj_{''.join(sizes)}.weight")
    parts = (Part(whole, start + i * each, each * config.key_heads) for i in range(config.key_heads))
    return Concat(tuple(parts), (size,) * config.key_heads)


def mixed_weights(
    others: Callable[[ModelConfig], ParamMapping], projection: Callable[[DeltaNetConfig, str, str], Source]
) -> Callable[[ModelConfig], ParamMapping]:
    """Where a delta net's projections are, and all else of it under transformers' name. others: where the rest is."""

    def weights(config: ModelConfig) -> ParamMapping:
        mapping = others(config)
        delta_net = next((m for m in cast(DecoderConfig, config).mixers if m is not None), None)

        def source(name: str) -> Source:
            if (match := OF_MIXER.fullmatch(name)) is None:
                return mapping.source(name)
            mixer, which = f"{match[1]}.linear_attn.", PROJECTION.fullmatch(match[2])
            return Tensor(mixer + match[2]) if which is None else projection(cast(Any, delta_net), mixer, which[1])

        return replace(mapping, source=source, beside=(*mapping.beside, MTP))

    return weights


OF_MIXER, PROJECTION = re.compile(r"(.*)\.mixer\.(.*)"), re.compile(r"([qkvzba])_proj\.weight")
ARCHITECTURE = Architecture(parse, Qwen3NextForCausalLM, mixed_weights(experts_apart(), by_key_head))
