"""Hunyuan-A13B (Tencent, 2025): Hunyuan's attention, and experts beside an MLP of their width that all tokens take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.layers.router import Routing
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.hunyuan_v1_dense import NAMES, HunYuanLayer
from jaxinfer.models.hunyuan_v1_dense import parse as parse_dense
from jaxinfer.models.moe import MAX_EXPERTS, MoeConfig, MoeForCausalLM, SparseLayer, experts_apart, moe_config
from jaxinfer.models.registry import Architecture

# What Tencent's own code also reads, and what transformers' computes as.
READ_NO_MORE = {
    **dict.fromkeys(("use_qk_norm", "use_rotary_pos_emb", "norm_topk_prob", "use_mixed_mlp_moe"), True),
    **dict.fromkeys(("use_cla", "use_mla", "mlp_bias", "group_limited_greedy", "position_embedding_xdrope"), False),
    "moe_layer_num_skipped": 0,
}


@dataclass(frozen=True)
class HunYuanMoeConfig(MoeConfig):
    """What shapes it.

    top_k: of each layer, how many experts a token goes to.
    """

    top_k: tuple[int, ...] = ()


def of_layers(fields: ConfigReader, name: str, default: int, layers: int) -> tuple[int, ...]:
    """An integer of each layer, given as one or as a list."""
    values = fields.data.get(name)
    if not isinstance(values, list):
        return (fields.integer(name, default),) * layers
    if len(values) != layers:
        raise fields.error(name, f"it must be an integer, or a list of {layers}, one a layer (num_hidden_layers)")
    items = ConfigReader({f"{name}[{i}]": value for i, value in enumerate(values)}, fields.where)
    return tuple(items.integer(item) for item in items.data)


def parse(fields: ConfigReader) -> HunYuanMoeConfig:
    """All layers have as many experts, as wide as the MLP that all tokens take."""
    for name, value in READ_NO_MORE.items():
        fields.refuse(name, value)
    given = fields.data.get
    fields = fields.with_absent(head_dim=given("attention_head_dim"), num_experts=given("num_local_experts"))
    fields = fields.with_defaults(moe_topk=given("num_experts_per_tok"))
    base = parse_dense(fields)
    for name, value in (("moe_intermediate_size", base.intermediate_size), ("num_shared_expert", 1)):
        if set(of_layers(fields, name, value, base.num_layers)) != {value}:
            raise fields.error(name, f"it must be {value} in all layers")
    experts = fields.integer("num_experts", 1, maximum=MAX_EXPERTS)
    top_k = of_layers(fields, "moe_topk", 1, base.num_layers)
    if max(top_k) > experts:
        raise fields.error("moe_topk", f"it must be at most {fields.named('num_experts')}")
    config = moe_config(
        base,
        routing=Routing(experts, max(top_k), normalized=True),
        expert_size=base.intermediate_size,
        sparse=(True,) * base.num_layers,
        shared_size=base.intermediate_size,
    )
    return HunYuanMoeConfig(**vars(config), top_k=top_k)


class HunYuanMoeLayer(SparseLayer, HunYuanLayer):
    """Hunyuan's, with experts."""

    def __init__(self, config: MoeConfig, layer: int, **options: Any):
        assert isinstance(config, HunYuanMoeConfig)
        routing = replace(config.routing, top_k=config.top_k[layer])
        super().__init__(replace(config, routing=routing), layer, **options)


class HunYuanMoEV1ForCausalLM(MoeForCausalLM):
    """Hunyuan with experts, and its head."""

    layer = HunYuanMoeLayer


ARCHITECTURE = Architecture(
    parse,
    HunYuanMoEV1ForCausalLM,
    experts_apart(NAMES | {".mlp.gate.": ".mlp.gate.wg.", ".shared_expert.": ".shared_mlp."}),
)
