"""Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE (arXiv:2404.14219, arXiv:2409.12136): Mixtral's layer with layer norms and
biases, and SparseMixer-v2's router.
"""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.layers.router import Routing
from jaxinfer.models.config import ConfigReader, rope_parameters
from jaxinfer.models.decoder import layer_norm
from jaxinfer.models.mixtral import NAMES
from jaxinfer.models.mixtral import parse as parse_mixtral
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, SparseLayer, experts_apart
from jaxinfer.models.registry import Architecture

DEFAULTS = {"num_local_experts": 16, "max_position_embeddings": 131072}


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections. `router_jitter_noise` decides which experts count in a share."""
    fields = fields.with_defaults(**DEFAULTS)
    fields.refuse("num_experts_per_tok", 2)
    rope = rope_parameters(fields)
    scaled = rope.choice("rope_type", "default", ("default", "longrope")) == "longrope"
    if scaled:
        own = {**rope.data, "attention_factor": rope.number("short_mscale")}
        fields = ConfigReader({**fields.data, "rope_parameters": own, "rope_scaling": None}, fields.where)
    base = parse_mixtral(fields)
    if scaled:
        long = rope.number("long_mscale")
        base = replace(base, ropes=tuple(rope and replace(rope, long_attention_factor=long) for rope in base.ropes))
    bias, head_bias = (fields.boolean(name, False) for name in ("attention_bias", "lm_head_bias"))
    if head_bias and base.tie_word_embeddings:
        raise fields.error("lm_head_bias", "a head that is the embedding (tie_word_embeddings) has no bias here")
    jitter = fields.number("router_jitter_noise", 0.01, above=False)
    routing = Routing(base.routing.experts, base.routing.top_k, sparsemixer=jitter)
    return replace(base, routing=routing, qkv_bias=bias, out_bias=bias, head_bias=head_bias)


class PhimoeLayer(SparseLayer):
    """Layer norms."""

    make_norm = staticmethod(layer_norm)


class PhimoeForCausalLM(MoeForCausalLM):
    """Phi with experts, and its head."""

    layer = PhimoeLayer
    norm = staticmethod(layer_norm)


ARCHITECTURE = Architecture(parse, PhimoeForCausalLM, experts_apart(NAMES))
