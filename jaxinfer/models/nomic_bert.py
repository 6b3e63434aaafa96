"""Nomic's BERT (Nussbaum et al., arXiv:2402.01613): rotary positions and gated MLPs, without biases."""

from __future__ import annotations

from typing import Any

from jaxinfer.models.config import ConfigReader, rope_of
from jaxinfer.models.encoder import DEFAULTS as BASE
from jaxinfer.models.encoder import EMBEDDINGS, Encoder, EncoderConfig, both_spellings, encoder_config, fused_qkv
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import of_pooler

DEFAULTS = BASE | {"vocab_size": 30528, "max_position_embeddings": 2048, "rope_theta": 1000.0}
# Of the hub's own code, and here.
FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
# What it can say besides, and has to say where the arithmetic is this one.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "rotary_emb_fraction": (1, 1.0),
    **dict.fromkeys(("prenorm", "parallel_block", "causal", "use_rms_norm", "rotary_emb_interleaved"), (False,)),
    **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "scale_attn_by_inverse_layer_idx"), (False,)),
    "scale_attn_weights": (True,),
    **dict.fromkeys(("rotary_emb_scale_base", "rotary_scaling_factor"), ()),
    **dict.fromkeys(("num_experts", "moe_every_n_layers"), (0,)),
}
# Names of weights in transformers, and in the hub's own code.
NAMES = EMBEDDINGS | {
    ".attn_norm.": ".post_attention_layernorm.",
    ".mlp_norm.": ".post_mlp_layernorm.",
}
HUB = EMBEDDINGS | {
    "embeddings.norm.": "emb_ln.",
    "layers.": "encoder.layers.",
    ".self_attn.o_proj.": ".attn.out_proj.",
    ".mlp.up_proj.": ".mlp.fc11.",
    ".mlp.gate_proj.": ".mlp.fc12.",
    ".mlp.down_proj.": ".mlp.fc2.",
    ".attn_norm.": ".norm1.",
    ".mlp_norm.": ".norm2.",
}
HUB_FUSED = fused_qkv(".attn.Wqkv.")


def parse(fields: ConfigReader) -> EncoderConfig:
    """In both spellings."""
    for name, allowed in FIXED.items():
        fields.refuse(name, *allowed)
    names = {ours: theirs for theirs, ours in FIELDS.items() if fields.data.get(theirs) is not None}
    theta = {"rope_theta": fields.number(names["rope_theta"])} if "rope_theta" in names else {}
    fields = fields.with_defaults(**DEFAULTS | theta)
    hidden, heads = (names.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    derived = max(fields.integer(hidden) // fields.integer(heads), 1)
    head_dim = fields.integer("head_dim", derived)
    context = fields.integer(names.get("max_position_embeddings", "max_position_embeddings"))
    rope, context = rope_of(ConfigReader({**fields.data, "max_position_embeddings": context}, fields.where), head_dim)
    return encoder_config(
        fields,
        EncoderConfig,
        names=names,
        activation="silu",
        learned=False,
        token_types=fields.integer("type_vocab_size", 2),
        gated=True,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
        max_context=context,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "down_bias"), False),
    )


weights = both_spellings("nomic_bert.", NAMES, HUB, HUB_FUSED, ("", "bert."), r"cls\..+")
ARCHITECTURE = Architecture(parse, Encoder, weights, classifier=of_pooler("nomic_bert.pooler.dense"))
