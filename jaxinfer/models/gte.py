"""GTE (Zhang et al., arXiv:2407.19669), on the hub `new`: BERT's layer with rotary positions and gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ConfigReader, rope_of
from jaxinfer.models.encoder import DEFAULTS as BASE
from jaxinfer.models.encoder import EMBEDDINGS, Encoder, EncoderConfig, both_spellings, encoder_config, fused, fused_qkv
from jaxinfer.models.nomic_bert import NAMES
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import of_pooler

DEFAULTS = BASE | {"vocab_size": 250048, "max_position_embeddings": 8192, "rope_theta": 160000.0}
HUB = EMBEDDINGS | {
    "layers.": "encoder.layer.",
    ".self_attn.o_proj.": ".attention.o_proj.",
    ".attn_norm.": ".attn_ln.",
    ".mlp_norm.": ".mlp_ln.",
}
HUB_FUSED = {**fused_qkv(".attention.qkv_proj."), **fused(".mlp.up_gate_proj.", ".mlp.up_proj.", ".mlp.gate_proj.")}
# What the hub's own code can do besides.
FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "layer_norm_type": ("layer_norm",),
    **dict.fromkeys(("logn_attention_scale", "logn_attention_clip1"), (False,)),
    "pack_qkv": (True,),
}


def parse(fields: ConfigReader) -> EncoderConfig:
    """Where types of tokens have no table, their number is 0."""
    for name, allowed in FIXED.items():
        fields.refuse(name, *allowed)
    fields = fields.with_defaults(**DEFAULTS)
    head_dim = max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 1)
    fields.refuse("head_dim", head_dim)
    rope, context = rope_of(_without_ntk(fields, head_dim), head_dim)
    return encoder_config(
        fields,
        EncoderConfig,
        learned=False,
        token_types=fields.integer("type_vocab_size", 1, minimum=0),
        gated=True,
        mlp_bias=False,
        rope=rope,
        max_context=min(context, fields.integer("max_position_embeddings")),
    )


def _without_ntk(fields: ConfigReader, head_dim: int) -> ConfigReader:
    """The hub's kind of scaling in other words (https://kexue.fm/archives/9706): base and lowest frequency are both
    stretched."""
    scaling = fields.data.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("type", scaling.get("rope_type")) != "ntk":
        return fields
    reader = ConfigReader(scaling, f"{fields.where}: rope_scaling")
    reader.refuse("mixed_b")
    factor = reader.number("factor", minimum=1.0, above=False)
    linear = {"rope_type": "linear", "factor": factor ** (2 / head_dim)}
    theta = fields.number("rope_theta") * factor
    return ConfigReader({**fields.data, "rope_scaling": linear, "rope_theta": theta}, fields.where)


weights = both_spellings("gte.", NAMES, HUB, HUB_FUSED, ("new.", ""), r"lm_head\..+")
ARCHITECTURE = Architecture(parse, Encoder, weights, classifier=of_pooler("gte.pooler.dense"))
