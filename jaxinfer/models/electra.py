"""ELECTRA (Clark et al., arXiv:2003.10555), discriminators and generators: BERT's layer behind smaller embeddings."""

from __future__ import annotations

from jaxinfer.layers.classifier import ClassifierConfig
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.encoder import DEFAULTS as BASE
from jaxinfer.models.encoder import NAMES as BERT
from jaxinfer.models.encoder import Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import num_labels

SMALL = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 30522}
DEFAULTS = BASE | SMALL
NAMES = BERT | {"project.": "embeddings_project."}


def parse(fields: ConfigReader) -> EncoderConfig:
    """Embeddings of another width than hidden states are projected."""
    fields.refuse("position_embedding_type", "absolute")
    types, width = fields.integer("type_vocab_size", 2), fields.integer("embedding_size", 128)
    fields = fields.with_defaults(**DEFAULTS)
    projected = width != fields.integer("hidden_size")
    return encoder_config(fields, EncoderConfig, token_types=types, embedding_size=width, projected=projected)


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the first token."""
    return ClassifierConfig(num_labels(fields), activation="gelu", dense="classifier.dense", out="classifier.out_proj")


HEADS = r"(generator_predictions|generator_lm_head|discriminator_predictions)\..+"
ARCHITECTURE = Architecture(parse, Encoder, encoder_weights("electra.", HEADS, names=NAMES), classifier=classifier)
