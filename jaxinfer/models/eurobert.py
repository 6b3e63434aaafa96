"""EuroBERT (Boizard et al., arXiv:2503.05500): Llama's layer, in which tokens see what comes after them."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import num_labels

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
POOLINGS = {"bos": "cls", "mean": "mean", "late": "mean"}


def parse(fields: ConfigReader) -> DecoderConfig:
    """Both ways."""
    return replace(parse_llama(fields.with_defaults(**DEFAULTS)), causal=False)


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the first token, or of the mean, or the mean of all tokens' logits. `clf_pooling` is the hub's own name."""
    fields = fields.with_defaults(classifier_pooling=fields.data.get("clf_pooling"))
    pooling = fields.choice("classifier_pooling", "late", tuple(POOLINGS))
    return ClassifierConfig(
        num_labels(fields), POOLINGS[pooling], late=pooling == "late", activation="gelu", dense="dense"
    )


ARCHITECTURE = Architecture(parse, DecoderForCausalLM, weights, classifier=classifier)
