"""BERT (Devlin et al., arXiv:1810.04805), and most small models that make vectors."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.encoder import DEFAULTS, Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import of_pooler


def parse(fields: ConfigReader) -> EncoderConfig:
    """Earlier versions of transformers had other kinds of positions."""
    fields.refuse("position_embedding_type", "absolute")
    types = fields.integer("type_vocab_size", 2)
    return encoder_config(fields.with_defaults(**DEFAULTS, vocab_size=30522), EncoderConfig, token_types=types)


ARCHITECTURE = Architecture(
    parse, Encoder, encoder_weights("bert.", r"cls\..+"), classifier=of_pooler("bert.pooler.dense")
)
