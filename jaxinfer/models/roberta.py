"""RoBERTa (Liu et al., arXiv:1907.11692): BERT's layer; positions come after that of padding."""

from __future__ import annotations

from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.encoder import DEFAULTS, Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import num_labels


def parse(fields: ConfigReader, vocab_size: int = 50265) -> EncoderConfig:
    """The first `pad_token_id + 1` rows of positions are of no token but padding."""
    fields.refuse("position_embedding_type", "absolute")
    padding, types = fields.integer("pad_token_id", 1, minimum=0), fields.integer("type_vocab_size", 2)
    fields = fields.with_defaults(**DEFAULTS, vocab_size=vocab_size)
    return encoder_config(fields, EncoderConfig, after_padding=padding, token_types=types)


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the first token, without a pooler."""
    return ClassifierConfig(num_labels(fields), dense="classifier.dense", out="classifier.out_proj")


ARCHITECTURE = Architecture(parse, Encoder, encoder_weights("roberta.", r"lm_head\..+"), classifier=classifier)
