"""Jamba (AI21, arXiv:2403.19887): Mamba with normed time steps, B and C in most layers, in the others attention without
positions; every other layer has experts."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.layers.mamba import MambaConfig
from jaxinfer.layers.router import Routing
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import decoder_config
from jaxinfer.models.hybrid import MixerLayer, SparseMixerLayer, smoothing_pairs, sparse_hybrid
from jaxinfer.models.mamba import MAMBA, mamba_part, rank_of
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, moe_config, routing_of
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source
from jaxinfer.models.weights import ParamMapping

NAMES = {
    "post_attention_layernorm": "pre_ff_layernorm",
    ".mlp.gate.": ".feed_forward.router.",
    ".mlp.": ".feed_forward.",
    ".mixer.": ".mamba.",
    "model.norm.": "model.final_layernorm.",
}


class JambaMambaLayer(MixerLayer):
    """Mamba, then an MLP."""

    SMOOTHING_PAIRS = smoothing_pairs(*MAMBA)


class SparseJambaMambaLayer(SparseMixerLayer):
    """Mamba, then experts."""

    SMOOTHING_PAIRS = JambaMambaLayer.SMOOTHING_PAIRS[:1]


class JambaForCausalLM(MoeForCausalLM):
    """Jamba with its head."""

    layer = staticmethod(sparse_hybrid(JambaMambaLayer, SparseJambaMambaLayer))


def parse(fields: ConfigReader) -> MoeConfig:
    """Every `attn_layer_period`-th layer attends, from `attn_layer_offset` on, and every `expert_layer_period`-th has
    experts, if there are two and more."""

    def every(which: str, period: int, offset: int) -> tuple[bool, ...]:
        period = fields.integer(f"{which}_layer_period", period)
        offset = fields.integer(f"{which}_layer_offset", offset, minimum=0)
        if offset >= period:
            problem = f"it must be less than {fields.named(f'{which}_layer_period')}"
            raise fields.error(f"{which}_layer_offset", problem)
        return tuple(i % period == offset for i in range(base.num_layers))

    base = decoder_config(fields.with_defaults(max_position_embeddings=262144), default_kv_heads=8)
    inner = fields.integer("mamba_expand", 2) * base.hidden_size
    mixer = MambaConfig(
        inner=inner,
        state_size=fields.integer("mamba_d_state", 16),
        rank=rank_of(fields, "mamba_dt_rank"),
        width=fields.integer("mamba_d_conv", 4, minimum=2),
        activation=base.activation,
        conv_bias=fields.boolean("mamba_conv_bias", True),
        bias=fields.boolean("mamba_proj_bias", False),
        norm_eps=base.norm_eps,
        norm_weights=True,
    )
    attend, sparse = every("attn", 8, 4), every("expert", 2, 1)
    alone = fields.integer("num_experts", 16) == 1
    routing = Routing(1, 1) if alone else routing_of(fields, ("num_experts", 16), 2)
    base = replace(base, mixers=tuple(None if a else mixer for a in attend), ropes=(None,) * base.num_layers)
    return moe_config(
        base,
        routing=routing,
        expert_size=base.intermediate_size,
        sparse=tuple(s and not alone for s in sparse),
        experts_per_token=0 if alone else routing.top_k,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are one by one."""
    mapping = experts_apart(NAMES)(config)

    def source(name: str) -> Source:
        return mamba_part(name, config, "mamba") or mapping.source(name)

    return ParamMapping(source, ignored=mapping.ignored)


ARCHITECTURE = Architecture(parse, JambaForCausalLM, weights)
