"""Granite 3.x with experts (IBM, 2024): Granite's multipliers; shares are a softmax over a token's experts alone."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import IGNORED
from jaxinfer.models.granite import GraniteLayer
from jaxinfer.models.granite import parse as parse_granite
from jaxinfer.models.moe import STACKED, MoeConfig, MoeForCausalLM, SparseLayer, moe_config, routing_of
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping


class GraniteMoeLayer(SparseLayer, GraniteLayer):
    """Granite's, with experts."""


class GraniteMoeForCausalLM(MoeForCausalLM):
    """Granite with experts, and its head."""

    layer = GraniteMoeLayer


def parse(fields: ConfigReader, shared_experts: bool = False, default_shared: int = 0) -> MoeConfig:
    """As Granite, and all layers have experts. shared_experts: and an MLP that all tokens take, if it has a width.
    default_shared: its width where nothing is said."""
    fields.refuse("mlp_bias", False)
    base = parse_granite(fields)
    shared = fields.integer("shared_intermediate_size", default_shared, minimum=0) if shared_experts else 0
    return moe_config(
        base,
        routing=routing_of(fields, ("num_local_experts", 8), 2, among_chosen=True),
        expert_size=base.intermediate_size,
        sparse=(True,) * base.num_layers,
        shared_size=shared,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are stacked, gates and ups in one tensor."""
    assert isinstance(config, MoeConfig)
    size, shared = config.expert_size, config.shared_size

    def source(name: str) -> Source:
        if ".mlp.shared_expert." in name:
            layer, _, which = name.partition("mlp.shared_expert.")
            if which.startswith("down_proj"):
                return Tensor(f"{layer}shared_mlp.output_linear.weight")
            start = 0 if which.startswith("gate_proj") else shared
            return Part(Tensor(f"{layer}shared_mlp.input_linear.weight"), start, 2 * shared)
        if (match := STACKED.fullmatch(name)) is None:
            return Tensor(name.replace(".mlp.gate.", ".block_sparse_moe.router.layer."))
        where = match[1].replace(".mlp.experts", ".block_sparse_moe")
        if match[2] == "down_proj":
            return Tensor(f"{where}.output_linear.weight")
        start = 0 if match[2] == "gate_proj" else size
        return Part(Tensor(f"{where}.input_linear.weight"), start, 2 * size, axis=1)

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, GraniteMoeForCausalLM, weights)
