"""What config.json says of Gemma 4's text model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.router import Routing
from jaxinfer.models.config import (
    FULL,
    PER_LAYER,
    SLIDING,
    ConfigReader,
    check_typed,
    layer_types_of,
    rope_of,
    rope_parameters,
    typed_windows,
)
from jaxinfer.models.decoder import DecoderConfig, decoder_config, num_layers
from jaxinfer.models.gemma import TANH_GELU
from jaxinfer.models.gemma2 import cap
from jaxinfer.models.moe import MAX_EXPERTS

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
}
# Where nothing is said.
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
Heads = tuple[int, int]  # how many key/value heads, and of what size


@dataclass(frozen=True)
class Gemma4Config(DecoderConfig):
    """What shapes it. `num_kv_heads` and `head_dim` are the most that layers have.

    heads: of each layer.
    owners: of each layer, whose keys and values it reads: its own, or those of one before it.
    key_is_value: of each layer, whether what becomes its keys becomes its values too.
    widths: of each layer's MLP.
    per_layer_size, per_layer_vocab: of each layer's own input how wide it is, 0 where there is none; and for how many
        tokens.
    routing, expert_size: how tokens get to the experts beside each MLP, and how wide these are; None where there are
        none.
    """

    heads: tuple[Heads, ...] = dataclasses.field(kw_only=True)
    owners: tuple[int, ...] = dataclasses.field(kw_only=True)
    key_is_value: tuple[bool, ...] = dataclasses.field(kw_only=True)
    widths: tuple[int, ...] = dataclasses.field(kw_only=True)
    per_layer_size: int = 0
    per_layer_vocab: int = 0
    routing: Routing | None = None
    expert_size: int = 0


def parse(fields: ConfigReader) -> Gemma4Config:
    """All layers have experts, where there are any. A window in both directions is for images alone."""
    fields = fields.with_defaults(**DEFAULTS)
    fields.refuse("use_bidirectional_attention", "vision")
    layers, bias = num_layers(fields), fields.boolean("attention_bias", False)
    types = layer_types_of(fields, layers, lambda i: (i + 1) % 6 == 0)
    types = (*types[:-1], FULL)  # whatever is said
    heads = typed_heads(fields, types)
    owners = owners_of(fields, types)
    ropes = {kind: typed_rope(fields, kind, head_dim) for kind, (_, head_dim) in heads.items()}
    wide = fields.boolean("use_double_wide_mlp", False)
    key_is_value = fields.boolean("attention_k_eq_v", False)
    per_layer = fields.integer("hidden_size_per_layer_input", 256, minimum=0)
    routing = routing_of(fields) if fields.boolean("enable_moe_block", False) else None
    base = decoder_config(
        fields,
        default_activation=TANH_GELU,
        activation_field="hidden_activation",
        default_tied=True,
        ropes=tuple(ropes[kind][0] for kind in types),
        max_context=min(context for _, context in ropes.values()),
        windows=typed_windows(fields, types),
        scale=1.0,
        qkv_bias=bias,
        out_bias=bias,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        logit_soft_cap=cap(fields, "final_logit_softcapping", None),
    )
    return base.extended(
        Gemma4Config,
        num_kv_heads=max(kv_heads for kv_heads, _ in heads.values()),
        head_dim=max(head_dim for _, head_dim in heads.values()),
        experts_per_token=routing.top_k if routing else 0,
        heads=tuple(heads[kind] for kind in types),
        owners=owners,
        key_is_value=tuple(key_is_value and kind == FULL for kind in types),
        widths=tuple(base.intermediate_size * (2 if wide and owner != i else 1) for i, owner in enumerate(owners)),
        per_layer_size=per_layer,
        per_layer_vocab=per_layer_vocab(fields) if per_layer else 0,
        routing=routing,
        expert_size=fields.integer("moe_intermediate_size") if routing else 0,
    )


def typed_heads(fields: ConfigReader, types: Sequence[str]) -> dict[str, Heads]:
    """Of each type of layer: by `per_layer_config` (transformers 5), or those of full layers by fields of their own."""
    heads, found = fields.integer("num_attention_heads"), dict[str, Heads]()
    if PER_LAYER in fields.data:
        overrides = per_layer_overrides(fields, len(types))
    else:
        full = {"head_dim": fields.integer("global_head_dim", 512)}
        if full["head_dim"] % 2:
            raise fields.error("global_head_dim", "rotary embeddings need an even number")
        if fields.boolean("attention_k_eq_v", False) and fields.data.get("num_global_key_value_heads") is not None:
            full["num_key_value_heads"] = shared = fields.integer("num_global_key_value_heads")
            if heads % shared:
                problem = f"it must divide {fields.named('num_attention_heads')}"
                raise fields.error("num_global_key_value_heads", problem)
        overrides = {i: full for i, kind in enumerate(types) if kind == FULL}
    for i, kind in enumerate(types):
        reader = fields.with_values(**overrides.get(i, {}))
        kv_heads, head_dim = reader.integer("num_key_value_heads"), reader.integer("head_dim")
        if heads % kv_heads:
            problem = f"of {kind} it must divide {fields.named('num_attention_heads')}"
            raise reader.error("num_key_value_heads", problem)
        if found.setdefault(kind, (kv_heads, head_dim)) != (kv_heads, head_dim):
            raise fields.error(PER_LAYER, f"it must be the same for all layers of a type, and layer {i} is another")
    return found


def per_layer_overrides(fields: ConfigReader, layers: int) -> dict[int, Mapping[str, object]]:
    """What `per_layer_config` says of single layers."""
    content = fields.data.get(PER_LAYER)
    if content is None:
        return {}
    known = {str(i).zfill(width): i for i in range(layers) for width in range(1, 5)}
    if not isinstance(content, Mapping) or not content.keys() <= known.keys():
        raise fields.error(PER_LAYER, f"it must be an object, by numbers of layers from 0 to {layers - 1}")
    for own in content.values():
        if not isinstance(own, Mapping) or not own.keys() <= {"head_dim", "num_key_value_heads"}:
            raise fields.error(PER_LAYER, "of a layer only head_dim and num_key_value_heads may differ")
    return {known[name]: own for name, own in content.items()}


def owners_of(fields: ConfigReader, types: Sequence[str]) -> tuple[int, ...]:
    """The last `num_kv_shared_layers` read what the last one of their type before them has."""
    shared = fields.integer("num_kv_shared_layers", 0, minimum=0)
    first = len(types) - shared
    if not set(types) <= set(types[: max(first, 0)]):
        kinds = f"each kind in {fields.named('layer_types')}: {', '.join(dict.fromkeys(types))}"
        raise fields.error("num_kv_shared_layers", f"of the {len(types)} layers, those before them must have {kinds}")
    last = {kind: i for i, kind in enumerate(types[:first])}
    return (*range(first), *(last[kind] for kind in types[first:]))


def typed_rope(fields: ConfigReader, layer_type: str, head_dim: int) -> tuple[Rope, int]:
    """Of the layers of a type, and how far it reaches."""
    given = fields.data.get("rope_parameters")
    by_type = ROPES if given is None else given
    if not isinstance(by_type, Mapping) or not isinstance(by_type.get(layer_type), Mapping):
        raise fields.error("rope_parameters", f"it must have an object for {layer_type}")
    check_typed(fields, by_type[layer_type])
    own = ConfigReader({**fields.data, "rope_parameters": dict(by_type[layer_type])}, fields.where)
    rope = rope_parameters(own)
    if rope.data["rope_type"] != "proportional":
        return rope_of(own, head_dim)
    share = rope.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise rope.error("partial_rotary_factor", "it must be at most 1")
    if head_dim % 2:
        own = ConfigReader({"head_dim": head_dim}, fields.where)
        raise own.error("head_dim", f"of {layer_type}; rotary embeddings need an even number")
    theta, factor = rope.number("rope_theta", 1e4, minimum=1.0), rope.number("factor", 1.0)
    turning = 2 * int(share * head_dim // 2)
    return Rope(head_dim, theta, "proportional", factor, turning=turning), fields.integer("max_position_embeddings")


def per_layer_vocab(fields: ConfigReader) -> int:
    """Tokens that layers have an input of their own for: no fewer than there are."""
    tokens, vocab = fields.integer("vocab_size_per_layer_input", 262144), fields.integer("vocab_size")
    if tokens < vocab:
        raise fields.error("vocab_size_per_layer_input", f"it must be at least {fields.named('vocab_size')}")
    return tokens


def routing_of(fields: ConfigReader) -> Routing:
    """Shares of a token's experts add up to one."""
    experts, top_k = fields.integer("num_experts", maximum=MAX_EXPERTS), fields.integer("top_k_experts")
    if top_k > experts:
        raise fields.error("top_k_experts", f"it must be at most {fields.named('num_experts')}")
    return Routing(experts, top_k, normalized=True)
