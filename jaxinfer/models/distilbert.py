"""DistilBERT (Sanh et al., arXiv:1910.01108): BERT's layer, without types of tokens and without a pooler."""

from __future__ import annotations

from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.encoder import DEFAULTS, Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.encoder import NAMES as BERT
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import num_labels

FIELDS = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
NAMES = BERT | {
    "layers.": "transformer.layer.",
    ".self_attn.q_proj.": ".attention.q_lin.",
    ".self_attn.k_proj.": ".attention.k_lin.",
    ".self_attn.v_proj.": ".attention.v_lin.",
    ".self_attn.o_proj.": ".attention.out_lin.",
    ".attn_norm.": ".sa_layer_norm.",
    ".mlp.up_proj.": ".ffn.lin1.",
    ".mlp.down_proj.": ".ffn.lin2.",
    ".mlp_norm.": ".output_layer_norm.",
}


def parse(fields: ConfigReader) -> EncoderConfig:
    """Positions are tensors of the checkpoint, also where `sinusoidal_pos_embds` says what they once were; the epsilon
    is no field."""
    spelt = {theirs: fields.data[ours] for ours, theirs in FIELDS.items() if fields.data.get(ours) is not None}
    defaults = {FIELDS.get(name, name): value for name, value in DEFAULTS.items()} | {
        "n_layers": 6,
        "vocab_size": 30522,
    }
    return encoder_config(fields.with_defaults(**defaults | spelt), EncoderConfig, names=FIELDS, norm_eps=1e-12)


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the first token."""
    return ClassifierConfig(num_labels(fields), activation="relu", dense="pre_classifier")


WORDS = r"vocab_(transform|layer_norm|projector)\..+"
ARCHITECTURE = Architecture(parse, Encoder, encoder_weights("distilbert.", WORDS, names=NAMES), classifier=classifier)
