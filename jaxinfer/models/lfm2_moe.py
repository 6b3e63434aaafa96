"""LFM2-8B-A1B (Liquid AI, arXiv:2511.23404): LFM2's layers, of which all but the first ones have experts."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, ModelConfig, layer_types_of
from jaxinfer.models.decoder import num_layers
from jaxinfer.models.hybrid import SparseMixerLayer, sparse_hybrid
from jaxinfer.models.lfm2 import CONV, NAMES, ConvolutionLayer, convolution_config, convolution_part
from jaxinfer.models.moe import MoeConfig, MoeForCausalLM, experts_apart, moe_config, routing_of
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source
from jaxinfer.models.weights import ParamMapping

EXPERTS = {
    ".mlp.gate.e_score_correction_bias": ".feed_forward.expert_bias",
    ".mlp.gate.": ".feed_forward.gate.",
    ".mlp.experts.": ".feed_forward.experts.",
}
MATRICES = {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


class SparseConvolutionLayer(SparseMixerLayer):
    """A short convolution, then experts."""

    SMOOTHING_PAIRS = ConvolutionLayer.SMOOTHING_PAIRS[:1]


class Lfm2MoeForCausalLM(MoeForCausalLM):
    """LFM2 with experts and its head."""

    layer = staticmethod(sparse_hybrid(ConvolutionLayer, SparseConvolutionLayer))


def parse(fields: ConfigReader) -> MoeConfig:
    """The first `num_dense_layers` have MLPs."""
    layers = num_layers(fields)
    if fields.data.get("layer_types") is None:
        raise fields.error("layer_types", "it must list one kind for each layer")
    base = convolution_config(fields, layer_types_of(fields, layers, other=CONV))
    dense = fields.integer("num_dense_layers", 2, minimum=0)
    return moe_config(
        base,
        routing=routing_of(
            fields,
            ("num_experts", 32),
            4,
            scores="sigmoid",
            bias=fields.boolean("use_expert_bias", True),
            normalized=fields.boolean("norm_topk_prob", True),
            added_to_sum=1e-6,
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        expert_size=fields.integer("moe_intermediate_size", 1792),
        sparse=tuple(i >= dense for i in range(layers)),
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are one by one, or stacked as in transformers 5."""
    mapping = experts_apart(NAMES | EXPERTS | MATRICES)(config)

    def source(name: str) -> Source:
        return convolution_part(name, config) or mapping.source(name)

    return ParamMapping(source, ignored=mapping.ignored)


ARCHITECTURE = Architecture(parse, Lfm2MoeForCausalLM, weights)
