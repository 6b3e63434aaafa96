"""ModernBERT (Warner et al., arXiv:2412.13663): norms first, gated MLPs, rotary positions, and two layers in three that
see a window to both sides."""

from __future__ import annotations

from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.config import FULL, SLIDING, ConfigReader, ModelConfig, layer_types_of, typed_rope
from jaxinfer.models.decoder import num_layers
from jaxinfer.models.encoder import Encoder, EncoderConfig, encoder_config, fused, fused_qkv, fused_source
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source
from jaxinfer.models.tasks import num_labels
from jaxinfer.models.weights import ParamMapping

DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
}
FIELDS = {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"}
THETAS = {FULL: ("global_rope_theta", 160000.0), SLIDING: ("local_rope_theta", 10000.0)}
NAMES = {
    "embeddings.words.": "embeddings.tok_embeddings.",
    ".self_attn.o_proj.": ".attn.Wo.",
    ".mlp.down_proj.": ".mlp.Wo.",
}
FUSED = {**fused_qkv(".attn.Wqkv."), **fused(".mlp.Wi.", ".mlp.gate_proj.", ".mlp.up_proj.")}


def parse(fields: ConfigReader) -> EncoderConfig:
    """`local_attention` is a window's whole width, and both of its ends are seen."""
    fields = fields.with_defaults(**DEFAULTS)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    period = fields.integer("global_attn_every_n_layers", 3)
    types = layer_types_of(fields, num_layers(fields), lambda i: i % period == 0)
    head_dim = max(hidden // heads, 1)
    typed = {kind: typed_rope(fields, kind, theta, head_dim) for kind, theta in THETAS.items()}
    window = fields.integer("local_attention", 128) // 2 + 1
    bias, mlp_bias = fields.boolean("attention_bias", False), fields.boolean("mlp_bias", False)
    return encoder_config(
        fields,
        EncoderConfig,
        names=FIELDS,
        eps=1e-5,
        learned=False,
        norm_first=True,
        gated=True,
        ropes=tuple(typed[layer_type][0] for layer_type in types),
        windows=tuple(window if layer_type == SLIDING else None for layer_type in types),
        max_context=min(context for _, context in typed.values()),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
        down_bias=mlp_bias,
        norm_bias=fields.boolean("norm_bias", False),
    )


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the first token, or of the mean."""
    assert isinstance(config, EncoderConfig)
    return ClassifierConfig(
        num_labels(fields),
        pooling=fields.choice("classifier_pooling", "cls", ("cls", "mean")),
        activation=fields.choice("classifier_activation", "gelu", tuple(ACTIVATIONS)),
        dense="head.dense",
        norm="head.norm",
        dense_bias=fields.boolean("classifier_bias", False),
        norm_bias=config.norm_bias,
        norm_eps=config.norm_eps,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """The head for words is left aside."""

    def source(name: str) -> Source:
        name = f"final_{name}" if name.startswith("norm.") else name
        return fused_source(f"model.{name}", config, NAMES, FUSED)

    return ParamMapping(source, beside=() if config.classifier else (r"(head|decoder)\..+",))


ARCHITECTURE = Architecture(parse, Encoder, weights, classifier=classifier)
