"""OLMoE (Muennighoff et al., arXiv:2409.02060): experts in all layers; norms of queries and keys are over all heads."""

from __future__ import annotations

from functools import partial

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import decoder_config
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, SparseLayer, experts_apart, moe_config, routing_of
from jaxinfer.models.olmo2 import attention
from jaxinfer.models.registry import Architecture


class OlmoeLayer(SparseLayer):
    """Its attention has other norms."""

    make_attention = staticmethod(partial(attention, wide=False))


class OlmoeForCausalLM(MoeForCausalLM):
    """OLMoE with its head."""

    layer = OlmoeLayer


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections; queries, keys and values are clipped at `clip_qkv`."""
    bias = fields.boolean("attention_bias", False)
    base = decoder_config(
        fields,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        qkv_clip=None if fields.data.get("clip_qkv") is None else fields.number("clip_qkv"),
    )
    return moe_config(
        base,
        routing=routing_of(fields, ("num_experts", 64), 8, normalized=fields.boolean("norm_topk_prob", False)),
        expert_size=base.intermediate_size,
        sparse=(True,) * base.num_layers,
    )


ARCHITECTURE = Architecture(parse, OlmoeForCausalLM, experts_apart())
